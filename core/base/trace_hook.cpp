#include "base/trace_hook.hpp"

#include <sched.h>

#include <mutex>

#include "base/cacheline.hpp"

namespace iovane::base {
namespace detail {

constinit std::atomic<const TraceHook*> trace_hook{nullptr};

namespace {
alignas(cacheline_bytes) constinit std::atomic<std::uint32_t> running{0};
}

void emit(const TraceEvent& event) noexcept {
  // R.enter - seq_cst: ordered before the load below in the order that set_trace_hook() shares.
  running.fetch_add(1, std::memory_order_seq_cst);
  // A.hook - seq_cst as above; pairs with R.hook: the hook's fields.
  const TraceHook* const hook = trace_hook.load(std::memory_order_seq_cst);
  if (hook != nullptr && event.level <= hook->level) hook->callback(hook->context, event);
  // R.leave - pairs with A.drained in set_trace_hook().
  running.fetch_sub(1, std::memory_order_release);
}

}  // namespace detail

const TraceHook* set_trace_hook(const TraceHook* hook) noexcept {
  static constinit std::mutex setters;  // control plane: one at a time keeps the hand-over simple
  const std::scoped_lock lock{setters};
  // R.gone - seq_cst: ordered before the load of `running` below in the order that emit() shares.
  const TraceHook* const before = detail::trace_hook.exchange(nullptr, std::memory_order_seq_cst);
  // A.drained - pairs with R.leave; seq_cst as above. Bounded: who enters from now on finds no hook, and callbacks
  // must not block.
  while (before != nullptr && detail::running.load(std::memory_order_seq_cst) != 0) sched_yield();
  // R.hook - pairs with A.hook: the new hook's fields.
  detail::trace_hook.store(hook, std::memory_order_release);
  return before;
}

}  // namespace iovane::base
