// Kept slices of all tensors in one launch.
//
// Words    a tensor moves in the widest word (16 to 1 bytes) that divides its addresses, strides and runs, so heads and
//          whole rows go as 16-byte words and scattered channels as single elements. Narrow words are stored in pairs
//          or fours where the destination's rows allow.
// Tile     TX units of a row (a unit is what a thread stores at once) x a number of rows, about 64 KiB of destination.
// Thread   one unit: it looks its words' positions up once, then walks the rows, two to eight of them in flight.
// Bytes    kept bytes read and written once, plus 4 bytes of position per word and tile.
// Floor    kept bytes twice over the memory bandwidth; scattered channels also read what shares their 32-byte sectors.

#include "gather.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "../planning/chunks.h"
#include "../planning/runs.h"
#include "device.cuh"

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

template <class Word, int PACK>
__device__ void move_tile(const Entry& e, int64_t tile) {
  const int lanes = e.lanes, rows_at_once = kThreads / lanes;
  const int64_t unit = tile % e.unit_tiles * lanes + threadIdx.x % lanes;
  if (unit >= e.units) return;
  int64_t word[PACK];
#pragma unroll
  for (int p = 0; p < PACK; ++p) {
    const int64_t i = unit * PACK + p;
    word[p] = e.words != nullptr ? __ldg(e.words + i) : i;
  }
  // Loads in flight: of single bytes fewer, which would take the registers that let three blocks share a processor.
  constexpr int ROWS = sizeof(Word) == 1 ? 2 : sizeof(Word) * PACK <= 4 ? 8 : 4;
  const int64_t begin = tile / e.unit_tiles * e.tile_rows;
  const int64_t end = begin + e.tile_rows < e.all_rows ? begin + e.tile_rows : e.all_rows;
  for (int64_t row = begin + threadIdx.x / lanes; row < end; row += ROWS * rows_at_once) {
    int64_t batch[ROWS], from[ROWS];
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
      const int64_t here = row + k * rows_at_once;
      batch[k] = 0, from[k] = here < end ? here : row;
    }
    if (e.batch_rows != e.all_rows) {
#pragma unroll
      for (int k = 0; k < ROWS; ++k) batch[k] = from[k] / e.batch_rows, from[k] -= batch[k] * e.batch_rows;
      if (e.batches != nullptr) {
#pragma unroll
        for (int k = 0; k < ROWS; ++k) batch[k] = __ldg(e.batches + batch[k]);
      }
    } else if (e.batches != nullptr) {
#pragma unroll
      for (int k = 0; k < ROWS; ++k) batch[k] = __ldg(e.batches);
    }
    if (e.rows != nullptr) {
#pragma unroll
      for (int k = 0; k < ROWS; ++k) from[k] = __ldg(e.rows + from[k]);
    }
#pragma unroll
    for (int k = 0; k < ROWS; ++k) from[k] = batch[k] * e.batch_stride + from[k] * e.row_stride;
    Unit<Word, PACK> moved[ROWS];
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
#pragma unroll
      for (int p = 0; p < PACK; ++p)
        moved[k].word[p] = __ldg(reinterpret_cast<const Word*>(e.source + from[k]) + word[p]);
    }
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
      const int64_t to = row + k * rows_at_once;
      if (to < end) reinterpret_cast<Unit<Word, PACK>*>(e.dest + to * e.row_bytes)[unit] = moved[k];
    }
  }
}

