// Threads, as the caller provides them.
//
// The binding passes LibTorch's parallel_for: the thread count then follows torch.set_num_threads, and there is one
// pool of threads in the process instead of two that compete. A program without torch may pass any other.
#pragma once

#include <atomic>
#include <cstdint>

namespace pyprune {

struct Parallel {
  // Calls body(context, begin, end) over pieces of 0 .. threads - 1, on several threads where that helps.
  void (*run)(int64_t threads, void (*body)(void* context, int64_t begin, int64_t end), void* context);
  int64_t threads;
};

// Calls task(i) for each i < count, each exactly once, handed out one by one so that unequal tasks balance. Which
// thread runs a task never shows in a result: tasks write to places of their own.
template <class Task>
void for_each_task(const Parallel& parallel, int64_t count, const Task& task) {
  if (count <= 1 || parallel.threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  struct Shared {
    const Task* task;
    int64_t count;
    std::atomic<int64_t> next;
  } shared{&task, count, {0}};
  parallel.run(
      parallel.threads < count ? parallel.threads : count,
      [](void* context, int64_t, int64_t) {
        Shared& s = *static_cast<Shared*>(context);
        for (int64_t i = s.next.fetch_add(1); i < s.count; i = s.next.fetch_add(1)) (*s.task)(i);
      },
      &shared);
}

}  // namespace pyprune
