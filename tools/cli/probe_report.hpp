// What a host offers, for people and for programs.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "backends/probe.hpp"

namespace iovane::cli {

/// Interfaces, devices, limits, feature parity, and what `auto` picks and why.
std::string probe_text(const backends::HostReport& host);

/// The same as one object. "format" is 1 and grows when a member changes its meaning or goes.
nlohmann::ordered_json probe_json(const backends::HostReport& host);

}  // namespace iovane::cli
