// iovane top: what running engines do.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>

#include "cli/exit_status.hpp"

namespace iovane::cli {

void add_top_command(CLI::App& app, std::function<ExitStatus()>& run);

}  // namespace iovane::cli
