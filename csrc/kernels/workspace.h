// One host buffer that becomes one device buffer: tables of descriptors with pointers to each other, sent together.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace pyprune {

class Table {
 public:
  explicit Table(void* device) : device_(static_cast<char*>(device)) {}

  // Appends the values; returns where they will be on the device.
  template <class T>
  T* append(const std::vector<T>& values) {
    const size_t offset = aligned(bytes_.size());
    bytes_.resize(offset + values.size() * sizeof(T));
    if (!values.empty()) std::memcpy(bytes_.data() + offset, values.data(), values.size() * sizeof(T));
    return reinterpret_cast<T*>(device_ + offset);
  }

  // Device bytes that the table needs, a multiple of 256.
  int64_t size() const { return static_cast<int64_t>((bytes_.size() + 255) / 256 * 256); }

  // To the device, whose size() bytes begin at a multiple of 16. The table may go when the call returns. A small one,
  // and any that a graph captures, travels in arguments of launches, which a graph keeps; a larger one is copied from
  // pageable memory, which has been read by then, and a long one from page-locked memory of this library's own.
  cudaError_t send(cudaStream_t stream) const { return send_to(device_, stream); }

  // The same for a table that was begun before its place was known, at null: its addresses are offsets.
  cudaError_t send_to(void* device, cudaStream_t stream) const;

  // As it is on the host.
  char* bytes() { return bytes_.data(); }

 private:
  static size_t aligned(size_t n) { return (n + 15) / 16 * 16; }
  char* device_;
  std::vector<char> bytes_;
};

}  // namespace pyprune
