// Whether what was replayed is what the trace says.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "iovane/result.hpp"
#include "replay/host.hpp"
#include "replay/plan.hpp"
#include "replay/target.hpp"
#include "trace/reference.hpp"

namespace iovane::replay {

/// What was looked at.
struct Checks {
  std::uint64_t batches = 0;        ///< after which the target was compared with the reference
  std::uint64_t index_entries = 0;  ///< entries of the target's index that were compared
  std::uint64_t live_reads = 0;     ///< reads by the device that had to arrive where the reference says
  std::uint64_t dead_reads = 0;     ///< reads by the device that had to fault
};

/// Follows a replay in a trace::Reference and compares after every batch: each unmap's byte count; the target's whole
/// index, where it keeps one; and on the software IOMMU, what the device reads through every range that the batch
/// touched. Every `sweep_batches` batches and at the end the device reads through everything live. Not timed.
class Verifier {
 public:
  /// `host` and `target` outlive it.
  Verifier(Host& host, const ReplayTarget& target) noexcept : host_{host}, target_{target} {}

  /// After a batch. Errors (io_error) say what differs, and at which address.
  Result<void> check(std::span<const Operation> batch, std::span<const Verdict> verdicts);
  /// After unmap_all() removed `removed` bytes: that was everything, and nothing can be reached any more.
  Result<void> check_end(Bytes removed);

  const trace::Reference& reference() const noexcept { return reference_; }
  const Checks& checks() const noexcept { return checks_; }

  static constexpr std::uint64_t sweep_batches = 1024;

 private:
  Result<void> follow(std::span<const Operation> batch, std::span<const Verdict> verdicts);
  Result<void> compare_index();
  Result<void> read_live(IovaRange range, std::uint64_t memory);
  Result<void> read_dead(IovaRange range);
  Result<void> sweep();

  Host& host_;
  const ReplayTarget& target_;
  trace::Reference reference_;
  Checks checks_;
};

}  // namespace iovane::replay
