// Hooks come and go while threads emit: a replaced hook is never called again once set_trace_hook() has returned.
#include <gtest/gtest.h>

#include <atomic>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include "base/trace_hook.hpp"

namespace iovane::base {
namespace {

enum class TestEvent : std::uint16_t { tick };

struct Ear {
  std::atomic<std::uint64_t> heard{0};
  bool open = true;  // plain on purpose: ThreadSanitizer reports a callback that overlaps its end
};

void hear(void* context, const TraceEvent&) noexcept {
  Ear& ear = *static_cast<Ear*>(context);
  if (!ear.open) std::terminate();
  ear.heard.fetch_add(1, std::memory_order_relaxed);  // relaxed: a count
}

TEST(TraceHookStress, NoCallbackOutlivesItsHook) {
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (int n = 0; n < 3; ++n) {
    threads.emplace_back([&] {
      // relaxed: a request to stop, nothing is read through it.
      while (!stop.load(std::memory_order_relaxed)) IOVANE_TRACE(TraceLevel::error, TestEvent, tick, 0, 0, 0, 0);
    });
  }
  std::uint64_t total = 0;
  for (int round = 0; round < 500 || (total == 0 && round < 1'000'000); ++round) {
    auto ear = std::make_unique<Ear>();
    const TraceHook hook{hear, ear.get(), TraceLevel::error};
    set_trace_hook(&hook);
    std::this_thread::yield();
    set_trace_hook(nullptr);
    ear->open = false;
    total += ear->heard.load(std::memory_order_relaxed);  // relaxed: all writers have left
  }
  stop.store(true, std::memory_order_relaxed);
  for (auto& thread : threads) thread.join();
  EXPECT_GT(total, 0U);
}

}  // namespace
}  // namespace iovane::base
