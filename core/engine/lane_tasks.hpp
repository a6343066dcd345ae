// What a worker does for an address space: flush what is stale in time, and take over a lane that others keep busy; and
// what others do for it when the worker has ended.
#pragma once

#include "engine/batch_executor.hpp"
#include "engine/lane.hpp"
#include "engine/monotonic.hpp"
#include "engine/node_resources.hpp"
#include "engine/space_state.hpp"
#include "engine/worker.hpp"

namespace iovane::engine {

class StaleFlusher final : public WorkerTask, public StaleTimer {
 public:
  StaleFlusher(Worker& worker, Lane& lane, SpaceState& state, BatchExecutor& executor) noexcept
      : worker_{worker}, lane_{lane}, state_{state}, executor_{executor} {}

  void arm() noexcept override { worker_.post(*this); }

 private:
  std::uint64_t run_on_worker() noexcept override {
    const LaneHold held{lane_};
    if (state_.closed) return never;
    state_.stale_timer_armed = true;  // we are the timer, and say below when to run again
    executor_.flush_stale_if_due(monotonic_ns());
    if (!state_.stale->empty()) return state_.stale->deadline_ns();
    state_.stale_timer_armed = false;
    return never;
  }

  Worker& worker_;
  Lane& lane_;
  SpaceState& state_;
  BatchExecutor& executor_;
};

/// Settles what a worker that ended left behind in an address space's lane. Any of the engine's: a handler that one of
/// them runs may work in any address space.
class WorkersHeir final : public LaneHeir {
 public:
  WorkersHeir(NodeResources& nodes, SpaceState& state, BatchExecutor& executor) noexcept
      : nodes_{nodes}, state_{state}, executor_{executor} {}

  void look() noexcept override { nodes_.inherit_from_dead(); }
  void recover() noexcept override {
    executor_.recover();
    // The thread may have been the timer, and ended before it said when to run again.
    if (state_.closed || state_.stale_timer == nullptr) return;
    state_.stale_timer_armed = !state_.stale->empty();
    if (state_.stale_timer_armed) state_.stale_timer->arm();
  }

 private:
  NodeResources& nodes_;
  SpaceState& state_;
  BatchExecutor& executor_;
};

class Relief final : public WorkerTask, public LaneRelief {
 public:
  Relief(Worker& worker, Lane& lane, SpaceState& state) noexcept : worker_{worker}, lane_{lane}, state_{state} {}

  void call() noexcept override { worker_.post(*this); }

 private:
  std::uint64_t run_on_worker() noexcept override {
    const LaneHold held{lane_};  // and on leaving, everything that waits
    (*state_.counters)[Count::handed_over].add();
    return never;
  }

  Worker& worker_;
  Lane& lane_;
  SpaceState& state_;
};

}  // namespace iovane::engine
