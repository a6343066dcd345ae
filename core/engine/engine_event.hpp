// What the engine tells tracers: names of base::TraceEvent and of USDT probes "iovane:NAME". docs/ENGINE.md lists the
// arguments. `space` is a number that no other address space of the process has had.
#pragma once

#include <cstdint>

#include "base/trace_hook.hpp"

namespace iovane::engine {

enum class EngineEvent : std::uint16_t {
  // TraceLevel::error
  operation_failed = 1,  ///< space, user_data, Errc, errno
  mapping_quarantined,   ///< space, first IOVA, last IOVA
  worker_died,           ///< nothing: some thread noticed, and goes on in its place
  // TraceLevel::change
  space_opened,     ///< space, NUMA node, 1 when relaxed
  space_closed,     ///< space, bytes unmapped, mappings and bytes given up
  queue_opened,     ///< space, depth, 1 when it never blocks
  device_attached,  ///< space, device, usable ranges
  device_detached,  ///< space, device, usable ranges
  // TraceLevel::batch
  batch_done,   ///< space, operations, of which maps, 1 when executed for another thread's queue
  stale_flush,  ///< space, mappings, bytes
};

}  // namespace iovane::engine
