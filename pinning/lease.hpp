// The right to use pinned memory for a while.
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>

#include "base/yield_point.hpp"
#include "pinning/lease_guards.hpp"
#include "pinning/region.hpp"

namespace iovane::pinning {

class PinIndex;

/// A counted hold on a region: any thread, any length of time, as many as wanted. Move-only. While it lives the pin
/// stays; after an invalidation it stays too, but no lookup finds it any more.
///
/// Costs two atomic operations on a line that all holders of the region share; for short uses take a Lease.
class Hold {
 public:
  Hold() noexcept = default;
  Hold(Hold&& o) noexcept
      : index_{std::exchange(o.index_, nullptr)}, id_{o.id_}, address_{o.address_}, length_{o.length_} {}
  Hold& operator=(Hold&& o) noexcept {
    if (this != &o) {
      drop();
      index_ = std::exchange(o.index_, nullptr);
      id_ = o.id_;
      address_ = o.address_;
      length_ = o.length_;
    }
    return *this;
  }
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;
  ~Hold() { drop(); }

  explicit operator bool() const noexcept { return index_ != nullptr; }
  std::uint64_t address() const noexcept { return address_; }
  Bytes length() const noexcept { return {length_}; }
  /// A copy of the region's facts. Precondition: not empty.
  Region region() const noexcept;
  void drop() noexcept;

 private:
  friend class PinIndex;
  friend class Lease;
  Hold(PinIndex* index, RegionId id, std::uint64_t address, std::uint64_t length) noexcept
      : index_{index}, id_{id}, address_{address}, length_{length} {}

  PinIndex* index_ = nullptr;
  RegionId id_ = no_region;
  std::uint64_t address_ = 0;
  std::uint64_t length_ = 0;
};

/// A lease on (a part of) a region, announced in this thread's guard words: two plain stores to take, one to drop.
///
/// Belongs to the thread that took it: move it within the thread, drop it there. For another thread, for a long time
/// or for more than ThreadGuards::lease_words at once per thread, turn it into a Hold (a thread that has used up its
/// guard words gets counted leases by itself; those cost what a Hold costs).
class Lease {
 public:
  Lease() noexcept = default;
  Lease(Lease&& o) noexcept
      : index_{std::exchange(o.index_, nullptr)},
        word_{o.word_},
        id_{o.id_},
        address_{o.address_},
        length_{o.length_} {}
  Lease& operator=(Lease&& o) noexcept {
    if (this != &o) {
      drop();
      index_ = std::exchange(o.index_, nullptr);
      word_ = o.word_;
      id_ = o.id_;
      address_ = o.address_;
      length_ = o.length_;
    }
    return *this;
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  ~Lease() { drop(); }

  explicit operator bool() const noexcept { return index_ != nullptr; }
  /// Where a device finds the first byte that was asked for: an IOVA, or what the provider calls it.
  std::uint64_t address() const noexcept { return address_; }
  /// How much of what was asked for lies in this region, from its first byte on.
  Bytes length() const noexcept { return {length_}; }
  RegionId id() const noexcept { return id_; }
  /// A copy of the region's facts. Precondition: not empty.
  Region region() const noexcept;
  /// A counted hold on the same bytes, in addition to this lease. Precondition: not empty.
  Hold hold() const noexcept;

  /// Hands the lease over as its bare guard word: whoever stores 0 there with release order, on this thread, ends it.
  /// Null when it is counted: then it stays as it is (take a hold() instead).
  std::atomic<GuardWord>* detach() noexcept {
    if (word_ == nullptr) return nullptr;
    index_ = nullptr;
    return std::exchange(word_, nullptr);
  }

  void drop() noexcept {
    if (index_ == nullptr) return;
    base::yield_point("pin.drop");
    if (word_ != nullptr) [[likely]] {
      // R.guard - release, pairs with A.guard in the reclaimer's scan: our last use comes before the unpin.
      word_->store(idle_guard, std::memory_order_release);
    } else {
      drop_counted(index_, id_);  // not a member: `this` must not escape, or every lease lives in memory
    }
    index_ = nullptr;
  }

 private:
  friend class PinIndex;
  Lease(PinIndex* index, std::atomic<GuardWord>* word, RegionId id, std::uint64_t address,
        std::uint64_t length) noexcept
      : index_{index}, word_{word}, id_{id}, address_{address}, length_{length} {}
  static void drop_counted(PinIndex* index, RegionId id) noexcept;

  PinIndex* index_ = nullptr;
  std::atomic<GuardWord>* word_ = nullptr;  // null: counted
  RegionId id_ = no_region;
  std::uint64_t address_ = 0;
  std::uint64_t length_ = 0;
};

}  // namespace iovane::pinning
