// Salience from activations: tiles of the gradient are formed on the tensor cores and spent in registers.
//
// Tile     a block owns BLOCK_M x BLOCK_N elements of the weight and walks all samples and tokens, DEPTH tokens a step.
//          A step's slices of both inputs are copied to shared memory asynchronously, STAGES - 1 steps ahead.
// Thread   a warp owns WARP_M x WARP_N of the tile as 16 x 8 products: 4 numbers a thread and product. The criteria
//          that need squares of each sample's gradient hold a second or third such set, folded at the end of a sample.
// Sums     a thread's own columns, then 4 lanes of a row and 8 lanes of a column by butterflies, then the warps in
//          order through shared memory: partial sums [col tiles, rows] and [row tiles, cols].
// float32  every factor is split into two numbers of 11 bits, and three of the four products are taken: their error is
//          about 2^-22, as that of float32 itself, where plain TF32 would leave 2^-11.
// Bytes    the weight once, the inputs once a row or column of tiles (from the second-level cache), partial sums.
// Floor    2 * rows * cols * tokens operations over the rate of the tensor cores (three times that for float32).
#pragma once

#include "activation_job.cuh"
#include "device.cuh"
#include "tensor_core.cuh"

namespace pyprune {

template <int BLOCK_M_, int BLOCK_N_, int WARP_M_, int WARP_N_, int STAGES_>
struct TileShape {
  static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_, WARP_M = WARP_M_, WARP_N = WARP_N_, STAGES = STAGES_;
  static constexpr int WARPS_M = BLOCK_M / WARP_M, WARPS_N = BLOCK_N / WARP_N, THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int MT = WARP_M / 16, NT = WARP_N / 8;  // products of a warp
};

// As many sums as fit into 255 registers beside the fragments: one set of 128 numbers a thread, two of 96, or three of
// 64. float32 has 64 a set throughout, for its factors take twice the registers.
template <class F, class T, int COLS = block_cols(F::grad, F::curvature, sizeof(T) == 4)>
struct ShapeOf {
  using type = TileShape<kBlockRows, 128, 64, 32, 4>;
};
template <class F, class T>
struct ShapeOf<F, T, 192> {
  using type = TileShape<kBlockRows, 192, 64, 48, 4>;
};
template <class F, class T>
struct ShapeOf<F, T, 256> {
  using type = TileShape<kBlockRows, 256, 64, 64, 3>;
};

// Padding of a row in shared memory, in elements: the eight addresses of a fragment load fall on different banks.
constexpr int kPad = 8;

// How a warp multiplies DEPTH tokens of both slices, by type.
template <class T>
struct Multiply {
  static constexpr int DEPTH = 32;

  // Where a lane's elements of the first product are: added to `a` and `b` of a step.
  static __device__ int a_lane(int a_row) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
    return (matrix / 2 * 8 + row) * a_row + matrix % 2 * 8;
  }
  static __device__ int b_lane(int b_row) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
    return (matrix % 2 * 8 + row) * b_row + matrix / 2 * 8;
  }

  template <int MT, int NT>
  static __device__ void step(const T* a, int a_row, const T* b, int b_row, float (&c)[MT][NT][4]) {
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
      uint32_t fa[MT][4], fb[NT][2];
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        load_transposed(fa[i], a + k * a_row + i * 16);
      }
#pragma unroll
      for (int j = 0; j < NT; j += 2) {
        uint32_t both[4];
        load_transposed(both, b + k * b_row + j * 8);
        fb[j][0] = both[0], fb[j][1] = both[1];
        fb[j + 1][0] = both[2], fb[j + 1][1] = both[3];
      }
#pragma unroll
      for (int i = 0; i < MT; ++i) {
#pragma unroll
        for (int j = 0; j < NT; ++j) multiply_add(c[i][j], fa[i], fb[j], T{});
      }
    }
  }
};

template <>
struct Multiply<float> {
  static constexpr int DEPTH = 16;

  static __device__ int a_lane(int a_row) { return threadIdx.x % 4 * a_row + threadIdx.x % 32 / 4; }
  static __device__ int b_lane(int b_row) { return a_lane(b_row); }

  // x = big + small within 2^-22 of it.
  static __device__ void split(float x, uint32_t& big, uint32_t& small) {
    big = round_to_tf32(x);
    small = round_to_tf32(x - __uint_as_float(big));
  }

