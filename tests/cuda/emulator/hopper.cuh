// In place of csrc/kernels/hopper.cuh: the same functions, by what the PTX ISA documents of mbarrier objects, bulk
// copies of tensors and wgmma. A copy lands as soon as it is asked for; products are formed at the wait that covers
// them, from what shared memory holds by then.
#pragma once

#include <deque>
#include <vector>

#include "tensor_core.cuh"
#include "tensor_map.h"

#define PYPRUNE_WGMMA
#define PYPRUNE_PAIRS

namespace pyprune {

struct Barrier {
  uint8_t arrivals, missing, parity;
  int32_t bytes;

  void settle() {
    if (missing == 0 && bytes == 0) {
      missing = arrivals;
      parity ^= 1;
    }
  }
  void arrive() {
    if (missing-- == 0) emulator::give_up();
    settle();
  }
};
static_assert(sizeof(Barrier) == 8, "as on a GPU");

}  // namespace pyprune

namespace emulator {

struct PanelProduct {
  float* c;
  int cols;
  uint64_t a, b;
  bool add;
  float (*element)(const char* at);
};
struct Products {
  std::vector<PanelProduct> open;
  std::deque<std::vector<PanelProduct>> closed;
};
Products& products();  // of this thread

// The same place in the shared memory of block `to`.
template <class T>
T* place_in(T* mine, unsigned to) {
  return reinterpret_cast<T*>(shared_memory[to].before + pyprune::shared_address(mine));
}

// Where 128-byte swizzling puts what would be at an address: 16-byte words exchanged by the number of their line.
inline uint32_t swizzled(uint32_t address) {
  return address ^ (address >> 7 & 7) << 4;
}

inline void land(void* to, const CUtensorMap* map, int channel, int token, int batch, pyprune::Barrier* barrier,
                 unsigned block) {
  const uint32_t start = pyprune::shared_address(to);
  if (start % 128 != 0) emulator::give_up();
  char* const memory = shared_memory[block].before;
  const auto inside = [](int64_t at, uint64_t size) { return at >= 0 && static_cast<uint64_t>(at) < size; };
  for (uint32_t t = 0; t < map->box[1]; ++t) {
    for (uint32_t c = 0; c < map->box[0]; ++c) {
      const int64_t from[3] = {int64_t{channel} + c, int64_t{token} + t, batch};
      uint16_t x = 0;
      if (inside(from[0], map->sizes[0]) && inside(from[1], map->sizes[1]) && inside(from[2], map->sizes[2])) {
        std::memcpy(&x, map->data + from[0] * 2 + from[1] * map->strides[1] + from[2] * map->strides[2], 2);
      }
      std::memcpy(memory + swizzled(start + t * map->box[0] * 2 + c * 2), &x, 2);
    }
  }
  pyprune::Barrier* const theirs = place_in(barrier, block);
  theirs->bytes -= static_cast<int32_t>(map->box[0] * map->box[1] * 2);
  theirs->settle();
}

// Element (channel, token) of an operand, by the canonical layout of MN-major operands with 128-byte swizzling.
struct Operand {
  uint32_t start, leading, stride;

  explicit Operand(uint64_t bits)
      : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1 || (bits >> 49 & 7) != 0 || start % 1024 != 0) emulator::give_up();
  }
  const char* at(int channel, int token) const {
    const uint32_t offset = channel % 64 * 2 + channel / 64 * leading + token % 8 * 128 + token / 8 * stride;
    return shared_memory[rank].before + swizzled(start + offset);
  }
};

inline void multiply(const PanelProduct& p) {
  const Operand a(p.a), b(p.b);
  const int lane = thread.x % 32, warp = thread.x / 32 % 4;
  float rows[2][16];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 16; ++k) rows[half][k] = p.element(a.at(warp * 16 + lane / 4 + half * 8, k));
  }
  for (int j = 0; j < p.cols / 8; ++j) {
    for (int e = 0; e < 2; ++e) {
      double sums[2] = {0.0, 0.0};
      for (int k = 0; k < 16; ++k) {
        const double y = p.element(b.at(j * 8 + lane % 4 * 2 + e, k));
        sums[0] += rows[0][k] * y, sums[1] += rows[1][k] * y;
      }
      for (int half = 0; half < 2; ++half) {
        float& c = p.c[4 * j + 2 * half + e];
        c = static_cast<float>((p.add ? c : 0.0f) + sums[half]);
      }
    }
  }
}

template <class T>
float element_at(const char* at) {
  T x;
  std::memcpy(&x, at, 2);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(x);
  } else {
    return __half2float(x);
  }
}

}  // namespace emulator

namespace pyprune {

inline void init_barrier(Barrier* barrier, int arrivals) {
  *barrier = {static_cast<uint8_t>(arrivals), static_cast<uint8_t>(arrivals), 0, 0};
}
inline void publish_barriers() {}
inline void expect_bytes(Barrier* barrier, uint32_t bytes) {
  barrier->bytes += static_cast<int32_t>(bytes);
  barrier->arrive();
}
inline void arrive_at(Barrier* barrier, uint32_t rank) {
  emulator::place_in(barrier, rank)->arrive();
}
inline void wait_phase(Barrier* barrier, uint32_t parity) {
  emulator::wait_until([=] { return barrier->parity != parity; });
}
inline uint32_t pair_rank() {
  return emulator::rank;
}
inline void meet_pair() {
  emulator::pair_barrier();
}
inline void done_reading() {}
inline void await_go(int number) {
  emulator::group_barrier(number, 256);
}
inline void tell_go(int number) {
  emulator::group_arrival(number, 256);
}
inline void meet_group(int number) {
  emulator::group_barrier(number, 128);
}
template <int COUNT>
void give_registers() {}
template <int COUNT>
void take_registers() {}
inline void fetch_map(const TensorMap*) {}
inline void copy_box(void* to, const TensorMap* map, int channel, int token, int batch, Barrier* barrier) {
  emulator::land(to, map, channel, token, batch, barrier, emulator::rank);
}
inline void copy_box_to_pair(void* to, const TensorMap* map, int channel, int token, int batch, Barrier* barrier) {
  for (unsigned block : {0, 1}) emulator::land(to, map, channel, token, batch, barrier, block);
}
template <int COUNT>
void hold_sums(float (&)[COUNT]) {}
template <int COUNT>
void begin_products(float (&)[COUNT]) {}
inline void commit_products() {
  emulator::products().closed.push_back(std::move(emulator::products().open));
  emulator::products().open.clear();
}
template <int PENDING>
void wait_products() {
  auto& closed = emulator::products().closed;
  for (; closed.size() > PENDING; closed.pop_front()) {
    for (const emulator::PanelProduct& product : closed.front()) emulator::multiply(product);
  }
}
template <int COUNT, class T>
void multiply_panels(float (&c)[COUNT], uint64_t a, uint64_t b, bool add, T) {
  emulator::products().open.push_back({c, 2 * COUNT, a, b, add, emulator::element_at<T>});
}

}  // namespace pyprune
