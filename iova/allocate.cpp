// allocate(): from the magazine, from the shelf, from the map, from what others do not use.
#include "base/asymmetric_barrier.hpp"
#include "base/yield_point.hpp"
#include "iova/allocator_core.hpp"

namespace iovane::iova {

Answer AllocatorCore::allocate(const AllocateRequest& request) noexcept {
  ThreadCache* const me = my_cache();
  if (me == nullptr) [[unlikely]]
    return {Outcome::too_many_threads};
  return allocate_slow(*me, request);
}

// Hands out the top entry; nothing when the incarnation was closed. IntervalAllocator::allocate() has the same steps.
std::optional<Unit> AllocatorCore::pop(ThreadCache& me, Magazine& magazine) noexcept {
  const std::uint32_t n = magazine.size();
  const MagazineEntry entry = magazine.entry(n - 1);
  base::yield_point("pop.announce");
  base::announce(me.busy, entry.word);
  base::yield_point("pop.check");
  // R.state - seq_cst: the owner's load of the handshake (thread_cache.hpp, I1).
  const std::uint64_t state = me.state.load(std::memory_order_seq_cst);
  if (state == magazine.incarnation.raw) {
    base::yield_point("pop.live");
    // W.slot - release: linearization of an allocation by magazine.
    entry.word->store(me.live_word.raw, std::memory_order_release);
    magazine.resize(n - 1);
  }
  base::yield_point("pop.idle");
  // W.idle - release, pairs with R.busy: who finds the announcement gone finds the slot live.
  me.busy.store(nullptr, std::memory_order_release);
  if (state != magazine.incarnation.raw) return std::nullopt;
  return entry.start >> granule_log2_;
}

// By way of the magazine of the request's class. Nothing when neither it nor a new run has room.
std::optional<Answer> AllocatorCore::try_allocate(ThreadCache& me, const AllocateRequest& request) noexcept {
  unsigned ceiling_log2 = 0;
  if (request.last_max != map_.last()) {
    // Ceilings are grouped by powers of two; a class below a lower one than asked for serves as well.
    ceiling_log2 = floor_log2(request.last_max + 1);
    if (ceiling_log2 == 0 || request.length > (std::uint64_t{1} << ceiling_log2)) return std::nullopt;
  }
  const LengthKey key = LengthKey::of(request.length, request.align_log2, ceiling_log2);
  const Unit last_max = ceiling_log2 == 0 ? map_.last() : (Unit{1} << ceiling_log2) - 1;
  const ObjectId class_id = class_of(key);
  if (class_id == 0) return std::nullopt;
  Magazine* const magazine = magazine_for(me, key, class_id);
  if (magazine == nullptr) return std::nullopt;
  // Repeats only when another thread closed this incarnation in between, to use what it held.
  for (;;) {
    if (magazine->size() == 0 && !refill(me, *magazine, last_max)) return std::nullopt;
    if (const auto start = pop(me, *magazine)) {
      if (!magazines_ && magazine->size() > 0) flush(me, *magazine, magazine->size());
      return Answer{Outcome::done, {*start, *start + request.length - 1}};
    }
    revalidate(me, *magazine);
  }
}

// A run of its own, wherever the wished alignment and ceiling leave room.
Answer AllocatorCore::allocate_irregular(ThreadCache& me, const AllocateRequest& request) noexcept {
  const MadeRun made = make_run(me, {.length = request.length,
                                     .slots = 1,
                                     .align_log2 = request.align_log2,
                                     .last_max = request.last_max,
                                     .kind = RunKind::irregular,
                                     .length_class = 0,
                                     .first_word = SlotWord::of(SlotState::live),
                                     .first_count = 1,
                                     .at = std::nullopt,
                                     .at_slot = 0});
  if (made.outcome != Outcome::done) return {made.outcome};
  bump(me.other_intervals, std::int64_t{1});
  bump(me.other_units, static_cast<std::int64_t>(request.length));
  return {Outcome::done, {made.first, made.first + request.length - 1}};
}

Answer AllocatorCore::allocate_slow(ThreadCache& me, const AllocateRequest& request) noexcept {
  if (request.length - 1 > request.last_max) return {Outcome::exhausted};
  // A magazine's entry that its class's ceiling allows is always below the request's.
  if (const auto answer = try_allocate(me, request)) return *answer;
  Answer answer = allocate_irregular(me, request);
  if (answer.outcome != Outcome::exhausted) return answer;
  // relaxed: a statistic; what becomes idle at this very moment may be missed, as if it came later.
  if (run_units_.load(std::memory_order_relaxed) == 0) return answer;
  // The only pass over all runs, and only on the way to saying no.
  reclaim_idle(me);
  return allocate_irregular(me, request);
}

}  // namespace iovane::iova
