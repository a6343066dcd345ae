// What replays operations: the engine, or one of the baselines that it is compared with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

#include "iovane/result.hpp"
#include "iovane/types.hpp"
#include "replay/plan.hpp"

namespace iovane::replay {

/// How one operation ended.
struct Verdict {
  Error error{};
  Bytes bytes{};  ///< map: its length; unmap: what was removed
};

class ReplayTarget {
 public:
  virtual ~ReplayTarget() = default;
  ReplayTarget() = default;
  ReplayTarget(const ReplayTarget&) = delete;
  ReplayTarget& operator=(const ReplayTarget&) = delete;

  /// Whether it takes batches; the others are given one operation at a time, as they would see them online.
  virtual bool batches() const noexcept = 0;
  /// What the target's caller has done before it calls: a guest has written its requests. Not timed; run() follows,
  /// with the same batch.
  virtual void prepare(std::span<const Operation> batch) noexcept { static_cast<void>(batch); }
  /// Runs a batch whose operations touch disjoint ranges; returns when all of it is final. Only this is timed.
  virtual void run(std::span<const Operation> batch, std::span<Verdict> verdicts) noexcept = 0;
  /// Makes real what was answered but deferred, if the target defers. Timed: at the end, and, so that it can be
  /// verified, after every batch of a verified run.
  virtual void settle() noexcept {}
  /// Removes everything; the bytes removed.
  virtual Result<Bytes> unmap_all() noexcept = 0;

  /// What the target's own index says is live: the guest memory offset of a range's start.
  using Visit = std::function<void(IovaRange range, std::uint64_t memory)>;
  /// Whether one operation's range may be several entries of that index.
  virtual bool may_split() const noexcept { return false; }
  /// False when it keeps no index.
  virtual bool visit_index(const Visit&) const { return false; }
};

}  // namespace iovane::replay