  template <int MT, int NT>
  static __device__ void step(const float* a, int a_row, const float* b, int b_row, float (&c)[MT][NT][4]) {
#pragma unroll
    for (int k = 0; k < DEPTH; k += 8) {
      uint32_t big_b[NT][2], small_b[NT][2];
#pragma unroll
      for (int j = 0; j < NT; ++j) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          split(b[(k + r * 4) * b_row + j * 8], big_b[j][r], small_b[j][r]);
        }
      }
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        uint32_t big_a[4], small_a[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          split(a[(k + r / 2 * 4) * a_row + i * 16 + r % 2 * 8], big_a[r], small_a[r]);
        }
#pragma unroll
        for (int j = 0; j < NT; ++j) {  // small products first
          multiply_add_tf32(c[i][j], small_a, big_b[j]);
          multiply_add_tf32(c[i][j], big_a, small_b[j]);
          multiply_add_tf32(c[i][j], big_a, big_b[j]);
        }
      }
    }
  }
};

// A thread's share of one factor's slices, step after step: COUNT words of one column, ROWS tokens apart. Addresses are
// worked out once and then moved on, which leaves the instruction slots of a step to the products.
template <class T, int WIDTH, int THREADS, bool ALIGNED>
class Slices;

template <class T, int WIDTH, int THREADS>
class Slices<T, WIDTH, THREADS, true> {
 public:
  __device__ Slices(const Factor<T>& f, int64_t first) : data_(f.data), step_(f.token_stride * DEPTH) {
    const int row = static_cast<int>(threadIdx.x) / PER_TOKEN, col = static_cast<int>(threadIdx.x) % PER_TOKEN * EACH;
    // Channels beyond the edge make sums that nobody reads: any word of the token will do for them.
    const int64_t last = (f.size - 1) / EACH * EACH, channel = first + col < last ? first + col : last;
    row_ = row;
    place_ = row * (WIDTH + kPad) + col;
    sample_ = at_ = f.data + row * f.token_stride + channel;
    between_ = f.token_stride * ROWS;
    next_sample_ = f.batch_stride;
  }

  // The next DEPTH tokens, of which the sample has `left` or more: zeros behind them.
  __device__ void copy(T* to, int64_t left) const {
    if (ACTIVE < THREADS && static_cast<int>(threadIdx.x) >= ACTIVE) return;
    const T* from = at_;
    T* at = to + place_;
    if (left >= DEPTH) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i, from += between_) copy16_async(at + i * ROWS * (WIDTH + kPad), from);
    } else {
      const int there = static_cast<int>(left);
#pragma unroll
      for (int i = 0; i < COUNT; ++i, from += between_) {
        const bool valid = row_ + i * ROWS < there;
        copy16_async(at + i * ROWS * (WIDTH + kPad), valid ? from : data_, valid ? 16 : 0);
      }
    }
  }

  __device__ void advance(bool sample_is_over) {
    if (sample_is_over) {
      at_ = sample_ += next_sample_;
    } else {
      at_ += step_;
    }
  }

 private:
  static constexpr int EACH = 16 / static_cast<int>(sizeof(T)), PER_TOKEN = WIDTH / EACH, DEPTH = Multiply<T>::DEPTH;
  static constexpr int rows(int most) { return most < 2 ? 1 : 2 * rows(most / 2); }
  static constexpr int ROWS = rows(THREADS / PER_TOKEN), COUNT = DEPTH / ROWS, ACTIVE = ROWS * PER_TOKEN;
  static_assert(COUNT * ROWS == DEPTH, "whole passes");
  const T *data_, *at_, *sample_;
  int64_t step_, between_, next_sample_;
  int row_, place_;
};

// The same where tokens start anywhere: every word is looked at by itself, with zeros beyond the edge.
template <class T, int WIDTH, int THREADS>
class Slices<T, WIDTH, THREADS, false> {
 public:
  __device__ Slices(const Factor<T>& f, int64_t first)
      : at_(f.data + first),
        sample_(at_),
        stride_(f.token_stride),
        next_sample_(f.batch_stride),
        width_(f.size - first) {}

  __device__ void copy(T* to, int64_t left) const {
    constexpr int EACH = 16 / static_cast<int>(sizeof(T)), PER_TOKEN = WIDTH / EACH, WORDS = DEPTH * PER_TOKEN;
    static_assert(WORDS % THREADS == 0, "all threads copy alike");
#pragma unroll
    for (int i = 0; i < WORDS / THREADS; ++i) {
      const int word = static_cast<int>(threadIdx.x) + i * THREADS;
      const int row = word / PER_TOKEN, col = word % PER_TOKEN * EACH;
      const int64_t wanted = row < left ? width_ - col : 0;
      const int bytes = wanted <= 0 ? 0 : wanted < EACH ? static_cast<int>(wanted * sizeof(T)) : 16;
      const T* from = bytes > 0 ? at_ + row * stride_ + col : at_;
      *reinterpret_cast<uint4*>(to + row * (WIDTH + kPad) + col) = load16_partial(from, bytes);
    }
  }

  __device__ void advance(bool sample_is_over) {
    if (sample_is_over) {
      at_ = sample_ += next_sample_;
    } else {
      at_ += DEPTH * stride_;
    }
  }

