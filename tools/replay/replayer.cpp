#include "replay/replayer.hpp"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <string_view>
#include <utility>
#include <vector>

#include "backends/backend.hpp"
#include "base/error_text.hpp"
#include "replay/call_bound.hpp"

namespace iovane::replay {
namespace {

constexpr std::uint64_t events_between_samples = 256;
constexpr std::size_t events_of_stretch = 256;
constexpr std::string_view verification = "verification: ";

std::uint64_t now_ns() noexcept {
  return static_cast<std::uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
          .count());
}

/// What reading the clock twice adds to a measurement: the least of many. Charged to nobody, so that a target that is
/// timed event by event is not slower for it than one that is timed batch by batch.
std::uint64_t clock_cost_ns() noexcept {
  std::uint64_t least = ~std::uint64_t{0};
  for (int i = 0; i < 1000; ++i) {
    const std::uint64_t begun = now_ns();
    least = std::min(least, now_ns() - begun);
  }
  return least;
}

Error unverified(const RunReport& report, std::size_t event, Error error) {
  return base::fail(error.code, Stage::validate, error.os_errno, "{}{}, {}, up to event {}: {}", verification,
                    report.trace, report.target, event, error.detail());
}

Error failed(const RunReport& report, std::size_t event, const Operation& op, Error error) {
  return base::fail(error.code, error.stage, error.os_errno, "{}, {}: event {}, {} of [{:#x}, {:#x}]: {}", report.trace,
                    report.target, event, op.kind == trace::EventKind::map ? "map" : "unmap", op.range.start.value,
                    op.range.last.value, error.detail());
}

}  // namespace

Result<RunReport> replay(Host& host, ReplayTarget& target, const Plan& plan, const RunOptions& options,
                         std::string trace, std::string name) {
  RunReport report;
  report.trace = std::move(trace);
  report.target = std::move(name);
  const std::span<const Operation> operations{plan.operations};
  const auto batched = cut_batches(operations, options.batch_max);
  const auto begins = target.batches() ? batched : cut_batches(operations, 1);
  report.kernel_calls_least = least_calls_in_all(operations, batched, host.spans_unmaps());
  std::vector<Verdict> verdicts(options.batch_max);
  Verifier verifier{host, target};
  const auto sample_pins = [&] {
    if (const auto now = host.pinned(); now) report.pinned_max = std::max(report.pinned_max.value_or(Bytes{}), *now);
  };

  const std::uint64_t clock_cost = clock_cost_ns();
  std::size_t next_sample = 0;
  auto stretch_begin = batched.begin();  // of the batch with which the next stretch begins
  for (std::size_t b = 0; b < begins.size(); ++b) {
    const std::size_t first = begins[b];
    const std::size_t stop = b + 1 < begins.size() ? begins[b + 1] : operations.size();
    const auto batch = operations.subspan(first, stop - first);
    const std::span results{verdicts.data(), batch.size()};

    const std::uint64_t calls_before = host.kernel().calls();
    const std::uint64_t begun = now_ns();
    target.run(batch, results);
    if (options.verify || stop == operations.size()) target.settle();
    const std::uint64_t measured = now_ns() - begun;
    const std::uint64_t took = measured - std::min(measured, clock_cost);
    report.kernel_calls += host.kernel().calls() - calls_before;
    if (stretch_begin != batched.end() && first == *stretch_begin) {
      report.stretches_ns.push_back(0);
      stretch_begin = std::lower_bound(stretch_begin, batched.end(), first + events_of_stretch);
    }
    report.stretches_ns.back() += took;
    report.elapsed_ns += took;
    report.latency.record(took, batch.size());
    ++report.batches;
    report.events += batch.size();

    for (std::size_t i = 0; i < batch.size(); ++i)
      if (results[i].error) return failed(report, first + i + 1, batch[i], results[i].error);
    if (options.verify)
      if (const auto same = verifier.check(batch, results); !same) return unverified(report, stop, same.error());
    if (stop < next_sample) continue;
    next_sample = stop + events_between_samples;
    sample_pins();
    if (options.progress) options.progress(stop, operations.size());
  }
  sample_pins();

  const auto removed = target.unmap_all();
  if (!removed) return removed.error();
  if (options.verify) {
    if (const auto same = verifier.check_end(*removed); !same)
      return unverified(report, operations.size(), same.error());
    report.verified = true;
    report.checks = verifier.checks();
  }
  report.leaf_entries = plan.leaf_entries;
  return report;
}

void keep_fastest(RunReport& report, RunReport other) {
  std::vector<std::uint64_t> fastest(report.stretches_ns.size());
  std::transform(report.stretches_ns.begin(), report.stretches_ns.end(), other.stretches_ns.begin(), fastest.begin(),
                 [](std::uint64_t a, std::uint64_t b) { return std::min(a, b); });
  if (other.latency.sum() < report.latency.sum()) report = std::move(other);
  report.elapsed_ns = std::accumulate(fastest.begin(), fastest.end(), std::uint64_t{0});
  report.stretches_ns = std::move(fastest);
}

bool is_verification_failure(Error error) { return error.detail().starts_with(verification); }

}  // namespace iovane::replay
