// The independent model that everything replayed is compared with.
#pragma once

#include <cstdint>
#include <map>
#include <optional>

#include "iovane/result.hpp"
#include "trace/event.hpp"

namespace iovane::trace {

/// A plain map of live ranges, kept as simply as possible: it shares no code with the engine's index, so that the two
/// can only agree by both being right. One thread.
class Reference {
 public:
  struct Live {
    Iova last{};
    std::uint64_t memory = 0;  ///< where `start` leads; the trace's guest physical address
  };
  using Map = std::map<Iova, Live>;  ///< by start

  /// Errors: iova_busy when something live overlaps.
  Result<void> map(IovaRange range, std::uint64_t memory);
  /// The bytes removed. Errors: would_bisect (nothing was removed), not_found when nothing lives there.
  Result<Bytes> unmap(IovaRange range);
  /// map() or unmap() of a recorded event.
  Result<void> apply(const Event& event);

  /// The mapping that covers an address.
  std::optional<std::pair<IovaRange, Live>> find(Iova address) const;
  bool overlaps(IovaRange range) const;
  const Map& live() const noexcept { return live_; }
  Bytes live_bytes() const noexcept { return live_bytes_; }
  void clear() noexcept;

 private:
  Map live_;
  Bytes live_bytes_{};
};

/// Applies every event to an empty Reference; the first one that does not fit is the error, named by its number.
Result<void> check_order(const Trace& trace, std::string_view name);

}  // namespace iovane::trace
