#include "cli/exit_status.hpp"

#include <fmt/core.h>

#include <cstdio>

namespace iovane::cli {

ExitStatus report(Error error) {
  fmt::print(stderr, "iovane: {}\n", error.detail());
  return exit_status_of(error.code);
}

ExitStatus report_input(Error error) {
  report(error);
  return ExitStatus::bad_input;
}

}  // namespace iovane::cli
