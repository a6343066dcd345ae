// The iovane command.
#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <functional>
#include <string>

#include "cli/exit_status.hpp"
#include "cli/probe_command.hpp"
#include "cli/replay_command.hpp"
#include "cli/top_command.hpp"
#include "cli/trace_command.hpp"

namespace {

using iovane::cli::ExitStatus;

constexpr const char* exit_text =
    "Exit status: 0 done; 1 the system refused something; 2 wrong usage; 3 a file is missing or damaged;\n"
    "4 the result differs from the reference; 5 this host lacks an interface, device, permission or limit.";

ExitStatus run(int argc, char** argv) {
  CLI::App app{"iovane: a DMA-mapping engine. Replays what real guests asked of their IOMMU, and checks the result."};
  app.name("iovane");
  app.set_version_flag("--version", "iovane " IOVANE_VERSION);
  app.require_subcommand(1);
  app.footer(exit_text);
  std::function<ExitStatus()> command;
  iovane::cli::add_probe_command(app, command);
  iovane::cli::add_replay_command(app, command);
  iovane::cli::add_trace_command(app, command);
  iovane::cli::add_top_command(app, command);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& asked_for_text) {
    return static_cast<ExitStatus>(app.exit(asked_for_text));
  } catch (const CLI::ParseError& wrong) {
    fmt::print(stderr, "iovane: {}\nSee 'iovane --help', or --help behind the command's name.\n", wrong.what());
    return ExitStatus::usage;
  }
  return command();
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return static_cast<int>(run(argc, argv));
  } catch (const std::exception& e) {
    std::fprintf(stderr, "iovane: %s\n", e.what());
    return static_cast<int>(ExitStatus::failed);
  }
}
