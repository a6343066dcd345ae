// Tracing: what the library does, told to one callback of the host's.
//
// Purpose: a library does not log. It offers events to whoever asks: to one hook inside the process, and to USDT probes
//   (base/usdt.hpp) outside. Nobody asking costs one relaxed load and a predictable branch per event.
// Roles: any thread emits; any thread sets the hook, one at a time or not.
// Progress: emitting is wait-free but for the callback. Setting takes a lock and waits until every callback of the old
//   hook has returned; events meanwhile are not heard.
// State: `trace_hook`, null or the hook in force; `running`, how many threads are between R.enter and R.leave.
// Invariants: I1 a thread calls a hook only between counting itself in and counting itself out, and loads the hook in
//   between; I2 set_trace_hook() puts the new hook in, and returns, after it has seen `running` at zero with none
//   there.
// Linearization points: of removing, the exchange (R.gone); of setting, the store (R.hook).
// Edges: store-then-load on both sides (a thread counts itself in, then loads the hook; the setter takes the hook away,
//   then loads the count), which only the single order of all seq_cst operations decides: either the thread finds no
//   hook, or the setter sees the thread. A.drained pairs with R.leave: the callback's effects come before the return of
//   set_trace_hook(), so the host may free what the old hook pointed to. A.hook pairs with R.hook.
// Reclamation: none here; the hook is the host's.
// Proven by: tests/unit/trace_hook_test, tests/stress/trace_hook_stress_test (TSan).
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "base/usdt.hpp"

namespace iovane::base {

/// How much there is to say. A hook of one level gets the levels before it too.
enum class TraceLevel : std::uint8_t {
  error = 1,  ///< an operation failed, or something was given up
  change,     ///< objects come and go: address spaces, queues, devices
  batch,      ///< each batch
  operation,  ///< each operation
};

/// One event. What `event` and the arguments mean is the emitting layer's to say.
struct TraceEvent {
  TraceLevel level;
  std::uint16_t event;
  std::array<std::uint64_t, 4> arguments;
};

/// What the host wants to hear, and how. Immutable while set.
struct TraceHook {
  /// Called on the thread that emits, possibly in the middle of a batch: must be quick, must not block, throw, call
  /// iovane or set hooks.
  void (*callback)(void* context, const TraceEvent& event) noexcept;
  void* context;
  TraceLevel level;
};

namespace detail {
extern constinit std::atomic<const TraceHook*> trace_hook;
void emit(const TraceEvent& event) noexcept;
}  // namespace detail

/// Sets the hook (null: none) and gives back the one before. The hook, its context and its code must stay valid until
/// another call has replaced it and returned. Any thread; waits for running callbacks; not from inside a callback.
const TraceHook* set_trace_hook(const TraceHook* hook) noexcept;

inline void trace(TraceLevel level, std::uint16_t event, std::array<std::uint64_t, 4> arguments) noexcept {
  // relaxed: only asks whether it is worth looking; emit() looks properly.
  if (detail::trace_hook.load(std::memory_order_relaxed) == nullptr) [[likely]]
    return;
  detail::emit({level, event, arguments});
}

}  // namespace iovane::base

/// Emits Enumeration::name with four integer arguments, and fires the USDT probe iovane:name. Arguments are evaluated
/// once, traced or not: pass what is at hand.
#define IOVANE_TRACE(level, Enumeration, name, a, b, c, d)                                               \
  do {                                                                                                   \
    const std::array<std::uint64_t, 4> iovane_trace_arguments{                                           \
        {static_cast<std::uint64_t>(a), static_cast<std::uint64_t>(b), static_cast<std::uint64_t>(c),    \
         static_cast<std::uint64_t>(d)}};                                                                \
    IOVANE_USDT(name, iovane_trace_arguments[0], iovane_trace_arguments[1], iovane_trace_arguments[2],   \
                iovane_trace_arguments[3]);                                                              \
    ::iovane::base::trace(level, static_cast<std::uint16_t>(Enumeration::name), iovane_trace_arguments); \
  } while (false)
