// Descriptions of tensors: the driver's function that encodes them, and what it takes.

#include "tensor_map.h"

#include <stdlib.h>
#include <string.h>

namespace pyprune {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Through the runtime, so that nothing links against the driver's library and the package loads where there is none.
Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status{};
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
  if (error != cudaSuccess || status != cudaDriverEntryPointSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return reinterpret_cast<Encode>(found);
}

Encode encode() {
  static const Encode found = find_encode();
  return found;
}

int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, name, device) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return value;
}

}  // namespace

bool map_tensor(const MappedTensor& t, TensorMap& map) {
  // Coordinates are 32-bit, and walks end behind the tensor: one step of tokens, or less than one tile of channels.
  constexpr int64_t kElement = 2, kMostStride = int64_t{1} << 40, kMostSize = (int64_t{1} << 31) - 256;
  // The stride of a dimension of one entry is never used, and may be anything.
  const int64_t token = (t.tokens > 1 ? t.at.row_stride : (t.channels + 7) / 8 * 8) * kElement;
  const int64_t batch = t.batches > 1 ? t.at.batch_stride * kElement : token * t.tokens;
  const bool walkable = token > 0 && batch >= token && token % 16 == 0 && batch % 16 == 0 && token < kMostStride &&
                        batch < kMostStride && reinterpret_cast<uintptr_t>(t.at.data) % 16 == 0;
  const bool counted = t.channels < kMostSize && t.tokens < kMostSize && t.batches < kMostSize;
  if (!walkable || !counted || encode() == nullptr) return false;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(t.channels), static_cast<cuuint64_t>(t.tokens),
                               static_cast<cuuint64_t>(t.batches)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(token), static_cast<cuuint64_t>(batch)};
  const cuuint32_t box[3] = {kBoxBytes / kElement, kBoxTokens, 1}, ones[3] = {1, 1, 1};
  const CUtensorMapDataType type =
      t.dtype == Dtype::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode()(&map, type, 3, const_cast<void*>(t.at.data), sizes, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool wgmma_available() {
#ifdef PYPRUNE_COMPILED_FOR_90A
  static const bool wanted = [] {
    const auto is = [](const char* name, const char* value) {
      const char* said = getenv(name);
      return said != nullptr && strcmp(said, value) == 0;
    };
    // With the second one the driver takes the PTX, which is another processor's.
    return !is("PYPRUNE_WGMMA", "0") && !is("CUDA_FORCE_PTX_JIT", "1");
  }();
  return wanted && attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         attribute(cudaDevAttrComputeCapabilityMinor) == 0 && encode() != nullptr;
#else
  return false;
#endif
}

int multiprocessors() {
  return attribute(cudaDevAttrMultiProcessorCount);
}

}  // namespace pyprune
