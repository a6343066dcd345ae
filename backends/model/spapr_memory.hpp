// The process's registered memory (arch/powerpc/mm/book3s64/iommu_api.c): one list for all its containers.
#pragma once

#include <cstdint>
#include <list>
#include <mutex>

#include "backends/model/accounting.hpp"
#include "backends/model/host_memory.hpp"

namespace iovane::backends::model {

class SpaprMemory {
 public:
  struct Region {
    std::uint64_t start = 0;
    std::uint64_t bytes = 0;
    std::uint64_t used = 0;    ///< containers that registered it; one more for good when it was given up while mapped
    std::uint64_t mapped = 0;  ///< TCEs that lead into it
  };

  /// The very range, with one more user; pins and charges it when it is new. 0, -EINVAL (overlaps another), -ENOMEM,
  /// -EFAULT, or a positive number of pages: as many could be pinned, and none stayed.
  long acquire(std::uint64_t start, std::uint64_t bytes, HostMemory& host, Accounting& accounting, SpaceUsage& usage,
               Region*& out);
  /// One user less. While TCEs lead into it, it stays pinned for good.
  void release(Region* region, Accounting& accounting, SpaceUsage& usage) noexcept;
  /// The region of exactly this range, or nullptr.
  Region* find(std::uint64_t start, std::uint64_t bytes) noexcept;
  /// One more TCE leads into the region that has all of [address, address + bytes); false when none has.
  bool map(std::uint64_t address, std::uint64_t bytes) noexcept;
  void unmap(std::uint64_t address) noexcept;
  /// Pages that stay pinned without a user.
  std::uint64_t orphan_pages() const noexcept;

 private:
  Region* containing(std::uint64_t address, std::uint64_t bytes) noexcept;

  mutable std::mutex mutex_;
  std::list<Region> regions_;
  std::uint64_t orphan_pages_ = 0;
};

}  // namespace iovane::backends::model
