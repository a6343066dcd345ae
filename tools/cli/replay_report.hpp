// Replay results for people and for programs.
#pragma once

#include <nlohmann/json.hpp>
#include <span>
#include <string>

#include "replay/host.hpp"
#include "replay/replayer.hpp"

namespace iovane::cli {

/// Which backend and why, a table with a line per run, and how to read it.
std::string replay_text(const replay::Host& host, std::span<const replay::RunReport> runs, std::size_t batch_max);

/// The same and more as one object; durations in nanoseconds, sizes in bytes. "format" is 1 and grows when a member
/// changes its meaning or goes.
nlohmann::ordered_json replay_json(const replay::Host& host, std::span<const replay::RunReport> runs,
                                   std::size_t batch_max);

}  // namespace iovane::cli
