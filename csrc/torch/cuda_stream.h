// Where a CUDA launch of this library happens: the tensors' device, and PyTorch's current stream on it.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace pyprune {

// Makes the device current while it lives.
class CudaScope {
 public:
  explicit CudaScope(const torch::stable::Tensor& on);
  cudaStream_t stream() const { return stream_; }

  // Device memory that lives until the tensor goes; PyTorch's allocator orders its reuse on the stream.
  torch::stable::Tensor workspace(const torch::stable::Tensor& like, int64_t bytes) const;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Throws with the kernel's name unless all is well.
void check_cuda(cudaError_t status, const char* what);

// Throws unless all tensors are on one device.
void check_one_device(const std::vector<torch::stable::Tensor>& tensors, int32_t device, const char* what);

}  // namespace pyprune
