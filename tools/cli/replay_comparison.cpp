#include "cli/replay_comparison.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>

#include "cli/table.hpp"
#include "cli/units.hpp"

namespace iovane::cli {
namespace {

double ns_per_event(const replay::RunReport& run) {
  return static_cast<double>(run.elapsed_ns) / static_cast<double>(run.events);
}

/// What a target took on a trace, among the runs of one interface.
std::optional<double> time_of(std::span<const replay::RunReport> runs, std::string_view trace,
                              std::string_view target) {
  for (const replay::RunReport& run : runs)
    if (run.trace == trace && run.target == target) return ns_per_event(run);
  return std::nullopt;
}

/// The same with pins shared where the interface can and that loop is the faster one: the engine may choose, and so may
/// what it is measured against.
std::optional<double> loop_time(std::span<const replay::RunReport> runs, std::string_view trace,
                                const std::string& unit) {
  const auto plain = time_of(runs, trace, unit);
  const auto copy = time_of(runs, trace, unit + "-copy");
  if (plain && copy) return std::min(*plain, *copy);
  return plain ? plain : copy;
}

std::string cell(const std::optional<double>& ratio) { return ratio ? fmt::format("{:.3f}", *ratio) : ""; }

nlohmann::ordered_json number(const std::optional<double>& value) {
  return value ? nlohmann::ordered_json(*value) : nlohmann::ordered_json();
}

}  // namespace

std::vector<ComparisonRow> compare(std::span<const HostRuns> hosts) {
  std::vector<ComparisonRow> rows;
  for (const HostRuns& host : hosts) {
    for (const replay::RunReport& run : host.runs) {
      const auto events = static_cast<double>(run.events);
      ComparisonRow row{.trace = run.trace,
                        .backend = host.asked,
                        .chosen = host.host->backend(),
                        .target = run.target,
                        .ns_per_event = ns_per_event(run),
                        .calls_per_event = static_cast<double>(run.kernel_calls) / events,
                        .calls_least = static_cast<double>(run.kernel_calls_least) / events,
                        .over_event = std::nullopt,
                        .leaf_over = std::nullopt,
                        .over_best = std::nullopt};
      // "auto" stands beside the loops of the interface that it is.
      for (const HostRuns& same : hosts) {
        if (same.host->backend() != host.host->backend()) continue;
        if (const auto event = loop_time(same.runs, run.trace, "event"); event && !row.over_event)
          row.over_event = row.ns_per_event / *event;
        if (const auto leaf = loop_time(same.runs, run.trace, "leaf"); leaf && !row.leaf_over)
          row.leaf_over = *leaf / row.ns_per_event;
      }
      if (run.target.starts_with("engine")) {
        std::optional<double> best;
        for (const HostRuns& other : hosts)
          if (const auto time = time_of(other.runs, run.trace, run.target); time && other.asked != "auto")
            best = std::min(best.value_or(*time), *time);
        if (best) row.over_best = row.ns_per_event / *best;
      }
      rows.push_back(std::move(row));
    }
  }
  std::stable_sort(rows.begin(), rows.end(),
                   [](const ComparisonRow& a, const ComparisonRow& b) { return a.trace < b.trace; });
  return rows;
}

std::string comparison_text(std::span<const ComparisonRow> rows) {
  using enum Table::Align;
  Table table{{{"trace", left},
               {"interface", left},
               {"by", left},
               {"ns/event", right},
               {"time/event loop", right},
               {"leaf loop/time", right},
               {"time/best interface", right},
               {"calls/event", right},
               {"least", right}}};
  for (const ComparisonRow& row : rows) {
    const std::string name = row.backend == row.chosen ? row.backend : row.backend + ": " + row.chosen;
    table.add({row.trace, name, row.target, fmt::format("{:.0f}", row.ns_per_event), cell(row.over_event),
               cell(row.leaf_over), cell(row.over_best), format_ratio(row.calls_per_event, 1),
               format_ratio(row.calls_least, 1)});
  }
  return table.text() +
         "\nevent loop, leaf loop: one kernel call per event, per 4 KiB entry, on the same interface (the faster of "
         "MAP and COPY,\nwhere both ran). best interface: the fastest of those named.\n";
}

nlohmann::ordered_json comparison_json(std::span<const ComparisonRow> rows) {
  auto list = nlohmann::ordered_json::array();
  for (const ComparisonRow& row : rows)
    list.push_back({{"trace", row.trace},
                    {"backend", row.backend},
                    {"chosen", row.chosen},
                    {"target", row.target},
                    {"ns_per_event", row.ns_per_event},
                    {"calls_per_event", row.calls_per_event},
                    {"calls_least", row.calls_least},
                    {"over_event", number(row.over_event)},
                    {"leaf_over", number(row.leaf_over)},
                    {"over_best", number(row.over_best)}});
  return list;
}

}  // namespace iovane::cli
