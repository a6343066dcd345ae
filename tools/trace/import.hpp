// From a recording in ftrace text to a trace.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "iovane/result.hpp"
#include "trace/event.hpp"
#include "trace/repair.hpp"

namespace iovane::trace {

struct ImportOptions {
  RepairOptions repair;
  bool skip_malformed = false;  ///< count lines that cannot be believed and leave them out; otherwise the first fails
  /// Called now and then with bytes read and bytes in all.
  std::function<void(std::uint64_t, std::uint64_t)> progress;
};

/// Imports ftrace text, plain or zstd. The result satisfies the invariant of Trace, which is checked. Errors name the
/// file and line, and the cure.
Result<Trace> import_ftrace(const std::string& path, const ImportOptions& options = {});

}  // namespace iovane::trace
