// Salience from 16-bit activations on compute capability 9.0: as activation_tile.cuh, but fed by copies in hardware.
//
// Tile     a pair of blocks owns 256 x COLS elements of the weight, each 128 x COLS, and walks all samples, 64 tokens a
//          step. A step's panels (hopper.cuh) wait in a ring of STAGES in shared memory; of the columns' panels each
//          block copies one half to both, which takes a third off what the second-level cache gives.
// Thread   four warps own 64 x COLS, of which a thread has COLS / 2 numbers a set: one, two or three sets. Another four
//          have the rows below. A third group of four copies, by one thread, and hands its registers to these two.
// Blocks   as many as run at once, tile after tile: the copies of the next tile begin before this one's sums are done.
// Weight   comes through the same ring behind the last sample, 64 rows a step: zeros beyond the edge, and no waiting.
// Sums     a row's by butterflies over the four lanes that share it; a column's over eight lanes, then over the four
//          warps through shared memory: partial sums [col tiles, rows] and [rows / 64, cols].
// Bytes    the weight once, the inputs once a row or column of pairs, partial sums.
// Floor    2 * rows * cols * tokens operations over the rate of the tensor cores.
#pragma once

#include "activation_wgmma.h"
#include "device.cuh"
#include "hopper.cuh"

namespace pyprune {

constexpr int kGroupThreads = 128, kGroups = 2;  // that multiply; a third one copies
static_assert(kGroupRows * kGroups == kBlockRows, "whole groups");
constexpr int kStepTokens = 2 * kBoxTokens;
constexpr int kPanelCols = kBoxBytes / 2, kPanelBytes = kStepTokens * kBoxBytes, kHalfPanel = kPanelBytes / 2;

template <int COLS>
struct Ring {
  static constexpr int PANELS = COLS / kPanelCols;  // of the columns
  static constexpr int STAGE_BYTES = (kGroups + PANELS) * kPanelBytes;
  static constexpr int STAGES = 200 * 1024 / STAGE_BYTES;
  static constexpr int BARRIERS = STAGES * STAGE_BYTES,
                       SCRATCH = BARRIERS + 2 * STAGES * static_cast<int>(sizeof(Barrier));
  static constexpr int BYTES = SCRATCH + kGroups * 4 * COLS * static_cast<int>(sizeof(float)) + 1024;  // to align
  static_assert(BYTES <= 227 * 1024, "fits");
  static_assert(SCRATCH % 16 == 0, "aligned");

  int stage = 0;
  uint32_t phase = 0;

  __device__ void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

// How a product finds its operand: 64 channels from `panel` on, and each further 64 `next_panel` bytes on; 16 tokens of
// them in two groups of eight, 1,024 bytes apart. Bits by "Matrix Descriptor Format" of the PTX ISA, in 16-byte words:
// 0-13 address, 16-29 leading offset (between panels), 32-45 stride (between groups), 62-63 layout (1: 128 bytes).
__device__ inline uint64_t describe_panels(const void* panel, int next_panel) {
  const auto words = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return words(shared_address(panel)) | words(static_cast<uint32_t>(next_panel)) << 16 | words(1024) << 32 |
         uint64_t{1} << 62;
}
constexpr uint64_t kNext16Tokens = 16 * 128 / 16;  // to be added to a description

// A block's shared memory.
template <int COLS>
struct Shared {
  char* bytes;

  __device__ Shared() {
    char* const raw = dynamic_shared();
    bytes = raw + (1024 - shared_address(raw) % 1024) % 1024;
  }
  __device__ char* stage(int i) const { return bytes + i * Ring<COLS>::STAGE_BYTES; }
  __device__ char* cols(int i) const { return stage(i) + kGroups * kPanelBytes; }
  __device__ Barrier* full(int i) const { return reinterpret_cast<Barrier*>(bytes + Ring<COLS>::BARRIERS) + i; }
  __device__ Barrier* empty(int i) const { return full(Ring<COLS>::STAGES + i); }
  __device__ float* scratch(int group) const {
    return reinterpret_cast<float*>(bytes + Ring<COLS>::SCRATCH) + group * 4 * COLS;
  }
};

// Tiles in the order in which pairs take them: all columns of eight pairs of row tiles, then of the next eight, so that
// what runs together reads about as much of the one input as of the other.
struct Place {
  int pair, col_tile;

