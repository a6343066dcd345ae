// When an object that left the map may be used for something else.
//
// Purpose: readers walk immutable versions of the map without counting references; writers replace nodes. A node that
//   was part of the versions [birth, retired) is reused only when no thread announces one of them.
// Roles: each thread owns one Participant; any thread's Participant may be read by a writer that reclaims.
// Progress: announcing is lock-free (it repeats only when the map changed meanwhile). Reclaiming is one heavy barrier
//   and one pass over the participants per batch of retired objects. A thread stopped inside a section holds back
//   only what the one version that it announced contains: memory is bounded by (1 + stopped threads) maps.
// State word (Participant::era): the announced version + 1, 0 when outside.
// Invariants: I1 inside a section, `era` is a version that was current after it was announced. I2 an object is released
//   only after a heavy barrier that followed its removal, and only if no announced version lies in [birth, retired).
// Why that is enough: a reader of version v announced v and then saw the map still at v. If its announcement was not
//   visible to a reclaimer's barrier, then that reader's second look came after the barrier and the object's removal,
//   so v >= retired and the reader cannot reach the object.
// Edges: W.announce (base/asymmetric_barrier.hpp) with R.era; W.leave with R.era: the reader's loads come before the
//   reuse.
// ABA: versions have 48 bits and never repeat.
// Source: interval-based reclamation, Wen, Izraelevitz, Cai, Beadle, Scott, PPoPP 2018, with the tree's own versions as
//   eras.
// Proven by: tests/stress/interval_allocator_test.cpp, tests/litmus/interval_allocator_test.cpp.
#pragma once

#include <atomic>
#include <cstdint>

#include "base/cacheline.hpp"
#include "iova/extent_tree.hpp"
#include "iova/metadata_arena.hpp"

namespace iovane::iova {

/// One thread's part in reclamation. All but `era` belong to the owning thread.
struct Participant {
  std::atomic<std::uint64_t> era{0};
  NodeStash stash;
  ObjectId limbo = 0;  ///< chain through next_free
  unsigned limbo_count = 0;
  unsigned limbo_scan_at = 64;  ///< next size at which to try to reclaim
};

}  // namespace iovane::iova
