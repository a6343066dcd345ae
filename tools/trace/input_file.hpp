// Opening a file that a user named, with errors that help the user.
#pragma once

#include <cstdint>
#include <string>

#include "base/unique_fd.hpp"
#include "iovane/result.hpp"

namespace iovane::trace {

struct InputFile {
  base::UniqueFd fd;
  std::uint64_t bytes = 0;  ///< its size; 0 for a pipe
};

/// Opens for reading. Folders are refused; pipes are fine.
Result<InputFile> open_input(const std::string& path);

}  // namespace iovane::trace