  __device__ Place(const WgmmaJob& job, int tile) {
    constexpr int kTogether = 8;
    const int first = tile / (kTogether * job.col_tiles) * kTogether, rest = tile - first * job.col_tiles;
    const int count = job.pairs - first < kTogether ? job.pairs - first : kTogether;
    pair = first + rest % count;
    col_tile = rest / count;
  }
};

// The one thread of a block that copies.
template <int COLS>
__device__ inline void copy_tiles(const WgmmaJob& job, const Shared<COLS>& shared, int rank, int first, int step) {
  using R = Ring<COLS>;
  R ring;
  const auto begin = [&](int bytes) {
    wait_phase(shared.empty(ring.stage), ring.phase ^ 1);
    expect_bytes(shared.full(ring.stage), static_cast<uint32_t>(bytes));
    return shared.full(ring.stage);
  };
  for (int tile = first; tile < job.pairs * job.col_tiles; tile += step) {
    const Place place(job, tile);
    const int row = (place.pair * 2 + rank) * kBlockRows, col = place.col_tile * COLS;
    for (int batch = 0; batch < job.batches; ++batch) {
      for (int token = 0; token < job.tokens; token += kStepTokens) {
        Barrier* const full = begin(R::STAGE_BYTES);
        char* const to = shared.stage(ring.stage);
#pragma unroll
        for (int i = 0; i < 2 * kGroups; ++i) {
          copy_box(to + i * kHalfPanel, &job.rows_map, row + i / 2 * kPanelCols, token + i % 2 * kBoxTokens, batch,
                   full);
        }
#pragma unroll
        for (int i = 0; i < R::PANELS; ++i) {
          copy_box_to_pair(shared.cols(ring.stage) + i * kPanelBytes + rank * kHalfPanel, &job.cols_map,
                           col + i * kPanelCols, token + rank * kBoxTokens, batch, full);
        }
        ring.next();
      }
    }
    for (int group = 0; group < kGroups; ++group) {
      Barrier* const full = begin(R::PANELS * kPanelBytes);
#pragma unroll
      for (int i = 0; i < 2 * R::PANELS; ++i) {
        copy_box(shared.stage(ring.stage) + i * kHalfPanel, &job.weight_map, col + i / 2 * kPanelCols,
                 row + group * kGroupRows + i % 2 * kBoxTokens, 0, full);
      }
      ring.next();
    }
  }
}

// Two neighbouring elements of a panel.
__device__ inline float2 widen_pair(const void* at, __nv_bfloat16) {
  const uint32_t both = *static_cast<const uint32_t*>(at);
  return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
}
__device__ inline float2 widen_pair(const void* at, __half) {
  const __half* const both = static_cast<const __half*>(at);
  return make_float2(widen(both[0]), widen(both[1]));
}

// Of 2 * HALF numbers the lane keeps one half and hands the other one on to lane ^ PARTNER, whose share joins its own.
// Returns where the half that it keeps began.
template <int HALF, int PARTNER, int COUNT>
__device__ inline int halve_sums(float (&x)[COUNT]) {
  const bool upper = (threadIdx.x & PARTNER) != 0;
#pragma unroll
  for (int i = 0; i < HALF; ++i) {
    const float mine = upper ? x[i + HALF] : x[i], theirs = upper ? x[i] : x[i + HALF];
    x[i] = mine + __shfl_xor_sync(0xffffffffu, theirs, PARTNER);
  }
  return upper ? HALF : 0;
}

// Sums of COUNT numbers over the eight lanes l, l ^ 4, l ^ 8, ...: the lane is left with those of numbers first ..
// first + COUNT / 8 - 1 in x[0 ..]. Returns first.
template <int COUNT>
__device__ inline int scatter_sums(float (&x)[COUNT]) {
  int first = halve_sums<COUNT / 2, 16>(x);
  first += halve_sums<COUNT / 4, 8>(x);
  return first + halve_sums<COUNT / 8, 4>(x);
}

// One of the groups that multiply.
template <class F, class T, int COLS>
class Group {
 public:
  __device__ Group(const WgmmaJob& job, const Shared<COLS>& shared, int rank)
      : job_(job),
        shared_(shared),
        rank_(rank),
        group_(threadIdx.x / kGroupThreads),
        warp_(threadIdx.x % kGroupThreads / 32),
        lane_(threadIdx.x % 32) {}

  // One group begins some steps later and stays behind: its products then fill the time in which the other one's are
  // done and their sums are formed.
  __device__ void tiles(int first, int step) {
    if (group_ == 1) await_go(kGo);
    for (int tile = first; tile < job_.pairs * job_.col_tiles; tile += step) {
      multiply();
      const Place place(job_, tile);
      finish(place.pair * 2 + rank_, place.col_tile);
    }
  }

 private:
  static constexpr int COUNT = COLS / 2;  // numbers of a set
  static constexpr bool KEEP_SUM = F::grad && F::curvature;
  static constexpr int kGo = 3;    // the barrier's number
  static constexpr int kLead = 2;  // steps
  static_assert(Ring<COLS>::STAGES > kLead + 1, "no stage that the leading group waits for is held by the other");

