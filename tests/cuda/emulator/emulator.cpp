// The fibers that are a block's threads, and the entry points that tests call.

#include <ucontext.h>

#include <cstdlib>
#include <map>
#include <utility>
#include <vector>

#include "kernels/accumulate.h"
#include "kernels/activation.h"
#include "kernels/channels.h"
#include "kernels/gather.h"
#include "kernels/hopper.cuh"
#include "kernels/salience.h"
#include "kernels/tensor_core.cuh"

namespace emulator {

Index thread, block, grid;
unsigned rank;
SharedMemory shared_memory[2];

namespace {

constexpr size_t kStack = 128 << 10;
constexpr int kIdleRounds = 1000;  // of all threads, after which they wait for what never comes
int capability = 8;
int64_t launches_of_pairs = 0;

// What was captured: the work, and the device memory that calls asked for meanwhile.
struct Graph {
  std::vector<std::function<void()>> work;
  std::vector<std::vector<char>> memory;
};
Graph graph;
bool capturing;

// Page-locked memory and its bytes, and copies of it that nothing has waited for.
std::map<const char*, size_t> page_locked;
std::vector<std::function<void()>> on_their_way;
uint64_t copies_made;

bool is_page_locked(const char* at) {
  const auto after = page_locked.upper_bound(at);
  return after != page_locked.begin() && at < std::prev(after)->first + std::prev(after)->second;
}

void wait_for_copies() {
  for (const auto& copy : on_their_way) copy();
  copies_made += on_their_way.size();
  on_their_way.clear();
}

void run_or_capture(const std::function<void()>& work) {
  if (capturing) return graph.work.push_back(work);
  wait_for_copies();
  work();
}

// Device memory of one call, or of the graph.
char* workspace(int64_t bytes) {
  static std::vector<char> last;
  std::vector<char>& place = capturing ? graph.memory.emplace_back() : last;
  place = std::vector<char>(static_cast<size_t>(bytes), '\xff');
  return place.data();
}

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Groups copies;
  Products products;
  bool done;
};

struct Warp {
  void* lanes[32];
  int arrived;
  unsigned turn;
};

// Some threads that wait for each other.
struct Meeting {
  unsigned waiting, turn;
};

ucontext_t scheduler;
std::vector<Fiber> fibers;  // of one block, then of the other
std::vector<Warp> warps;
const std::function<void()>* body;
unsigned current, threads_of_block, running[2];
Meeting whole_block[2], groups[2][16], both;
uint64_t events;  // that let a thread go on
bool broken;      // what ran last did not come to its end

void give_way() {
  const unsigned me = current, me_thread = thread.x, me_block = block.x, me_rank = rank;
  swapcontext(&fibers[me].context, &scheduler);
  current = me, thread.x = me_thread, block.x = me_block, rank = me_rank;
}

void enter() {
  (*body)();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

void meet(Meeting& meeting, const unsigned& threads) {
  const unsigned turn = meeting.turn;
  ++meeting.waiting;
  while (meeting.turn == turn) {
    if (meeting.waiting >= threads) {  // also where those that were missing have returned
      meeting.waiting = 0;
      ++meeting.turn;
      ++events;
      return;
    }
    give_way();
  }
}

}  // namespace

Groups& copies() {
  return fibers[current].copies;
}

Products& products() {
  return fibers[current].products;
}

void block_barrier() {
  meet(whole_block[rank], running[rank]);
}

void group_barrier(int number, unsigned threads) {
  meet(groups[rank][number], threads);
}

void group_arrival(int number, unsigned threads) {
  Meeting& meeting = groups[rank][number];
  if (++meeting.waiting == threads) {
    meeting.waiting = 0;
    ++meeting.turn;
    ++events;
  }
}

void pair_barrier() {
  const unsigned all = 2 * threads_of_block;
  meet(both, all);
}

void give_up() {
  broken = true;
  while (true) give_way();
}

void wait_until(const std::function<bool()>& there) {
  while (!there()) give_way();
  ++events;
}

void together(void* mine, const std::function<void(void* const (&lanes)[32])>& work) {
  Warp& warp = warps[current / 32];
  const unsigned turn = warp.turn;
  warp.lanes[current % 32] = mine;
  if (++warp.arrived == 32) {
    work(warp.lanes);
    warp.arrived = 0;
    ++warp.turn;
    ++events;
    return;
  }
  while (warp.turn == turn) give_way();
}

void run(unsigned blocks, unsigned threads, int shared_bytes, const std::function<void()>& kernel, unsigned pair) {
  if (threads % 32 != 0 || shared_bytes > kSharedBytes || blocks % pair != 0) std::abort();
  body = &kernel;
  launches_of_pairs += pair > 1;
  grid.x = blocks;
  threads_of_block = threads;
  fibers.resize(pair * threads);
  for (Fiber& fiber : fibers) fiber.stack.resize(kStack);
  for (unsigned first = 0; first < blocks; first += pair) {
    std::memset(shared_memory, 0xff, sizeof(shared_memory));  // NaN
    warps.assign(pair * threads / 32, Warp{});
    both = {};
    for (unsigned b = 0; b < 2; ++b) {
      running[b] = threads;
      whole_block[b] = {};
      for (Meeting& group : groups[b]) group = {};
    }
    for (Fiber& fiber : fibers) {
      fiber.done = false;
      fiber.copies = {};
      fiber.products = {};
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, enter, 0);
    }
    // Backwards every other time, so that an order that works by chance in one does not in the other.
    const unsigned all = pair * threads;
    int idle = 0;
    uint32_t dice = first + 1, held = 0, rounds = 0;
    for (unsigned left = all; left > 0;) {
      // Of a pair, some groups of 128 threads stand still for a while, so that others run as far ahead as they may.
      if (pair > 1 && rounds++ % 64 == 0) {
        dice = dice * 1664525 + 1013904223;
        held = rounds % 128 == 1 ? 0 : dice >> 24;
      }
      const uint64_t before = events;
      for (unsigned i = 0; i < all; ++i) {
        current = first / pair % 2 == 0 ? i : all - 1 - i;
        Fiber& fiber = fibers[current];
        if (fiber.done || (held >> current / 128 & 1) != 0) continue;
        thread.x = current % threads, rank = current / threads, block.x = first + rank;
        swapcontext(&scheduler, &fiber.context);
        if (fiber.done) {
          --left;
          --running[rank];  // no longer counts at barriers
          ++events;
        }
      }
      idle = events == before ? idle + 1 : 0;
      broken = broken || idle == kIdleRounds;
      if (broken) return;
    }
  }
}

