// Kept slices of all tensors in one launch.
//
// Words    a tensor moves in the widest word (16 to 1 bytes) that divides its addresses, strides and runs, so whole
// heads
//          and whole rows go as 16-byte words and scattered channels as single elements. Narrow words are stored in
//          pairs or fours where the destination's rows allow.
// Tile     TX units of a row (a unit is what a thread stores at once) x a number of rows, about 64 KiB of destination.
// Thread   one unit: it looks its words' positions up once, then walks the tile's rows with four loads in flight.
// Bytes    kept bytes read and written once, plus 4 bytes of position per word and tile.
// Floor    kept bytes twice over the memory bandwidth; scattered channels also read what shares their 32-byte sectors.

#include "gather.h"

#include <algorithm>
#include <vector>

#include "../planning/chunks.h"
#include "../planning/runs.h"
#include "device.cuh"
#include "workspace.h"

namespace pyprune {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kTileBytes = 1 << 16;

struct Entry {
  const char* source;
  char* dest;
  const int64_t* batches;            // [batches] source positions, null when whole
  const int64_t* rows;               // [rows] source positions, null when whole
  const int32_t* words;              // [words of a row] source positions in words, null when whole
  int64_t batch_stride, row_stride;  // of the source, bytes
  int64_t batch_rows, all_rows;      // destination rows of a batch, and of all batches
  int64_t row_bytes, units;          // of a destination row
  int64_t unit_tiles, tile_rows;
  int32_t word_bytes, pack, lanes;  // a unit is `pack` words; `lanes` threads side by side in a row
};

template <class Word, int PACK>
struct alignas(sizeof(Word) * PACK) Unit {
  Word word[PACK];
};

__device__ inline const char* source_row(const Entry& e, int64_t row) {
  int64_t batch = 0;
  if (e.batch_rows != e.all_rows) {
    batch = row / e.batch_rows;
    row -= batch * e.batch_rows;
  }
  if (e.batches != nullptr) batch = e.batches[batch];
  if (e.rows != nullptr) row = e.rows[row];
  return e.source + batch * e.batch_stride + row * e.row_stride;
}

template <class Word, int PACK>
__device__ void move_tile(const Entry& e, int64_t tile) {
  const int lanes = e.lanes, rows_at_once = kThreads / lanes;
  const int64_t unit = tile % e.unit_tiles * lanes + threadIdx.x % lanes;
  if (unit >= e.units) return;
  int64_t word[PACK];
#pragma unroll
  for (int p = 0; p < PACK; ++p) {
    const int64_t i = unit * PACK + p;
    word[p] = e.words != nullptr ? e.words[i] : i;
  }
  const int64_t begin = tile / e.unit_tiles * e.tile_rows;
  const int64_t end = begin + e.tile_rows < e.all_rows ? begin + e.tile_rows : e.all_rows;
  for (int64_t row = begin + threadIdx.x / lanes; row < end; row += 4 * rows_at_once) {
    Unit<Word, PACK> moved[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (row + k * rows_at_once < end) {
        const Word* from = reinterpret_cast<const Word*>(source_row(e, row + k * rows_at_once));
#pragma unroll
        for (int p = 0; p < PACK; ++p) moved[k].word[p] = __ldg(from + word[p]);
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t to = row + k * rows_at_once;
      if (to < end) reinterpret_cast<Unit<Word, PACK>*>(e.dest + to * e.row_bytes)[unit] = moved[k];
    }
  }
}

// grid: the tiles of all entries; first [count + 1]: tiles before each entry. The switch is the same for a whole block.
__global__ void __launch_bounds__(kThreads) gather_tiles(const Entry* entries, const int64_t* first, int count) {
  const int index = tensor_of(first, count, blockIdx.x);
  const Entry& e = entries[index];
  const int64_t tile = static_cast<int64_t>(blockIdx.x) - first[index];
  switch (e.word_bytes * 8 + e.pack) {
    case 16 * 8 + 1:
      return move_tile<uint4, 1>(e, tile);
    case 8 * 8 + 1:
      return move_tile<uint2, 1>(e, tile);
    case 4 * 8 + 1:
      return move_tile<uint32_t, 1>(e, tile);
    case 2 * 8 + 2:
      return move_tile<uint16_t, 2>(e, tile);
    case 2 * 8 + 1:
      return move_tile<uint16_t, 1>(e, tile);
    case 1 * 8 + 4:
      return move_tile<uint8_t, 4>(e, tile);
    default:
      return move_tile<uint8_t, 1>(e, tile);
  }
}

int64_t word_bytes(const GatherTensor& t) {
  WordWidth width;
  width.must_divide(static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.source) % 16));
  width.must_divide(static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.dest) % 16));
  width.must_divide(t.out_cols * t.element_size);
  if (t.rows > 1) width.must_divide(t.row_stride * t.element_size);
  if (t.batches > 1) width.must_divide(t.batch_stride * t.element_size);
  for (int64_t i = 0; !t.kept_cols.whole && i < t.kept_cols.count; ++i) {
    width.must_divide(t.kept_cols.runs[i].source * t.element_size);
    width.must_divide(t.kept_cols.runs[i].length * t.element_size);
  }
  return width.bytes();
}