// grid: the tiles of all entries; first [count + 1]: tiles before each entry. The switch is the same for a whole block.
// Three blocks on a processor: of scattered 16-bit channels a warp has 1.4 KB on their way, and 16 warps' 22 KB are
// what the memory's bandwidth takes at its latency, without a rest for addresses and stores.
__global__ void __launch_bounds__(kThreads, 3) gather_tiles(const Entry* entries, const int64_t* first, int count) {
  const int index = tensor_of(first, count, blockIdx.x);
  const Entry e = entries[index];  // a copy: stores to the destination could change what a reference reads
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

// Appends what a tensor keeps of a dimension to the table, or finds it there: coupled tensors keep the same. Addresses
// are counted from the table's start.
class Positions {
 public:
  explicit Positions(Table& table) : table_(table) {}

  // Null when whole.
  const int64_t* of(const KeptRuns& kept) {
    if (kept.whole) return nullptr;
    const void*& known = place(kept, 0);
    if (known == nullptr) known = table_.append(expand_runs(kept.runs, kept.count));
    return static_cast<const int64_t*>(known);
  }

  // Of columns, counted in words of `bytes`. Null when whole.
  const int32_t* words_of(const KeptRuns& kept, int64_t element_size, int64_t bytes) {
    if (kept.whole) return nullptr;
    const void*& known = place(kept, element_size << 8 | bytes);
    if (known == nullptr) {
      std::vector<int32_t> words;
      for (int64_t i = 0; i < kept.count; ++i) {
        const Run& run = kept.runs[i];
        const int32_t source = static_cast<int32_t>(run.source * element_size / bytes);
        const size_t begin = words.size();
        words.resize(begin + static_cast<size_t>(run.length * element_size / bytes));
        std::iota(words.begin() + static_cast<std::ptrdiff_t>(begin), words.end(), source);
      }
      known = table_.append(words);
    }
    return static_cast<const int32_t*>(known);
  }

 private:
  struct Known {
    KeptRuns kept;
    int64_t form;
    const void* at;
  };
  // The newest first: neighbours in the list are of one layer.
  const void*& place(const KeptRuns& kept, int64_t form) {
    for (auto k = known_.rbegin(); k != known_.rend(); ++k) {
      if (k->form == form && k->kept.count == kept.count &&
          std::memcmp(k->kept.runs, kept.runs, static_cast<size_t>(kept.count) * sizeof(Run)) == 0)
        return k->at;
    }
    known_.push_back({kept, form, nullptr});
    return known_.back().at;
  }
  Table& table_;
  std::vector<Known> known_;
};

std::vector<Entry> entries_of(Table& table, const GatherTensor* tensors, int64_t count, std::vector<int64_t>& tiles) {
  Positions positions(table);
  std::vector<Entry> entries;
  for (int64_t i = 0; i < count; ++i) {
    const GatherTensor& t = tensors[i];
    if (t.out_batches * t.out_rows * t.out_cols == 0) continue;
    Entry e{};
    const int64_t word = word_bytes(t);
    e.source = static_cast<const char*>(t.source);
    e.dest = static_cast<char*>(t.dest);
    e.batches = positions.of(t.kept_batches);
    e.rows = positions.of(t.kept_rows);
    e.words = positions.words_of(t.kept_cols, t.element_size, word);
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
    // Fewer, down to a warp's, where more than one in 32 would find no unit at the end of the row.
    while (e.lanes > 32 && ceil_div(e.units, e.lanes) * e.lanes - e.units > e.units / 32) e.lanes /= 2;
    e.unit_tiles = ceil_div(e.units, e.lanes);
    e.tile_rows = std::max<int64_t>(kThreads / e.lanes, kTileBytes / (e.lanes * word * e.pack));
    entries.push_back(e);
    tiles.push_back(e.unit_tiles * ceil_div(e.all_rows, e.tile_rows));
  }
  return entries;
}

template <class T>
void move_on(const T*& at, const char* base) {
  if (at != nullptr) at = reinterpret_cast<const T*>(base + reinterpret_cast<uintptr_t>(at));
}

}  // namespace

GatherPlan plan_gather(const GatherTensor* tensors, int64_t count) {
  GatherPlan plan;
  for (int64_t i = 0; i < count; ++i) {
    // Positions of words within a row are 32-bit; rows and everything else are 64-bit.
    if (!tensors[i].kept_cols.whole && tensors[i].cols * tensors[i].element_size > INT32_MAX)
      plan.status = cudaErrorInvalidValue;
  }
  if (plan.status != cudaSuccess) return plan;
  std::vector<int64_t> tiles;
  plan.table.append(std::vector<int64_t>(1));  // so that no address is null
  const std::vector<Entry> entries = entries_of(plan.table, tensors, count, tiles);
  const std::vector<int64_t> first = first_items(tiles);
  plan.tiles = first.back();
  plan.count = static_cast<int>(entries.size());
  plan.first = reinterpret_cast<uintptr_t>(plan.table.append(first));
  plan.entries = reinterpret_cast<uintptr_t>(plan.table.append(entries));
  if (plan.tiles > INT32_MAX) plan.status = cudaErrorInvalidConfiguration;
  return plan;
}

cudaError_t gather_cuda(GatherPlan& plan, void* workspace, cudaStream_t stream) {
  if (plan.status != cudaSuccess || plan.tiles == 0) return plan.status;
  const char* base = static_cast<const char*>(workspace);
  Entry* entries = reinterpret_cast<Entry*>(plan.table.bytes() + plan.entries);
  for (int i = 0; i < plan.count; ++i) {
    move_on(entries[i].batches, base);
    move_on(entries[i].rows, base);
    move_on(entries[i].words, base);
  }
  const cudaError_t status = plan.table.send_to(workspace, stream);
  if (status != cudaSuccess) return status;
  gather_tiles<<<static_cast<unsigned>(plan.tiles), kThreads, 0, stream>>>(
      reinterpret_cast<const Entry*>(base + plan.entries), reinterpret_cast<const int64_t*>(base + plan.first),
      plan.count);
  return cudaGetLastError();
}

}  // namespace pyprune
