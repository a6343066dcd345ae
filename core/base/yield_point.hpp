// A place where a test may stop a thread.
//
// Purpose: lock-free code calls yield_point("who.what") before each of its atomic steps. Normal builds compile that to
//   nothing. A test target that compiles the same sources with IOVANE_YIELD_POINTS=1 installs a hook, and the hook
//   decides which thread runs next, or that one of them never runs again (tests/support/seeded_scheduler.hpp).
// Rule: every source of one program sees the same setting; the layer's own library is then compiled a second time for
//   that test and the normal one is not linked.
#pragma once

#ifdef IOVANE_YIELD_POINTS
#include <atomic>
#endif

namespace iovane::base {

#ifdef IOVANE_YIELD_POINTS

/// Called with the name of the step about to be taken, on the thread that takes it. It may block that thread.
using YieldHook = void (*)(const char* step) noexcept;

inline std::atomic<YieldHook> yield_hook{nullptr};

inline void yield_point(const char* step) noexcept {
  // R.hook - acquire, pairs with the test's release store: what the hook reads was set up before it was installed.
  if (const YieldHook hook = yield_hook.load(std::memory_order_acquire)) hook(step);
}

inline constexpr bool yield_points_enabled = true;

#else

constexpr void yield_point(const char* /*step*/) noexcept {}
inline constexpr bool yield_points_enabled = false;

#endif

}  // namespace iovane::base
