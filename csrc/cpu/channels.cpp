// Sums over the rows of a batch of activations: tiles in parallel, then the sums of their partial sums.

#include "channels.h"

#include <algorithm>
#include <memory>

#include "../planning/chunks.h"
#include "kernels.h"

namespace pyprune {
namespace {

// Columns that one task of the second pass adds up.
constexpr int64_t kReduceCols = 512;

// out[i] = sum over k of parts[k * step + i], k ascending
template <class Acc>
void add_parts(const Acc* parts, int64_t count, int64_t step, Acc* out, int64_t length) {
  double sums[kReduceCols];
  std::fill(sums, sums + length, 0.0);
  for (int64_t k = 0; k < count; ++k, parts += step) {
    for (int64_t i = 0; i < length; ++i) sums[i] += static_cast<double>(parts[i]);
  }
  for (int64_t i = 0; i < length; ++i) out[i] = static_cast<Acc>(sums[i]);
}

template <class Acc>
void run(const ChannelCall& call, const Parallel& parallel) {
  const bool pair = call.b.data != nullptr;
  const int64_t element = size_of(call.dtype);
  const int64_t row_tiles = ceil_div(call.rows, kTileRows), col_tiles = ceil_div(call.cols, kChannelCols);
  const int64_t parts = call.batches * row_tiles;
  const int64_t outputs = pair ? 1 : 2;
  const std::unique_ptr<Acc[]> scratch(new Acc[outputs * parts * call.cols]);
  Acc* squares = scratch.get() + parts * call.cols;

  const CpuKernels& kernels = cpu_kernels();
  for_each_task(parallel, parts * col_tiles, [&](int64_t i) {
    const int64_t c = i % col_tiles * kChannelCols, part = i / col_tiles;
    const int64_t batch = part / row_tiles, r = part % row_tiles * kTileRows;
    const auto place = [&](const Matrix& m) -> const void* {
      if (m.data == nullptr) return nullptr;
      return static_cast<const char*>(m.data) + (batch * m.batch_stride + r * m.row_stride + c) * element;
    };
    ChannelTile tile;
    tile.a = place(call.a);
    tile.b = place(call.b);
    tile.a_stride = call.a.row_stride;
    tile.b_stride = call.b.row_stride;
    tile.rows = std::min(kTileRows, call.rows - r);
    tile.cols = std::min(kChannelCols, call.cols - c);
    tile.sums = scratch.get() + part * call.cols + c;
    tile.squares = pair ? nullptr : squares + part * call.cols + c;
    kernels.channel_tile(call.dtype, tile);
  });

  // Dots keep the batches apart, moments do not.
  const int64_t results = pair ? call.batches : 1, parts_each = pair ? row_tiles : parts;
  const int64_t pieces = ceil_div(call.cols, kReduceCols);
  for_each_task(parallel, outputs * results * pieces, [&](int64_t i) {
    const int64_t begin = i % pieces * kReduceCols, length = std::min(kReduceCols, call.cols - begin);
    const int64_t result = i / pieces % results;
    const bool second = i / pieces / results == 1;
    const Acc* from = (second ? squares : scratch.get()) + result * parts_each * call.cols + begin;
    Acc* out = static_cast<Acc*>(second ? call.squares : call.sums) + result * call.cols + begin;
    add_parts(from, parts_each, call.cols, out, length);
  });
}

}  // namespace

void channels_cpu(const ChannelCall& call, const Parallel& parallel) {
  call.dtype == Dtype::float64 ? run<double>(call, parallel) : run<float>(call, parallel);
}

}  // namespace pyprune
