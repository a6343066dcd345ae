// The fewest kernel calls that a batch can need.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "replay/plan.hpp"
#include "trace/reference.hpp"

namespace iovane::replay {

/// What the contract allows to be merged, counted without the planner's help: every map costs one call (events
/// are separate units, and a merged mapping could not be cut later), and unmaps whose span holds no other live mapping
/// cost one call together, since unmaps of one batch may all run before its maps. With `spans` false (an interface
/// whose unmap removes one mapping) every mapping costs one. `before`: what is live before the batch, whose events
/// touch disjoint ranges.
std::uint64_t least_calls(std::span<const Operation> batch, const trace::Reference& before, bool spans);

/// The sum over batches that begin at `begins` (cut_batches()), from an empty address space on.
std::uint64_t least_calls_in_all(std::span<const Operation> operations, std::span<const std::size_t> begins,
                                 bool spans);

}  // namespace iovane::replay
