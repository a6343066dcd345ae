#include "cli/replay_report.hpp"

#include <fmt/format.h>

#include "cli/table.hpp"
#include "cli/units.hpp"

namespace iovane::cli {
namespace {

std::string verdict_of(const replay::RunReport& run) { return run.verified ? "yes" : "not asked"; }

std::string pages_of(const replay::RunReport& run) {
  return run.pinned_max ? format_count(run.pinned_max->value / trace::granule) : "-";
}

/// How a run compares with the event loop on the same trace, if there is one.
std::string against_event(const replay::RunReport& run, std::span<const replay::RunReport> runs) {
  for (const replay::RunReport& other : runs)
    if (other.trace == run.trace && other.target == "event")
      return format_ratio(static_cast<double>(run.elapsed_ns) / static_cast<double>(run.events),
                          static_cast<double>(other.elapsed_ns) / static_cast<double>(other.events));
  return {};
}

}  // namespace

std::string replay_text(const replay::Host& host, std::span<const replay::RunReport> runs, std::size_t batch_max) {
  bool compared = false;
  for (const replay::RunReport& run : runs) compared = compared || (run.target == "event" && runs.size() > 1);
  using enum Table::Align;
  std::vector<Table::Column> columns{
      {"trace", left},        {"by", left},     {"events", right},       {"rate", right},
      {"p50", right},         {"p99", right},   {"p99.9", right},        {"max", right},
      {"calls/event", right}, {"least", right}, {"pages pinned", right}, {"verified", left}};
  if (compared) columns.insert(columns.begin() + 4, {"time/event loop", right});
  Table table{std::move(columns)};
  std::uint64_t batches = 0, index = 0, live = 0, dead = 0;
  for (const replay::RunReport& run : runs) {
    const auto events = static_cast<double>(run.events);
    std::vector<std::string> cells{run.trace,
                                   run.target,
                                   format_count(run.events),
                                   format_rate(run.events, run.elapsed_ns),
                                   format_duration(run.latency.percentile(0.5)),
                                   format_duration(run.latency.percentile(0.99)),
                                   format_duration(run.latency.percentile(0.999)),
                                   format_duration(run.latency.greatest()),
                                   format_ratio(static_cast<double>(run.kernel_calls), events),
                                   format_ratio(static_cast<double>(run.kernel_calls_least), events),
                                   pages_of(run),
                                   verdict_of(run)};
    if (compared) cells.insert(cells.begin() + 4, against_event(run, runs));
    table.add(std::move(cells));
    batches += run.checks.batches;
    index += run.checks.index_entries;
    live += run.checks.live_reads;
    dead += run.checks.dead_reads;
  }
  std::string text = fmt::format("backend: {} ({}), device {}\n     why: {}\n\n{}\n", host.backend(),
                                 host.kernel_name(), host.device(), host.reason(), table.text());
  text += fmt::format(
      "Latency: from handing over a batch (at most {} independent events) until the event's verdict. calls/event:\n"
      "kernel calls; least: the fewest that such batches allow. One page is 4 KiB.\n",
      batch_max);
  if (batches != 0) {
    text +=
        fmt::format("Verified against a plain map of the trace after each of {} batches: byte counts of every unmap",
                    format_count(batches));
    if (index != 0) text += fmt::format(", {} index entries", format_count(index));
    if (live + dead != 0)
      text += fmt::format(",\n{} reads by the device that arrived where they should, {} that faulted as they should",
                          format_count(live), format_count(dead));
    text += ";\nat the end no mapping, pin or descriptor was left.\n";
  }
  return text;
}

nlohmann::ordered_json replay_json(const replay::Host& host, std::span<const replay::RunReport> runs,
                                   std::size_t batch_max) {
  auto list = nlohmann::ordered_json::array();
  for (const replay::RunReport& run : runs) {
    const auto& l = run.latency;
    nlohmann::ordered_json entry{
        {"trace", run.trace},
        {"target", run.target},
        {"events", run.events},
        {"batches", run.batches},
        {"elapsed_ns", run.elapsed_ns},
        {"latency_ns",
         {{"least", l.least()},
          {"p50", l.percentile(0.5)},
          {"p90", l.percentile(0.9)},
          {"p99", l.percentile(0.99)},
          {"p99.9", l.percentile(0.999)},
          {"p99.99", l.percentile(0.9999)},
          {"greatest", l.greatest()},
          {"mean", l.mean()}}},
        {"kernel_calls", run.kernel_calls},
        {"kernel_calls_least", run.kernel_calls_least},
        {"leaf_entries", run.leaf_entries},
        {"pinned_max_bytes", run.pinned_max ? nlohmann::ordered_json(run.pinned_max->value) : nlohmann::ordered_json()},
        {"verified", run.verified},
        {"checks",
         {{"batches", run.checks.batches},
          {"index_entries", run.checks.index_entries},
          {"live_reads", run.checks.live_reads},
          {"dead_reads", run.checks.dead_reads}}}};
    list.push_back(std::move(entry));
  }
  return {{"format", 1},
          {"backend", host.backend()},
          {"reason", host.reason()},
          {"kernel", host.kernel_name()},
          {"device", host.device()},
          {"batch_max", batch_max},
          {"runs", std::move(list)}};
}

}  // namespace iovane::cli
