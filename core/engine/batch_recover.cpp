// After the end of a thread that executed: what it was about is settled, and the slice goes on.
//
// The thread ended in a call (LaneClaims), so every place to stop at is one of these: the backend has the phase, an
// undo, a retry, a flush of stale mappings or a replacement; or the clock was read, or someone was told of completions,
// between which everything is in order. What the backend has may have happened or not, as after EFAULT: so it is
// unmapped once more, and what was to be mapped is mapped again. Should the heir end in here too, the next one finds
// the same notes.
#include <cerrno>

#include "engine/batch_executor.hpp"

namespace iovane::engine {

using backends::BackendOpResult;

namespace {

Error ended() noexcept {
  return make_error(Errc::io_error, Stage::publish, EFAULT,
                    "the thread that executed it has ended in the middle, perhaps by a seccomp filter");
}

}  // namespace

void BatchExecutor::recover() noexcept {
  recovering_ = true;
  if (flushing_stale_) (void)flush_stale();  // may be on behalf of a map that failed: before the phase
  switch (step_) {
    case Step::none: break;
    case Step::executing:
      for (std::uint32_t op = maps_begin - groups_; op < maps_begin + map_op_count_; ++op) results_[op] = {ended(), {}};
      finish_maps(0);
      finish_unmaps(groups_);
      end_phase();
      break;
    case Step::mapping: {
      const PendingMap& map = maps_[cursor_];
      for (std::uint32_t op = map.first_op; op < map.first_op + map.op_count; ++op)
        results_[maps_begin + op] = {ended(), {}};
      finish_maps(cursor_);
      finish_unmaps(groups_);
      end_phase();
      break;
    }
    case Step::unmapping:
      // Those behind it may be done in the kernel or not; asking for each alone finds out.
      for (std::uint32_t u = cursor_; u < unmap_count_; ++u) {
        cursor_ = u;
        retry_one_by_one(unmaps_[u]);
      }
      end_phase();
      break;
  }
  if (replacing_ != nullptr) {
    refuse(at_, restore_replaced(replacing_, {ended(), {}}));
    planned_ = true;
  }
  if (held_ != nothing_held) {
    release(held_);
    held_ = nothing_held;
  }
  recovering_ = false;
  if (!slice_open_) return;
  if (at_ < count_) {
    const Operation& operation = slice_.operation(at_);
    // What a fence and a flush stand for was done just now.
    const bool done = operation.kind == OperationKind::fence || operation.kind == OperationKind::flush;
    if (!planned_ && !done) refuse(at_, ended());
    *link_broken_ = operation.order == Order::link && !slice_.completion(at_).ok();
  }
  planned_ = false;
}

void BatchExecutor::end_slice() noexcept {
  run_from(at_ < count_ ? at_ + 1 : count_);
  slice_open_ = false;
}

void BatchExecutor::resume(DirectBatch& batch) noexcept {
  if (slice_open_) {
    end_slice();
    batch.executed(count_, refused_);
  }
  run(batch, false);
}

void BatchExecutor::resume(QueueCore& queue) noexcept {
  if (slice_open_) {
    end_slice();
    queue.deliver(count_);
  } else {
    queue.announce();
  }
  run(queue, false);
}

}  // namespace iovane::engine
