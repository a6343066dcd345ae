// StaleSet: mappings whose relaxed unmap was answered and not yet carried out.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "engine/mapping_index.hpp"
#include "iovane/config.hpp"

namespace iovane::engine {

/// Sees to it that a time bound is kept when nobody submits any more.
class StaleTimer {
 public:
  virtual ~StaleTimer() = default;
  /// Called by the lane's holder when something is stale and the timer is not armed.
  virtual void arm() noexcept = 0;
};

/// Used by the lane's holder only. Bounded: whoever adds keeps is_due() false by flushing in time. A member's record
/// carries its place here in its tag.
class StaleSet {
 public:
  struct Member {
    MappingRecord* record;  // null: taken out again
    std::uint64_t since_ns;
  };

  /// Throws std::bad_alloc. Room for what one slice of `slack` operations can add beyond the bound.
  StaleSet(const RelaxedBounds& bounds, std::size_t slack) : bounds_{bounds} {
    members_.reserve(std::size_t{bounds.mappings_max} + slack);
  }

  bool has_room(std::size_t more = 1) const noexcept { return members_.capacity() - members_.size() >= more; }
  /// Precondition: has_room().
  void add(MappingRecord& record, std::uint64_t now_ns) noexcept {
    record.tag = static_cast<std::uint32_t>(members_.size());
    members_.push_back({&record, now_ns});
    ++count_;
    bytes_ += record.range.span() + 1;
    if (oldest_ns_ == never) oldest_ns_ = now_ns;
  }
  void take_out(const MappingRecord& record) noexcept {
    members_[record.tag].record = nullptr;
    --count_;
    bytes_ -= record.range.span() + 1;
  }
  void clear() noexcept {
    members_.clear();
    count_ = 0;
    bytes_ = 0;
    oldest_ns_ = never;
  }

  std::vector<Member>& members() noexcept { return members_; }
  std::uint64_t count() const noexcept { return count_; }
  std::uint64_t bytes() const noexcept { return bytes_; }
  bool empty() const noexcept { return count_ == 0; }
  /// When the first member has to be gone; UINT64_MAX when there is none.
  std::uint64_t deadline_ns() const noexcept {
    return oldest_ns_ == never ? never : oldest_ns_ + static_cast<std::uint64_t>(bounds_.time_max.count());
  }
  bool is_due(std::uint64_t now_ns) const noexcept {
    return count_ >= bounds_.mappings_max || bytes_ >= bounds_.bytes_max.value || now_ns >= deadline_ns();
  }

 private:
  static constexpr std::uint64_t never = std::numeric_limits<std::uint64_t>::max();
  const RelaxedBounds bounds_;
  std::vector<Member> members_;
  std::uint64_t count_ = 0;
  std::uint64_t bytes_ = 0;
  std::uint64_t oldest_ns_ = never;  // of all that were added since the last flush
};

}  // namespace iovane::engine