const int64_t* positions(Table& table, const KeptRuns& kept) {
  return kept.whole ? nullptr : table.append(expand_runs(kept.runs, kept.count));
}

// Positions of the kept columns, counted in words of `bytes`.
const int32_t* word_positions(Table& table, const GatherTensor& t, int64_t bytes) {
  if (t.kept_cols.whole) return nullptr;
  std::vector<int32_t> words;
  words.reserve(static_cast<size_t>(t.out_cols * t.element_size / bytes));
  for (int64_t i = 0; i < t.kept_cols.count; ++i) {
    const Run& run = t.kept_cols.runs[i];
    const int64_t source = run.source * t.element_size / bytes, length = run.length * t.element_size / bytes;
    for (int64_t k = 0; k < length; ++k) words.push_back(static_cast<int32_t>(source + k));
  }
  return table.append(words);
}

struct Launch {
  const Entry* entries = nullptr;
  const int64_t* first = nullptr;
  int64_t tiles = 0;
  int count = 0;
};

Launch fill(Table& table, const GatherTensor* tensors, int64_t count) {
  std::vector<Entry> entries;
  std::vector<int64_t> tiles;
  for (int64_t i = 0; i < count; ++i) {
    const GatherTensor& t = tensors[i];
    if (t.out_batches * t.out_rows * t.out_cols == 0) continue;
    Entry e{};
    const int64_t word = word_bytes(t);
    e.source = static_cast<const char*>(t.source);
    e.dest = static_cast<char*>(t.dest);
    e.batches = positions(table, t.kept_batches);
    e.rows = positions(table, t.kept_rows);
    e.words = word_positions(table, t, word);
    e.batch_stride = t.batch_stride * t.element_size;
    e.row_stride = t.row_stride * t.element_size;
    e.batch_rows = t.out_rows;
    e.all_rows = t.out_batches * t.out_rows;
    e.row_bytes = t.out_cols * t.element_size;
    e.word_bytes = static_cast<int32_t>(word);
    const bool packs = word < 4 && e.row_bytes % 4 == 0 && reinterpret_cast<uintptr_t>(t.dest) % 4 == 0;
    e.pack = packs ? static_cast<int32_t>(4 / word) : 1;
    e.units = e.row_bytes / (word * e.pack);
    e.lanes = 1;
    while (e.lanes < kThreads && e.lanes < e.units) e.lanes *= 2;
    e.unit_tiles = ceil_div(e.units, e.lanes);
    e.tile_rows = std::max<int64_t>(kThreads / e.lanes, kTileBytes / (e.lanes * word * e.pack));
    entries.push_back(e);
    tiles.push_back(e.unit_tiles * ceil_div(e.all_rows, e.tile_rows));
  }
  Launch launch;
  const std::vector<int64_t> first = first_items(tiles);
  launch.tiles = first.back();
  launch.count = static_cast<int>(entries.size());
  launch.first = table.append(first);
  launch.entries = table.append(entries);
  return launch;
}

}  // namespace

int64_t gather_workspace(const GatherTensor* tensors, int64_t count) {
  Table table(nullptr);
  fill(table, tensors, count);
  return table.size();
}

cudaError_t gather_cuda(const GatherTensor* tensors, int64_t count, void* workspace, cudaStream_t stream) {
  for (int64_t i = 0; i < count; ++i) {
    // Positions of words within a row are 32-bit; rows and everything else are 64-bit.
    if (!tensors[i].kept_cols.whole && tensors[i].cols * tensors[i].element_size > INT32_MAX)
      return cudaErrorInvalidValue;
  }
  Table table(workspace);
  const Launch launch = fill(table, tensors, count);
  if (launch.tiles == 0) return cudaSuccess;
  if (launch.tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  const cudaError_t status = table.send(stream);
  if (status != cudaSuccess) return status;
  gather_tiles<<<static_cast<unsigned>(launch.tiles), kThreads, 0, stream>>>(launch.entries, launch.first,
                                                                             launch.count);
  return cudaGetLastError();
}

}  // namespace pyprune
