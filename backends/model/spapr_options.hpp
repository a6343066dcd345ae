// What a sPAPR host's platform offers.
#pragma once

#include <cstdint>

#include "iovane/types.hpp"

namespace iovane::backends::model {

struct SpaprOptions {
  IovaRange default_window{Iova{0}, Iova{0x3fff'ffff}};
  Iova high_window{std::uint64_t{1} << 59};  ///< where a window goes while the default one exists
  std::uint64_t page_sizes = (1U << 12) | (1U << 16) | (1U << 21) | (1U << 24);  ///< bit n: TCEs of 2^n bytes
  std::uint32_t windows_max = 2;
  std::uint32_t levels_max = 5;
  /// Entries that one level of a table may hold at most: more need a further level (create says ENOMEM before).
  std::uint64_t level_entries_max = std::uint64_t{1} << 24;
  bool several_groups = true;  ///< groups may share a container (powernv); false: EBUSY
  bool huge_backing = true;    ///< memory counts as backed by pages as large as any TCE; false: by os_pages
  bool eeh = true;
};

}  // namespace iovane::backends::model
