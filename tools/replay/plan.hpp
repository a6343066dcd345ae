// A trace made ready for replay: memory laid out, operations translated, batches cut. Nothing of it is timed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "iovane/result.hpp"
#include "iovane/types.hpp"
#include "trace/event.hpp"

namespace iovane::replay {

/// One event as a target sees it.
struct Operation {
  trace::EventKind kind = trace::EventKind::map;
  IovaRange range{};
  std::uint64_t memory = 0;  ///< map: offset into the guest memory; unmap: 0
};

struct Plan {
  std::vector<Operation> operations;
  Bytes memory{};                  ///< of guest memory that the trace ever maps
  std::uint64_t leaf_entries = 0;  ///< 4 KiB entries that its maps and unmaps set or clear
};

/// The guest's physical ranges that are ever mapped, moved together: what is contiguous stays so, and pieces of 2 MiB
/// and more keep their position modulo 2 MiB, on which superpages depend. A guest of 2 GiB that does its I/O over 512
/// pages needs 2 MiB here, and a backend that pins registered memory pins no more than that.
/// `events_max` 0: all. Errors: limit_reached when more than `memory_max` is mapped.
Result<Plan> make_plan(const trace::Trace& trace, std::uint64_t events_max, Bytes memory_max);

/// Where batches begin; the first entry is 0. A batch closes when the next event overlaps an IOVA that an event of the
/// batch touched, or at `batch_max` (at least 1) events. So no batch holds a map and its unmap: between the two the
/// device used the mapping, and a replay that let them cancel out would measure something that never happens.
std::vector<std::size_t> cut_batches(std::span<const Operation> operations, std::size_t batch_max);

}  // namespace iovane::replay
