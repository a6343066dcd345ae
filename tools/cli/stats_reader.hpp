// Reads the statistics pages of other processes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "iovane/result.hpp"
#include "iovane/stats.hpp"

namespace iovane::cli {

/// One address space of one process.
struct SpaceStats {
  std::string page;  ///< the file
  std::uint32_t process = 0;
  bool running = false;  ///< false: the process has ended without removing its page
  std::string name;
  std::string backend;
  std::uint32_t tenant = 0;  ///< changes when the slot gets another address space
  std::uint32_t slot = 0;
  Stats stats;
};

/// The pages in /dev/shm, whoever's this user may read; with `process` only that one's.
std::vector<std::string> find_pages(std::uint32_t process);
/// The rows of a page. Errors: not_found, permission, bad_format (not a page, another version, cut off).
Result<std::vector<SpaceStats>> read_page(const std::string& path);

}  // namespace iovane::cli