  // This warp has done with a stage: both blocks copy to it.
  __device__ void release(int stage) {
    __syncwarp();
    if (lane_ < 2) arrive_at(shared_.empty(stage), static_cast<uint32_t>(lane_));
  }

  // A stage that is of no use here. Its bytes are waited for all the same, or a warp might arrive a phase early.
  __device__ void pass_by() {
    wait_phase(shared_.full(ring_.stage), ring_.phase);
    release(ring_.stage);
    ring_.next();
  }

  // The gradient of the tile, and its squares.
  __device__ void multiply() {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if constexpr (F::curvature) squares_[i] = 0.0f;
      if constexpr (KEEP_SUM) sum_[i] = 0.0f;
    }
    int before = -1;  // the stage that products on their way may still read
    for (int batch = 0; batch < job_.batches; ++batch) {
      bool add = !F::curvature && batch > 0;
      for (int token = 0; token < job_.tokens; token += kStepTokens) {
        wait_phase(shared_.full(ring_.stage), ring_.phase);
        const uint64_t a = describe_panels(shared_.stage(ring_.stage) + group_ * kPanelBytes, kPanelBytes);
        const uint64_t b = describe_panels(shared_.cols(ring_.stage), kPanelBytes);
        begin_products(acc_);
#pragma unroll
        for (int k = 0; k < kStepTokens / 16; ++k) {
          multiply_panels(acc_, a + k * kNext16Tokens, b + k * kNext16Tokens, add, T{});
          add = true;
        }
        commit_products();
        if (group_ == 0 && lead_ < kLead && ++lead_ == kLead) tell_go(kGo);
        if (before >= 0) {
          wait_products<1>();
          release(before);
        }
        before = ring_.stage;
        ring_.next();
      }
      if constexpr (F::curvature) {  // the sample's gradient is complete
        await_products(before);
        before = -1;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
          squares_[i] = fmaf(acc_[i], acc_[i], squares_[i]);
          if constexpr (KEEP_SUM) sum_[i] += acc_[i];
        }
      }
    }
    if constexpr (!F::curvature) await_products(before);
    if (group_ == 0 && lead_ < kLead) {  // a tile of fewer steps
      lead_ = kLead;
      tell_go(kGo);
    }
  }

  __device__ void await_products(int stage) {
    wait_products<0>();
    hold_sums(acc_);
    release(stage);
  }

  // Beyond the edge an infinite input has met zeros, which is NaN and would join the sums of what lies inside.
  __device__ void clear_outside(int64_t rows_left, int64_t cols_left) {
    const int rows = static_cast<int>(rows_left < kGroupRows ? rows_left : kGroupRows) - warp_ * 16 - lane_ / 4;
    const int cols = static_cast<int>(cols_left < COLS ? cols_left : COLS) - lane_ % 4 * 2;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (i / 2 % 2 * 8 < rows && i / 4 * 8 + i % 2 < cols) continue;
      if constexpr (F::curvature) {
        squares_[i] = 0.0f;
      } else {
        acc_[i] = 0.0f;
      }
      if constexpr (KEEP_SUM) sum_[i] = 0.0f;
    }
  }

  __device__ float salience(float w, int i) const {
    float g = 0.0f, h = 0.0f;
    if constexpr (KEEP_SUM) {
      g = job_.gradient_scale * sum_[i];
    } else if constexpr (F::grad) {
      g = job_.gradient_scale * acc_[i];
    }
    if constexpr (F::curvature) h = job_.curvature_scale * squares_[i];
    return F::at(w, g, h);
  }

  // The criterion over the tile, and its sums.
  __device__ void finish(int row_tile, int col_tile) {
    const int64_t first = static_cast<int64_t>(row_tile) * kBlockRows + group_ * kGroupRows;
    const int64_t first_col = static_cast<int64_t>(col_tile) * COLS;
    if (first + kGroupRows > job_.rows || first_col + COLS > job_.cols)
      clear_outside(job_.rows - first, job_.cols - first_col);
    float rows[2] = {0.0f, 0.0f}, cols[COUNT / 2];
    if (group_ == 1) pass_by();  // the other group's rows of the weight
    wait_phase(shared_.full(ring_.stage), ring_.phase);
    const char* const line = shared_.stage(ring_.stage) + (warp_ * 16 + lane_ / 4) * kBoxBytes + lane_ % 4 * 4;
#pragma unroll
    for (int j = 0; j < COLS / 8; ++j) {
      const char* const at = line + j / 8 * kPanelBytes + (j % 8 ^ lane_ / 4) * 16;
      const float2 upper = widen_pair(at, T{}), lower = widen_pair(at + 8 * kBoxBytes, T{});
      const float a = salience(upper.x, 4 * j), b = salience(upper.y, 4 * j + 1);
      const float c = salience(lower.x, 4 * j + 2), d = salience(lower.y, 4 * j + 3);
      rows[0] += a + b, rows[1] += c + d;
      cols[2 * j] = a + c, cols[2 * j + 1] = b + d;
    }
    done_reading();
    release(ring_.stage);
    ring_.next();
    if (group_ == 0) pass_by();

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first + warp_ * 16 + half * 8 + lane_ / 4;
      const float total = quad_sum(rows[half]);
      if (lane_ % 4 == 0 && row < job_.rows) job_.row_parts[col_tile * job_.rows + row] = total;
    }
    float* const scratch = shared_.scratch(group_);  // [4 warps, COLS]
    const int number = scatter_sums(cols);
