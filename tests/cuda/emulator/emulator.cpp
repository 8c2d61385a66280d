// The fibers that are a block's threads, and the entry points that tests call.

#include <ucontext.h>

#include <cstdlib>
#include <vector>

#include "kernels/accumulate.h"
#include "kernels/activation.h"
#include "kernels/channels.h"
#include "kernels/gather.h"
#include "kernels/salience.h"
#include "kernels/tensor_core.cuh"

namespace emulator {

Index thread, block;
alignas(16) char dynamic_shared[kSharedBytes];

namespace {

constexpr size_t kStack = 128 << 10;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Groups copies;
  bool done;
};

struct Warp {
  void* lanes[32];
  int arrived;
  unsigned turn;
};

ucontext_t scheduler;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
const std::function<void()>* body;
unsigned waiting, barrier_turn, running;

void give_way() {
  const unsigned me = thread.x;
  swapcontext(&fibers[me].context, &scheduler);
  thread.x = me;
}

void enter() {
  (*body)();
  fibers[thread.x].done = true;
  swapcontext(&fibers[thread.x].context, &scheduler);
}

}  // namespace

Groups& copies() {
  return fibers[thread.x].copies;
}

void block_barrier() {
  const unsigned turn = barrier_turn;
  if (++waiting == running) {
    waiting = 0;
    ++barrier_turn;
    return;
  }
  while (barrier_turn == turn) give_way();
}

void together(void* mine, const std::function<void(void* const (&lanes)[32])>& work) {
  Warp& warp = warps[thread.x / 32];
  const unsigned turn = warp.turn;
  warp.lanes[thread.x % 32] = mine;
  if (++warp.arrived == 32) {
    work(warp.lanes);
    warp.arrived = 0;
    ++warp.turn;
    return;
  }
  while (warp.turn == turn) give_way();
}

void launch(unsigned grid, unsigned threads, int shared_bytes, const std::function<void()>& kernel) {
  if (threads % 32 != 0 || shared_bytes > kSharedBytes) std::abort();
  body = &kernel;
  fibers.resize(threads);
  for (Fiber& fiber : fibers) fiber.stack.resize(kStack);
  for (block.x = 0; block.x < grid; ++block.x) {
    std::memset(dynamic_shared, 0xff, kSharedBytes);  // NaN
    warps.assign(threads / 32, Warp{});
    waiting = 0, running = threads;
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[i];
      fiber.done = false;
      fiber.copies = {};
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, enter, 0);
    }
    // Backwards every other block, so that an order that works by chance in one does not in the other.
    for (unsigned left = threads; left > 0;) {
      const unsigned before = barrier_turn;
      unsigned progress = 0;
      for (unsigned i = 0; i < threads; ++i) {
        const unsigned t = block.x % 2 == 0 ? i : threads - 1 - i;
        if (fibers[t].done) continue;
        thread.x = t;
        swapcontext(&scheduler, &fibers[t].context);
        ++progress;
        if (fibers[t].done) {
          --left;
          // A thread that has returned no longer counts at barriers.
          if (--running > 0 && waiting == running) waiting = 0, ++barrier_turn;
        }
      }
      if (progress == 0 && barrier_turn == before) std::abort();
    }
  }
}

}  // namespace emulator

using namespace pyprune;

extern "C" {

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
  std::vector<char> workspace(static_cast<size_t>(activation_workspace(call)), '\xff');
  return activation_salience_cuda(call, workspace.data(), nullptr);
}

int emulate_channels(int dtype, const Matrix* a, const Matrix* b, const int64_t* sizes, float* sums, float* squares) {
  ChannelSums call{};
  call.dtype = static_cast<Dtype>(dtype);
  call.a = *a;
  if (b != nullptr) call.b = *b;
  call.batches = sizes[0], call.tokens = sizes[1], call.channels = sizes[2];
  call.sums = sums, call.squares = squares;
  std::vector<char> workspace(static_cast<size_t>(channel_workspace(call)), '\xff');
  return channel_sums_cuda(call, workspace.data(), nullptr);
}

// A call that is prepared once and launched often; the caller keeps the workspace.
int64_t emulate_salience_workspace(int formula, const SalienceTensor* tensors, int64_t count) {
  return salience_workspace(static_cast<Formula>(formula), tensors, count);
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
  std::vector<char> workspace(static_cast<size_t>(accumulate_workspace(tensors, count)), '\xff');
  return accumulate_square_cuda(tensors, count, scale, workspace.data(), nullptr);
}

int emulate_gather(const GatherTensor* tensors, int64_t count) {
  GatherPlan plan = plan_gather(tensors, count);
  std::vector<char> workspace(static_cast<size_t>(plan.table.size()), '\xff');
  return gather_cuda(plan, workspace.data(), nullptr);
}

}  // extern "C"
