// A bounded ring from one producer to one consumer.
//
// Purpose: hands small values from one thread to another in order, in batches: the producer stages any number privately
//   and publishes them with one store, the consumer takes any number with one load and one store.
// Roles: one thread at a time stages and publishes (the producer), one thread at a time pops (the consumer). A role may
//   change threads if something else orders the two.
// Progress: every operation is wait-free.
// State: three counters that only grow, taken <= published <= staged <= taken + capacity; slot n % capacity holds the
//   n-th value. At a value per nanosecond they wrap after 584 years, so they are compared as numbers.
//     ... [ free ] taken [ published: the consumer's ] published [ staged: the producer's ] staged [ free ] ...
//   Each side keeps a copy of the other's counter that may be old, and looks again only when the copy is not enough: a
//   stream of values costs each side a cache miss per batch, not per value (as in Lee, Bu and Chandranmenon's
//   MCRingBuffer, IPDPS 2010).
// Invariants: I1 only the producer writes `staged` and `published` and slots in [published, taken + capacity); I2 only
//   the consumer writes `taken`, and it reads slots in [taken, published) only; I3 copies are never ahead of what they
//   copy, so acting on an old one finds too little, never too much.
// Linearization points: publish(): R.published. pop(): R.taken when it returns values; A.published when it returns
// none.
//   stage() moves values that only the producer knows of: A.taken or, with an old copy, that copy's load.
// Edges: A.published pairs with R.published: the values are there before the counter says so. A.taken pairs with
// R.taken:
//   the consumer has read a slot before the producer writes it again.
// ABA: none, the counters do not come back.
// Reclamation: none; values are trivially copyable and slots live as long as the ring.
// Failure and undo: allocate() changes nothing when it fails; nothing else can fail but by being full or empty.
// Proven by: tests/exhaustive/spsc_ring_exhaustive_test, tests/stress/spsc_ring_stress_test (TSan).
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>

#include "base/cacheline.hpp"
#include "base/error_text.hpp"
#include "base/memory_source.hpp"
#include "base/yield_point.hpp"
#include "iovane/result.hpp"

namespace iovane::base {

/// What a slot counter leaves room for: the pure part, tested for all small values.
struct RingArithmetic {
  std::uint64_t mask;  // capacity - 1, capacity a power of two

  constexpr std::uint64_t capacity() const noexcept { return mask + 1; }
  /// How many values fit between `staged` and the slots that are not taken yet.
  constexpr std::uint64_t room(std::uint64_t staged, std::uint64_t taken) const noexcept {
    return taken + capacity() - staged;
  }
  constexpr std::uint64_t slot(std::uint64_t counter) const noexcept { return counter & mask; }
  /// How many slots follow `counter`, itself included, before the array starts over.
  constexpr std::uint64_t until_wrap(std::uint64_t counter) const noexcept { return capacity() - slot(counter); }
};

template <typename T>
class SpscRing {
  static_assert(std::is_trivially_copyable_v<T> && std::is_trivially_destructible_v<T>);

 public:
  SpscRing() = default;  // holds nothing until allocate()
  SpscRing(const SpscRing&) = delete;
  SpscRing& operator=(const SpscRing&) = delete;
  ~SpscRing() {
    if (slots_ != nullptr) source_->release(slots_, bytes(), cacheline_bytes);
  }

  /// Makes room for at least `entries_min` values, a power of two of them; once, before either side begins. `source`
  /// outlives the ring. Errors: invalid_argument (0 or more than 2^31 entries), busy (done before), out_of_memory.
  Result<void> allocate(std::uint32_t entries_min, MemorySource& source = heap_memory()) noexcept {
    if (entries_min == 0 || entries_min > (1U << 31)) {
      return fail(Errc::invalid_argument, Stage::open, 0, "a ring of {} entries: 1 to 2147483648 are possible",
                  entries_min);
    }
    if (slots_ != nullptr) return fail(Errc::busy, Stage::open, 0, "the ring has its {} entries already", capacity());
    index_.mask = std::bit_ceil(entries_min) - 1;
    source_ = &source;
    slots_ = static_cast<T*>(source.allocate(bytes(), cacheline_bytes));
    if (slots_ != nullptr) return {};
    const std::uint64_t wanted = bytes();
    index_.mask = ~std::uint64_t{0};
    return fail(Errc::out_of_memory, Stage::open, 0, "no memory for a ring of {} bytes", wanted);
  }
  std::uint64_t capacity() const noexcept { return index_.capacity(); }

  // --- The producer --------------------------------------------------------------------------------------------------