 private:
  static constexpr int DEPTH = Multiply<T>::DEPTH;
  const T *at_, *sample_;
  int64_t stride_, next_sample_, width_;
};

template <class T, class S>
constexpr int kStageElements = Multiply<T>::DEPTH * (S::BLOCK_M + kPad + S::BLOCK_N + kPad);

// Dynamic shared memory of a block: the stages, used again for the sums of the warps, which are smaller.
template <class T, class S>
constexpr int kSharedBytes = S::STAGES * kStageElements<T, S> * static_cast<int>(sizeof(T));

// grid: row_tiles * col_tiles, row tiles first, so that blocks that run together share the columns' slices.
template <class F, class T, class S, bool ALIGNED>
__global__ void __launch_bounds__(S::THREADS, 1) activation_tiles(const ActivationJob<T> job) {
  constexpr int A_ROW = S::BLOCK_M + kPad, B_ROW = S::BLOCK_N + kPad, DEPTH = Multiply<T>::DEPTH;
  constexpr int STAGE = kStageElements<T, S>, MT = S::MT, NT = S::NT;
  static_assert((S::WARPS_N * S::BLOCK_M + S::WARPS_M * S::BLOCK_N) * sizeof(float) <= kSharedBytes<T, S>, "sums fit");
  constexpr bool KEEP_SUM = F::grad && F::curvature;
  T* const stages = reinterpret_cast<T*>(dynamic_shared());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp % S::WARPS_M * S::WARP_M, warp_n = warp / S::WARPS_M * S::WARP_N;
  const int64_t row_tile = blockIdx.x % job.row_tiles, col_tile = blockIdx.x / job.row_tiles;
  const int64_t first_row = row_tile * S::BLOCK_M, first_col = col_tile * S::BLOCK_N;
  const int64_t steps = (job.tokens + DEPTH - 1) / DEPTH * job.batches;

  float acc[MT][NT][4], sum[KEEP_SUM ? MT : 1][KEEP_SUM ? NT : 1][4];
  float squares[F::curvature ? MT : 1][F::curvature ? NT : 1][4];
#pragma unroll
  for (int i = 0; i < MT * NT * 4; ++i) {
    acc[i / 4 / NT][i / 4 % NT][i % 4] = 0.0f;
    if constexpr (F::curvature) squares[i / 4 / NT][i / 4 % NT][i % 4] = 0.0f;
    if constexpr (KEEP_SUM) sum[i / 4 / NT][i / 4 % NT][i % 4] = 0.0f;
  }

  Slices<T, S::BLOCK_M, S::THREADS, ALIGNED> load_rows(job.rows, first_row);
  Slices<T, S::BLOCK_N, S::THREADS, ALIGNED> load_cols(job.cols, first_col);
  int64_t to_load = steps, left = job.tokens;
  T* load_to = stages;
  const auto load_next = [&] {
    if (to_load > 0) {
      load_rows.copy(load_to, left);
      load_cols.copy(load_to + DEPTH * A_ROW, left);
      left -= DEPTH;
      const bool over = left <= 0;
      load_rows.advance(over);
      load_cols.advance(over);
      if (over) left = job.tokens;
      load_to = load_to == stages + (S::STAGES - 1) * STAGE ? stages : load_to + STAGE;
      --to_load;
    }
    commit_copies();  // an empty group where nothing is left, so that the count of groups stays that of steps
  };
#pragma unroll
  for (int i = 0; i < S::STAGES - 1; ++i) load_next();

  const int a_lane = warp_m + Multiply<T>::a_lane(A_ROW), b_lane = DEPTH * A_ROW + warp_n + Multiply<T>::b_lane(B_ROW);
  constexpr int LINE = 128 / static_cast<int>(sizeof(T)), LINES = (S::BLOCK_N + LINE - 1) / LINE;
  for (int i = threadIdx.x; i < S::BLOCK_M * LINES; i += S::THREADS) {  // the weight is wanted at the end
    const int64_t row = first_row + i / LINES, col = first_col + i % LINES * LINE;
    if (row < job.rows.size && col < job.cols.size) fetch_ahead(job.weight + row * job.weight_stride + col);
  }

  int64_t token = 0;
  const T* stage = stages;
  for (int64_t step = 0; step < steps; ++step) {
    wait_copies<S::STAGES - 2>();
    __syncthreads();  // this step's slices are there for all, and all have done with the stage that is filled next
    load_next();
    Multiply<T>::template step<MT, NT>(stage + a_lane, A_ROW, stage + b_lane, B_ROW, acc);
    stage = stage == stages + (S::STAGES - 1) * STAGE ? stages : stage + STAGE;
    token += DEPTH;
    if constexpr (F::curvature) {
      if (token >= job.tokens) {  // the sample's gradient is complete
        token = 0;
#pragma unroll
        for (int i = 0; i < MT * NT * 4; ++i) {
          float& g = acc[i / 4 / NT][i / 4 % NT][i % 4];
          float& square = squares[i / 4 / NT][i / 4 % NT][i % 4];
          square = fmaf(g, g, square);
          if constexpr (KEEP_SUM) sum[i / 4 / NT][i / 4 % NT][i % 4] += g;
          g = 0.0f;
        }
      }
    }
  }
  wait_copies<0>();
  __syncthreads();  // shared memory changes hands

  float* const row_sums = reinterpret_cast<float*>(dynamic_shared());  // [WARPS_N, BLOCK_M]
  float* const col_sums = row_sums + S::WARPS_N * S::BLOCK_M;          // [WARPS_M, BLOCK_N]
  float cols[NT][2];
#pragma unroll
  for (int j = 0; j < NT; ++j) cols[j][0] = cols[j][1] = 0.0f;
#pragma unroll
  for (int i = 0; i < MT; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int tile_row = warp_m + i * 16 + half * 8 + lane / 4;
      const int64_t row = first_row + tile_row;
      float total = 0.0f;
#pragma unroll
      for (int j = 0; j < NT; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int64_t col = first_col + warp_n + j * 8 + lane % 4 * 2 + e;
          if (row < job.rows.size && col < job.cols.size) {
            const float w = widen(job.weight[row * job.weight_stride + col]);
            float g = 0.0f, h = 0.0f;
            if constexpr (KEEP_SUM) {
              g = job.gradient_scale * sum[i][j][half * 2 + e];
            } else if constexpr (F::grad) {
              g = job.gradient_scale * acc[i][j][half * 2 + e];
            }
            if constexpr (F::curvature) h = job.curvature_scale * squares[i][j][half * 2 + e];
            const float s = F::at(w, g, h);
            total += s;
            cols[j][e] += s;
          }
        }
      }
      total = quad_sum(total);
      if (lane % 4 == 0) row_sums[warp / S::WARPS_M * S::BLOCK_M + tile_row] = total;
    }
  }
