#include "cuda_stream.h"

#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

namespace pyprune {
namespace {

// CPU builds of PyTorch do not export this, and a library that refers to it could not be loaded there. It is looked up
// when a CUDA tensor arrives, which happens in CUDA builds only.
using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

CurrentStream current_stream() {
  static const CurrentStream found = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  return found;
}

}  // namespace

CudaScope::CudaScope(const torch::stable::Tensor& on) : guard_(on.get_device_index()), stream_(nullptr) {
  STD_TORCH_CHECK(current_stream() != nullptr, "pyprune: this PyTorch has no CUDA streams");
  void* stream = nullptr;
  STD_TORCH_CHECK(current_stream()(on.get_device_index(), &stream) == 0, "pyprune: no current CUDA stream");
  stream_ = static_cast<cudaStream_t>(stream);
  // The CUDA runtime linked here is not PyTorch's: it is told the device too.
  check_cuda(cudaSetDevice(on.get_device_index()), "cudaSetDevice");
}

torch::stable::Tensor CudaScope::workspace(const torch::stable::Tensor& like, int64_t bytes) const {
  return torch::stable::new_empty(like, {std::max<int64_t>(bytes, 1)}, torch::headeronly::ScalarType::Byte);
}

void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) cudaGetLastError();  // forgets it, or the next launch, which is good, would report it
  STD_TORCH_CHECK(status == cudaSuccess, "pyprune: ", what, ": ", cudaGetErrorString(status));
}

void check_one_device(const std::vector<torch::stable::Tensor>& tensors, int32_t device, const char* what) {
  for (const auto& t : tensors) {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device, "pyprune: ", what,
                    ": all tensors on one CUDA device");
  }
}

}  // namespace pyprune
