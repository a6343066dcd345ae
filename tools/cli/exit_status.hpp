// What the command's exit status means. Scripts rely on it: numbers are never given another meaning.
#pragma once

#include "iovane/result.hpp"

namespace iovane::cli {

enum class ExitStatus : int {
  ok = 0,
  failed = 1,       ///< the system or the kernel refused something that should have worked
  usage = 2,        ///< the command line makes no sense
  bad_input = 3,    ///< a file is missing, damaged, or not what it should be
  unverified = 4,   ///< it ran, and its result differs from the reference
  unavailable = 5,  ///< this host lacks what was asked for: an interface, a device, a permission, a limit
};

constexpr ExitStatus exit_status_of(Errc code) noexcept {
  switch (code) {
    case Errc::ok: return ExitStatus::ok;
    case Errc::bad_format: return ExitStatus::bad_input;
    case Errc::not_found:
    case Errc::permission:
    case Errc::unsupported:
    case Errc::no_device:
    case Errc::memlock_exceeded:
    case Errc::entry_limit: return ExitStatus::unavailable;
    default: return ExitStatus::failed;
  }
}

/// Prints "iovane: <text of the error>" to standard error and gives the status for it.
ExitStatus report(Error error);
/// The same for a file that the user named: whatever is wrong with it is bad input.
ExitStatus report_input(Error error);

}  // namespace iovane::cli
