// Work shared over the thread pool that XLA gives to a call.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#endif

namespace ffi = xla::ffi;

// Runs work(i) for 0 <= i < count on the pool and here; returns when all are done.
template <typename Work>
void parallel(ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  auto run = [state, count, &work] {  // `work` is alive as long as an index is left
    int64_t i;
    while ((i = state->next.fetch_add(1)) < count) {
      work(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads() - 1, count - 1);
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(run)(run));
  run();
  while (state->done.load(std::memory_order_acquire) < count) {
#ifdef X86
    _mm_pause();
#endif
  }
}
