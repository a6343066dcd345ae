// iovane probe
#pragma once

#include <CLI/CLI.hpp>
#include <functional>

#include "cli/exit_status.hpp"

namespace iovane::cli {

/// Adds the command; when the command line names it, `run` is set to what it does.
void add_probe_command(CLI::App& app, std::function<ExitStatus()>& run);

}  // namespace iovane::cli
