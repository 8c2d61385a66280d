// In place of csrc/kernels/tensor_core.cuh: the same functions, by the register layouts that the PTX ISA documents
// (sections on ldmatrix, mma.m16n8k16 and mma.m16n8k8). An asynchronous copy lands at the wait that covers it.
#pragma once

#include <deque>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace emulator {

struct Copy {
  void* to;
  char bytes[16];
};
struct Groups {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> closed;
};
Groups& copies();  // of this thread

template <class T>
float element(uint32_t word, int half, float (*wide)(T)) {
  T x;
  const uint16_t bits = static_cast<uint16_t>(word >> (16 * half));
  std::memcpy(&x, &bits, 2);
  return wide(x);
}

struct Product {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

// c[row][col] += sum over k of a(row, k) * b(k, col), where c[row][col] is in lane row % 8 * 4 + col / 2.
template <class A, class B>
void multiply(void* const (&lanes)[32], int depth, A a, B b) {
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < 8; ++col) {
      double sum = 0.0;
      for (int k = 0; k < depth; ++k) sum += static_cast<double>(a(row, k)) * static_cast<double>(b(k, col));
      float& c = static_cast<Product*>(lanes[row % 8 * 4 + col / 2])->c[row / 8 * 2 + col % 2];
      c = static_cast<float>(c + sum);
    }
  }
}

template <class T>
void multiply16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*wide)(T)) {
  Product mine{c, a, b};
  together(&mine, [&](void* const(&lanes)[32]) {
    multiply(
        lanes, 16,
        [&](int row, int k) {
          const Product* lane = static_cast<Product*>(lanes[row % 8 * 4 + k % 8 / 2]);
          return element<T>(lane->a[row / 8 + k / 8 * 2], k % 2, wide);
        },
        [&](int k, int col) {
          const Product* lane = static_cast<Product*>(lanes[col * 4 + k % 8 / 2]);
          return element<T>(lane->b[k / 8], k % 2, wide);
        });
  });
}

}  // namespace emulator

namespace pyprune {

inline char* dynamic_shared() {
  return emulator::shared_memory[emulator::rank].bytes;
}
inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(static_cast<const char*>(at) - emulator::shared_memory[emulator::rank].before);
}

inline void copy16_async(void* to, const void* from, int bytes) {
  emulator::Copy copy{to, {}};
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) emulator::give_up();
  std::memcpy(copy.bytes, from, static_cast<size_t>(bytes));
  emulator::copies().open.push_back(copy);
}
inline void copy16_async(void* to, const void* from) {
  copy16_async(to, from, 16);
}
inline void fetch_ahead(const void*) {}
inline void commit_copies() {
  emulator::copies().closed.push_back(std::move(emulator::copies().open));
  emulator::copies().open.clear();
}
template <int PENDING>
void wait_copies() {
  auto& closed = emulator::copies().closed;
  for (; closed.size() > PENDING; closed.pop_front()) {
    for (const emulator::Copy& copy : closed.front()) std::memcpy(copy.to, copy.bytes, 16);
  }
}

inline void load_transposed(uint32_t (&to)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulator::give_up();
  struct Lane {
    uint32_t* to;
    const uint16_t* row;
  } mine{to, static_cast<const uint16_t*>(row)};
  emulator::together(&mine, [&](void* const(&lanes)[32]) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto at = [&](int r) -> uint32_t { return static_cast<Lane*>(lanes[matrix * 8 + r])->row[lane / 4]; };
        static_cast<Lane*>(lanes[lane])->to[matrix] = at(lane % 4 * 2) | at(lane % 4 * 2 + 1) << 16;
      }
    }
  });
}

inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  emulator::multiply16<__nv_bfloat16>(c, a, b, __bfloat162float);
}
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  emulator::multiply16<__half>(c, a, b, __half2float);
}
inline void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::Product mine{c, a, b};
  emulator::together(&mine, [&](void* const(&lanes)[32]) {
    emulator::multiply(
        lanes, 8,
        [&](int row, int k) {
          const auto* lane = static_cast<emulator::Product*>(lanes[row % 8 * 4 + k % 4]);
          return __uint_as_float(lane->a[row / 8 + k / 4 * 2] & 0xffffe000u);
        },
        [&](int k, int col) {
          const auto* lane = static_cast<emulator::Product*>(lanes[col * 4 + k % 4]);
          return __uint_as_float(lane->b[k / 4] & 0xffffe000u);
        });
  });
}
inline uint32_t round_to_tf32(float x) {  // to nearest, ties away from zero
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace pyprune