void launch(unsigned blocks, unsigned threads, int shared_bytes, const std::function<void()>& kernel, unsigned pair) {
  run_or_capture([=] { run(blocks, threads, shared_bytes, kernel, pair); });
}

}  // namespace emulator

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulator::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t) {
  if (emulator::capturing) return cudaErrorStreamCaptureUnsupported;
  if (emulator::is_page_locked(static_cast<const char*>(from))) {
    emulator::on_their_way.push_back([=] { std::memcpy(to, from, bytes); });
    return cudaSuccess;
  }
  emulator::wait_for_copies();
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, int) {
  *memory = std::malloc(bytes);
  emulator::page_locked[static_cast<char*>(*memory)] = bytes;
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* memory) {
  emulator::page_locked.erase(static_cast<char*>(memory));
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, int) {
  *event = new uint64_t{0};
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  *event = emulator::copies_made + emulator::on_their_way.size();
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (*event > emulator::copies_made) emulator::wait_for_copies();
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  emulator::run_or_capture([=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  const int values[] = {emulator::capability, 0, 5};  // multiprocessors: two pairs at once, and one left over
  *value = values[name];
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** found, unsigned, int,
                                             cudaDriverEntryPointQueryResult* status) {
  *found = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

using namespace pyprune;

extern "C" {

// Compute capability of the GPU from now on: 8 or 9.
void emulate_capability(int major) {
  emulator::capability = major;
}

// How many kernels of pairs of blocks ran until now.
int64_t emulate_launches_of_pairs() {
  return emulator::launches_of_pairs;
}

// Launches are captured from now on, into an empty graph, or run again.
void emulate_capture(bool begin) {
  if (begin) emulator::graph = {};
  emulator::capturing = begin;
}

int emulate_graph() {
  for (const auto& work : emulator::graph.work) work();
  return std::exchange(emulator::broken, false) ? -1 : 0;
}

int emulate_activation(int formula, int dtype, const Matrix* rows_input, const Matrix* cols_input, const Matrix* weight,
                       const int64_t* sizes, float gradient_scale, float curvature_scale, float* row_sums,
                       float* col_sums) {
  ActivationCall call{};
  call.formula = static_cast<Formula>(formula);
  call.dtype = static_cast<Dtype>(dtype);
  call.rows_input = *rows_input, call.cols_input = *cols_input, call.weight = *weight;
  call.batches = sizes[0], call.tokens = sizes[1], call.rows = sizes[2], call.cols = sizes[3];
  call.gradient_scale = gradient_scale, call.curvature_scale = curvature_scale;
  call.row_sums = row_sums, call.col_sums = col_sums;
  const int status = activation_salience_cuda(call, emulator::workspace(activation_workspace(call)), nullptr);
  return std::exchange(emulator::broken, false) ? -1 : status;
}

int emulate_channels(int dtype, const Matrix* a, const Matrix* b, const int64_t* sizes, float* sums, float* squares) {
  ChannelCall call{};
  call.dtype = static_cast<Dtype>(dtype);
  call.a = *a;
  if (b != nullptr) call.b = *b;
  call.batches = sizes[0], call.rows = sizes[1], call.cols = sizes[2];
  call.sums = sums, call.squares = squares;
  return channel_sums_cuda(call, emulator::workspace(channel_workspace(call)), nullptr);
}

// A call that is prepared once and launched often; the caller keeps the workspace.
int64_t emulate_salience_workspace(const SalienceTensor* tensors, int64_t count) {
  return salience_workspace(tensors, count);
}

int64_t emulate_passes_size() {
  return sizeof(SaliencePasses);
}

int emulate_prepare_salience(int formula, const SalienceTensor* tensors, int64_t count, void* workspace, void* passes) {
  return prepare_salience_cuda(static_cast<Formula>(formula), tensors, count, workspace, nullptr,
                               *static_cast<SaliencePasses*>(passes));
}

int emulate_launch_salience(const void* passes) {
  return launch_salience(*static_cast<const SaliencePasses*>(passes), nullptr);
}

int emulate_accumulate(const AccumulateTensor* tensors, int64_t count, double scale) {
  char* const workspace = emulator::workspace(accumulate_workspace(tensors, count));
  return accumulate_square_cuda(tensors, count, scale, workspace, nullptr);
}

int emulate_gather(const GatherTensor* tensors, int64_t count) {
  GatherPlan plan = plan_gather(tensors, count);
  return gather_cuda(plan, emulator::workspace(plan.table.size()), nullptr);
}

}  // extern "C"