#pragma unroll
    for (int i = 0; i < COUNT / 16; ++i) {
      scratch[warp_ * COLS + (number + i) / 2 * 8 + lane_ % 4 * 2 + (number + i) % 2] = cols[i];
    }
    meet_group(1 + group_);
    for (int c = threadIdx.x % kGroupThreads; c < COLS; c += kGroupThreads) {
      const int64_t col = first_col + c;
      const float total = ((scratch[c] + scratch[COLS + c]) + scratch[2 * COLS + c]) + scratch[3 * COLS + c];
      if (first < job_.rows && col < job_.cols) job_.col_parts[first / kGroupRows * job_.cols + col] = total;
    }
    meet_group(1 + group_);  // before the next tile's sums take their place
  }

  const WgmmaJob& job_;
  const Shared<COLS>& shared_;
  const int rank_, group_, warp_, lane_;
  Ring<COLS> ring_;
  int lead_ = 0;
  float acc_[COUNT];
  float squares_[F::curvature ? COUNT : 1], sum_[KEEP_SUM ? COUNT : 1];
};

// grid: pairs of blocks, at most as many as there are pairs of tiles.
template <class F, class T, int COLS>
__global__ void PYPRUNE_PAIRS __launch_bounds__((kGroups + 1) * kGroupThreads, 1)
    activation_pairs(const __grid_constant__ WgmmaJob job) {
#ifdef PYPRUNE_WGMMA
  const Shared<COLS> shared;
  const int rank = static_cast<int>(pair_rank()), first = blockIdx.x / 2, step = gridDim.x / 2;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Ring<COLS>::STAGES; ++i) {
      init_barrier(shared.full(i), 1);
      init_barrier(shared.empty(i), 2 * kGroups * 4);  // a warp each, of both blocks
    }
    publish_barriers();
  }
  meet_pair();
  if (threadIdx.x / kGroupThreads == kGroups) {
    give_registers<40>();
    if (threadIdx.x % kGroupThreads == 0) {
      fetch_map(&job.rows_map);
      fetch_map(&job.cols_map);
      fetch_map(&job.weight_map);
      copy_tiles<COLS>(job, shared, rank, first, step);
    }
    __syncwarp();
  } else {
    take_registers<232>();
    Group<F, T, COLS>(job, shared, rank).tiles(first, step);
  }
  meet_pair();  // neither block goes while the other may still write to it
#else
  __trap();  // compiled for another processor: never launched there
#endif
}

template <class F, class T>
cudaError_t launch_pairs(const WgmmaJob& job, cudaStream_t stream) {
  constexpr int COLS = block_cols(F::grad, F::curvature, false), kShared = Ring<COLS>::BYTES;
  const cudaError_t status =
      cudaFuncSetAttribute(activation_pairs<F, T, COLS>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (status != cudaSuccess) return status;
  const int tiles = job.pairs * job.col_tiles, at_once = multiprocessors() / 2;
  const unsigned grid = static_cast<unsigned>(2 * (tiles < at_once ? tiles : at_once));
  constexpr int kThreads = (kGroups + 1) * kGroupThreads;
  activation_pairs<F, T, COLS><<<grid, kThreads, kShared, stream>>>(job);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_pairs(Formula formula, const WgmmaJob& job, cudaStream_t stream) {
  switch (formula) {
    case Formula::taylor_signed:
      return launch_pairs<TaylorSignedFormula, T>(job, stream);
    case Formula::taylor_abs:
      return launch_pairs<TaylorAbsFormula, T>(job, stream);
    case Formula::fisher:
      return launch_pairs<FisherFormula, T>(job, stream);
    case Formula::mixed:
      return launch_pairs<MixedFormula, T>(job, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace pyprune