  /// Stages as many of `values`, from the first on, as there is room for; how many. The consumer sees none of them yet.
  [[nodiscard]] std::size_t stage(std::span<const T> values) noexcept {
    const auto count = std::min<std::uint64_t>(values.size(), room_for(values.size()));
    const std::uint64_t first = std::min(count, index_.until_wrap(producer_.staged));
    copy(slots_ + index_.slot(producer_.staged), values.data(), first);
    copy(slots_, values.data() + first, count - first);
    producer_.staged += count;
    return count;
  }
  /// False when there is no room.
  [[nodiscard]] bool stage(const T& value) noexcept {
    if (room_for(1) == 0) return false;
    slots_[index_.slot(producer_.staged++)] = value;
    return true;
  }
  /// How many values can be staged now; at least this many until the next stage().
  std::uint64_t room() noexcept { return room_for(capacity()); }
  std::uint64_t staged_count() const noexcept { return producer_.staged - producer_.published; }
  /// Lets the consumer see all that is staged; how many values these are.
  std::uint64_t publish() noexcept {
    const std::uint64_t count = staged_count();
    if (count == 0) return 0;
    yield_point("spsc_ring.publish");
    // R.published - pairs with A.published in available(): the slots are written before the counter moves.
    published_.store(producer_.staged, std::memory_order_release);
    producer_.published = producer_.staged;
    return count;
  }

  // --- The consumer --------------------------------------------------------------------------------------------------

  /// Takes as many values as there are and `out` holds; how many.
  [[nodiscard]] std::size_t pop(std::span<T> out) noexcept {
    const auto count = std::min<std::uint64_t>(out.size(), available(out.size()));
    if (count == 0) return 0;
    const std::uint64_t first = std::min(count, index_.until_wrap(consumer_.taken));
    copy(out.data(), slots_ + index_.slot(consumer_.taken), first);
    copy(out.data() + first, slots_, count - first);
    consumer_.taken += count;
    yield_point("spsc_ring.take");
    // R.taken - pairs with A.taken in room_for(): the slots are read before the producer may write them again.
    taken_.store(consumer_.taken, std::memory_order_release);
    return count;
  }
  /// True when pop() would return nothing. For the consumer.
  bool empty() noexcept { return available(1) == 0; }

  /// A look from outside, for any thread: false when values wait, true when none do; a guess while a side is at work.
  bool looks_empty() const noexcept {
    // acquire: `published_` is then read no earlier than `taken_`, and is never behind it.
    const std::uint64_t taken = taken_.load(std::memory_order_acquire);
    // acquire: pairs with R.published, for callers that go on to become the consumer.
    return published_.load(std::memory_order_acquire) == taken;
  }

 private:
  std::size_t bytes() const noexcept {
    return std::max<std::size_t>(static_cast<std::size_t>(capacity()) * sizeof(T), cacheline_bytes);
  }
  static void copy(T* to, const T* from, std::uint64_t count) noexcept {
    if (count != 0) std::memcpy(static_cast<void*>(to), from, static_cast<std::size_t>(count) * sizeof(T));
  }
  // Room for the producer: at least `wanted` or all there is.
  std::uint64_t room_for(std::uint64_t wanted) noexcept {
    std::uint64_t room = index_.room(producer_.staged, producer_.taken_seen);
    if (room < wanted) {
      yield_point("spsc_ring.look_at_taken");
      // A.taken - pairs with R.taken in pop(): what was in the slots has been read.
      producer_.taken_seen = taken_.load(std::memory_order_acquire);
      room = index_.room(producer_.staged, producer_.taken_seen);
    }
    return room;
  }
  // Values for the consumer: at least `wanted` or all there are.
  std::uint64_t available(std::uint64_t wanted) noexcept {
    std::uint64_t count = consumer_.published_seen - consumer_.taken;
    if (count < wanted) {
      yield_point("spsc_ring.look_at_published");
      // A.published - pairs with R.published in publish(): the values in the slots.
      consumer_.published_seen = published_.load(std::memory_order_acquire);
      count = consumer_.published_seen - consumer_.taken;
    }
    return count;
  }

  struct Producer {
    std::uint64_t staged = 0;
    std::uint64_t published = 0;   // its own copy of published_
    std::uint64_t taken_seen = 0;  // may be old
  };
  struct Consumer {
    std::uint64_t taken = 0;           // its own copy of taken_
    std::uint64_t published_seen = 0;  // may be old
  };

  // Constant after allocate(); read by both.
  RingArithmetic index_{~std::uint64_t{0}};  // capacity 0
  T* slots_ = nullptr;
  MemorySource* source_ = nullptr;
  // One line each: what one side writes all the time is not beside what the other side reads.
  alignas(cacheline_bytes) Producer producer_;
  alignas(cacheline_bytes) std::atomic<std::uint64_t> published_{0};
  alignas(cacheline_bytes) Consumer consumer_;
  alignas(cacheline_bytes) std::atomic<std::uint64_t> taken_{0};
};

}  // namespace iovane::base
