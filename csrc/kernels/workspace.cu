// A table's way to the device.

#include "workspace.h"

#include <algorithm>
#include <map>
#include <mutex>

namespace pyprune {
namespace {

constexpr int kThreads = 256;
constexpr int kWords = 250;  // with their number and address less than the 4 KiB of arguments that every launch takes

struct Piece {
  uint4 words[kWords];
  int count;
};
static_assert(kWords <= kThreads, "a thread writes one word");

__global__ void __launch_bounds__(kThreads) put_piece(const __grid_constant__ Piece piece, uint4* to) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < piece.count) to[i] = piece.words[i];
}

// Up to so many bytes the driver takes a copy from pageable memory into its commands, and the call returns at once. A
// longer one waits on the host until the stream has come there, and then passes through the driver's own buffers: the
// 3 MB that cut a model of 7B would add a tenth to the time of the cut.
constexpr size_t kMostPageable = 1 << 16;

// Page-locked memory of one device, in which long tables wait for their stream while the host goes on. It lasts as
// long as the process: when that ends, the driver may be gone first.
class Staging {
 public:
  // False where there is none of it; nothing was sent then.
  bool send(void* device, const std::vector<char>& bytes, cudaStream_t stream, cudaError_t& status) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Slot& slot = slots_[next_++ % kSlots];
    if (!make_room(slot, bytes.size())) {
      cudaGetLastError();  // forgets it, or the launch behind would report it
      return false;
    }
    std::memcpy(slot.memory, bytes.data(), bytes.size());
    status = cudaMemcpyAsync(device, slot.memory, bytes.size(), cudaMemcpyHostToDevice, stream);
    if (status == cudaSuccess) status = cudaEventRecord(slot.sent, stream);
    return true;
  }

  // Of the current device.
  static Staging& here() {
    static std::mutex mutex;
    static std::map<int, Staging>& all = *new std::map<int, Staging>;
    int device = 0;
    cudaGetDevice(&device);
    const std::lock_guard<std::mutex> lock(mutex);
    return all[device];
  }

 private:
  struct Slot {
    void* memory = nullptr;
    size_t size = 0;
    cudaEvent_t sent = nullptr;
  };
  static constexpr unsigned kSlots = 4;  // tables on their way before the host waits for the first of them

  // Whether the slot, whose last table has left it, holds `bytes`.
  static bool make_room(Slot& slot, size_t bytes) {
    if (slot.sent == nullptr && cudaEventCreateWithFlags(&slot.sent, cudaEventDisableTiming) != cudaSuccess) {
      slot.sent = nullptr;
      return false;
    }
    if (cudaEventSynchronize(slot.sent) != cudaSuccess) return false;
    if (slot.size >= bytes) return true;
    if (slot.memory != nullptr) cudaFreeHost(slot.memory);
    slot.memory = nullptr, slot.size = 0;
    const size_t size = (bytes + kMostPageable - 1) / kMostPageable * kMostPageable;
    if (cudaHostAlloc(&slot.memory, size, cudaHostAllocDefault) != cudaSuccess) {
      slot.memory = nullptr;
      return false;
    }
    slot.size = size;
    return true;
  }

  std::mutex mutex_;
  Slot slots_[kSlots];
  unsigned next_ = 0;
};

}  // namespace

cudaError_t Table::send_to(void* device, cudaStream_t stream) const {
  if (bytes_.size() > sizeof(Piece::words)) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    const cudaError_t status = cudaStreamIsCapturing(stream, &capture);
    if (status != cudaSuccess) return status;
    if (capture == cudaStreamCaptureStatusNone) {
      cudaError_t sent = cudaSuccess;
      if (bytes_.size() > kMostPageable && Staging::here().send(device, bytes_, stream, sent)) return sent;
      return cudaMemcpyAsync(device, bytes_.data(), bytes_.size(), cudaMemcpyHostToDevice, stream);
    }
  }
  for (size_t at = 0; at < bytes_.size(); at += sizeof(Piece::words)) {
    const size_t here = std::min(sizeof(Piece::words), bytes_.size() - at);
    Piece piece{};
    piece.count = static_cast<int>((here + sizeof(uint4) - 1) / sizeof(uint4));
    std::memcpy(piece.words, bytes_.data() + at, here);
    put_piece<<<1, kThreads, 0, stream>>>(piece, reinterpret_cast<uint4*>(static_cast<char*>(device) + at));
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace pyprune