#pragma unroll
  for (int j = 0; j < NT; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float total = column_sum(cols[j][e]);
      if (lane / 4 == 0) col_sums[warp % S::WARPS_M * S::BLOCK_N + warp_n + j * 8 + lane % 4 * 2 + e] = total;
    }
  }
  __syncthreads();
  for (int r = threadIdx.x; r < S::BLOCK_M && first_row + r < job.rows.size; r += S::THREADS) {
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < S::WARPS_N; ++k) total += row_sums[k * S::BLOCK_M + r];
    job.row_parts[col_tile * job.rows.size + first_row + r] = total;
  }
  for (int c = threadIdx.x; c < S::BLOCK_N && first_col + c < job.cols.size; c += S::THREADS) {
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < S::WARPS_M; ++k) total += col_sums[k * S::BLOCK_N + c];
    job.col_parts[row_tile * job.cols.size + first_col + c] = total;
  }
}

template <class F, class T, bool ALIGNED>
cudaError_t launch_tiles(const ActivationJob<T>& job, cudaStream_t stream) {
  using S = typename ShapeOf<F, T>::type;
  constexpr int kShared = kSharedBytes<T, S>;
  const cudaError_t status =
      cudaFuncSetAttribute(activation_tiles<F, T, S, ALIGNED>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (status != cudaSuccess) return status;
  const unsigned grid = static_cast<unsigned>(job.row_tiles * job.col_tiles);
  activation_tiles<F, T, S, ALIGNED><<<grid, S::THREADS, kShared, stream>>>(job);
  return cudaGetLastError();
}

template <class F, class T>
cudaError_t launch_tiles(const ActivationJob<T>& job, cudaStream_t stream) {
  const bool aligned = job.rows.aligned && job.cols.aligned;
  return aligned ? launch_tiles<F, T, true>(job, stream) : launch_tiles<F, T, false>(job, stream);
}

template <class T>
cudaError_t launch_formula(Formula formula, const ActivationJob<T>& job, cudaStream_t stream) {
  switch (formula) {
    case Formula::taylor_signed:
      return launch_tiles<TaylorSignedFormula>(job, stream);
    case Formula::taylor_abs:
      return launch_tiles<TaylorAbsFormula>(job, stream);
    case Formula::fisher:
      return launch_tiles<FisherFormula>(job, stream);
    case Formula::mixed:
      return launch_tiles<MixedFormula>(job, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

// One per type, each in a file of its own so that they compile side by side.
cudaError_t launch_activation(Formula formula, const ActivationJob<__nv_bfloat16>& job, cudaStream_t stream);
cudaError_t launch_activation(Formula formula, const ActivationJob<__half>& job, cudaStream_t stream);
cudaError_t launch_activation(Formula formula, const ActivationJob<float>& job, cudaStream_t stream);

}  // namespace pyprune
