// Interfaces and targets side by side: what each costs per event, and against what it has to hold its own.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "replay/host.hpp"
#include "replay/replayer.hpp"

namespace iovane::cli {

/// The runs on one interface.
struct HostRuns {
  std::string asked;  ///< "auto", or the interface's name
  const replay::Host* host = nullptr;
  std::vector<replay::RunReport> runs;
};

struct ComparisonRow {
  std::string trace;
  std::string backend;  ///< as asked for
  std::string chosen;   ///< what that is
  std::string target;
  double ns_per_event = 0;
  double calls_per_event = 0;
  double calls_least = 0;
  std::optional<double> over_event;  ///< time against the loop of single calls on the same interface
  std::optional<double> leaf_over;   ///< the leaf loop's time against this one's
  /// Of the engine: time against the fastest of the same target on any interface that was asked for by name.
  std::optional<double> over_best;
};

std::vector<ComparisonRow> compare(std::span<const HostRuns> hosts);
std::string comparison_text(std::span<const ComparisonRow> rows);
nlohmann::ordered_json comparison_json(std::span<const ComparisonRow> rows);

}  // namespace iovane::cli
