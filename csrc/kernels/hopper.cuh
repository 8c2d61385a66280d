// Instructions of compute capability 9.0 beyond those of tensor_core.cuh: copies of blocks in hardware, barriers in
// shared memory that count them, pairs of blocks that read each other's, and the matrix products of four warps.
//
// A panel is what those products read: 64 channels of some tokens, 128 bytes a token, in which a copy has exchanged the
// 16-byte words of token t by t % 8 (its position XOR t % 8). Panels start at multiples of 1,024 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "tensor_core.cuh"
#include "tensor_map.h"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define PYPRUNE_WGMMA
#endif

// A kernel whose blocks run in pairs; other processors compile it, and never run it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define PYPRUNE_PAIRS
#else
#define PYPRUNE_PAIRS __cluster_dims__(2, 1, 1)
#endif

namespace pyprune {

// In shared memory: waits for a number of arrivals and for bytes that copies bring, phase after phase.
struct Barrier {
  uint64_t word;
};

__device__ inline void init_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// After all of a thread's init_barrier and before the pair meets: both blocks and the copies see them.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

// Arrives, and says how many bytes the phase is to wait for.
__device__ inline void expect_bytes(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Arrives at the same barrier of block `rank` of the pair.
__device__ inline void arrive_at(Barrier* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Waits until the phase of this parity is over; that of parity 1 is over before the first one has begun.
__device__ inline void wait_phase(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Which of the two blocks of a pair this is.
__device__ inline uint32_t pair_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

// All threads of both blocks; what was written before is seen behind it.
__device__ inline void meet_pair() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

// What this thread has read of shared memory is read before copies bring anything else there: to be called before the
// arrival that lets them.
__device__ inline void done_reading() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// The 128 threads that share a number from 1 on.
__device__ inline void meet_group(int number) {
  asm volatile("bar.sync %0, 128;\n" ::"r"(number) : "memory");
}

// Half of 256 threads that share a number waits until all of the other half has told that it may go on.
__device__ inline void await_go(int number) {
  asm volatile("bar.sync %0, 256;\n" ::"r"(number) : "memory");
}
__device__ inline void tell_go(int number) {
  asm volatile("bar.arrive %0, 256;\n" ::"r"(number) : "memory");
}

// Hands registers of this warp's share to others, or takes them: COUNT a thread from now on. All warps of a group of
// four.
template <int COUNT>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(COUNT));
}
template <int COUNT>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(COUNT));
}

__device__ inline void fetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// The box at (channel, token, batch), to shared memory; `barrier` counts its bytes, those outside of the tensor too.
__device__ inline void copy_box(void* to, const TensorMap* map, int channel, int token, int batch, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];\n" ::
          "r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(channel), "r"(token), "r"(batch)
      : "memory");
}

// The same to both blocks of the pair, each of which counts it at its own barrier.
__device__ inline void copy_box_to_pair(void* to, const TensorMap* map, int channel, int token, int batch,
                                        Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4, %5}], [%2], %6;\n" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(channel), "r"(token), "r"(batch), "h"(static_cast<uint16_t>(3))
      : "memory");
}

// Sums change hands between a thread's own code and the products that run beside it: no use of one moves across.
template <int COUNT>
__device__ inline void hold_sums(float (&c)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(c[i])::"memory");
}
template <int COUNT>
__device__ inline void begin_products(float (&c)[COUNT]) {
  hold_sums(c);
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Until at most PENDING of the committed groups are on their way; sums are read after the last one only.
template <int PENDING>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory");
}

// c [64, N] of four warps = (add ? c : 0) + a^T b over 16 tokens, a [16, 64] and b [16, N] panels in shared memory. Of
// row 16 * (warp % 4) + lane / 4 a thread has columns 8 j + lane % 4 * 2 + {0, 1} in c[4 j] and c[4 j + 1], of the row
// eight further down in c[4 j + 2] and c[4 j + 3].
#define PYPRUNE_4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define PYPRUNE_16(i) PYPRUNE_4(i), PYPRUNE_4(i + 4), PYPRUNE_4(i + 8), PYPRUNE_4(i + 12)
#define PYPRUNE_64(i) PYPRUNE_16(i), PYPRUNE_16(i + 16), PYPRUNE_16(i + 32), PYPRUNE_16(i + 48)
#define PYPRUNE_SUMS_128                                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
  "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PYPRUNE_SUMS_192                                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
  "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, " \
  "%65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
  "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define PYPRUNE_SUMS_256                                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
  "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, " \
  "%65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
  "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, "      \
  "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, "    \
  "%122, %123, %124, %125, %126, %127"
#define PYPRUNE_MULTIPLY(n, type, a_at, b_at, add_at, ...)                                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add_at                                            \
               ", 0;\n"                                                                              \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" PYPRUNE_SUMS_##n \
               "}, " a_at ", " b_at ", p, 1, 1, 1, 1;\n}\n"                                          \
               : __VA_ARGS__                                                                         \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)))
#define PYPRUNE_PRODUCTS(type, name)                                                                 \
  __device__ inline void multiply_panels(float(&c)[64], uint64_t a, uint64_t b, bool add, type) {    \
    PYPRUNE_MULTIPLY(128, name, "%64", "%65", "%66", PYPRUNE_64(0));                                 \
  }                                                                                                  \
  __device__ inline void multiply_panels(float(&c)[96], uint64_t a, uint64_t b, bool add, type) {    \
    PYPRUNE_MULTIPLY(192, name, "%96", "%97", "%98", PYPRUNE_64(0), PYPRUNE_16(64), PYPRUNE_16(80)); \
  }                                                                                                  \
  __device__ inline void multiply_panels(float(&c)[128], uint64_t a, uint64_t b, bool add, type) {   \
    PYPRUNE_MULTIPLY(256, name, "%128", "%129", "%130", PYPRUNE_64(0), PYPRUNE_64(64));              \
  }
PYPRUNE_PRODUCTS(__nv_bfloat16, "bf16")
PYPRUNE_PRODUCTS(__half, "f16")
#undef PYPRUNE_PRODUCTS
#undef PYPRUNE_MULTIPLY
#undef PYPRUNE_SUMS_128
#undef PYPRUNE_SUMS_192
#undef PYPRUNE_SUMS_256
#undef PYPRUNE_64
#undef PYPRUNE_16
#undef PYPRUNE_4

}  // namespace pyprune
