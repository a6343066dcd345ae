// Runs a plan on a target, times it, and checks it.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/latency_histogram.hpp"
#include "iovane/result.hpp"
#include "replay/host.hpp"
#include "replay/plan.hpp"
#include "replay/target.hpp"
#include "replay/verifier.hpp"

namespace iovane::replay {

/// One plan on one target.
struct RunReport {
  std::string trace;
  std::string target;
  std::uint64_t events = 0;
  std::uint64_t batches = 0;
  std::uint64_t elapsed_ns = 0;  ///< inside the target
  /// elapsed_ns by stretches of some hundred events, cut where batches begin: alike for every target of a plan.
  std::vector<std::uint64_t> stretches_ns;
  base::LatencyHistogram latency;  ///< per event: from its batch being handed over until its verdict is there
  std::uint64_t kernel_calls = 0;
  std::uint64_t kernel_calls_least =
      0;  ///< call_bound.hpp, for batches of at most batch_max events: the same for every target
  std::uint64_t leaf_entries = 0;
  std::optional<Bytes> pinned_max;  ///< highest sample; nothing where the kernel does not account pins
  bool verified = false;
  Checks checks;
};

/// Adds another run of the same plan on the same target to a report: elapsed_ns becomes the sum of each stretch's
/// fastest run, so that what else the machine did for some milliseconds counts only if it did so in every run. The rest
/// of the report is that of the run whose own time was shortest.
void keep_fastest(RunReport& report, RunReport other);

struct RunOptions {
  std::size_t batch_max = 64;
  bool verify = true;
  /// Called now and then with operations done and in all.
  std::function<void(std::uint64_t, std::uint64_t)> progress;
};

/// `trace` and `name` are for the report. Stops at the first operation that fails: the plan is known to be right, so a
/// failure is the host's or the engine's. Errors: that operation's, with its number; io_error where something differs
/// from the reference, with the detail beginning with "verification:".
Result<RunReport> replay(Host& host, ReplayTarget& target, const Plan& plan, const RunOptions& options,
                         std::string trace, std::string name);

/// Whether an error of replay() is about the result rather than about the host.
bool is_verification_failure(Error error);

}  // namespace iovane::replay
