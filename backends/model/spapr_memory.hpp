// The process's registered memory (arch/powerpc/mm/book3s64/iommu_api.c): one list for all its containers.
//
// A registration leads to the pages that were there when it was made, whatever the process has at these addresses
// since. This one has no pages to keep, so whoever is about to exchange them says so by pages_leave(): from then on
// what was registered leads to copies.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

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
    struct Free {
      void operator()(std::byte* copy) const noexcept { std::free(copy); }
    };
    using Copy = std::unique_ptr<std::byte, Free>;
    std::map<std::uint64_t, Copy> left;  ///< by os_page: what the process has no longer there
    std::vector<Copy> large;             ///< of larger TCEs' pages, put together from those
  };

  /// The very range, with one more user; pins and charges it when it is new. 0, -EINVAL (overlaps another), -ENOMEM,
  /// -EFAULT, or a positive number of pages: as many could be pinned, and none stayed.
  long acquire(std::uint64_t start, std::uint64_t bytes, HostMemory& host, Accounting& accounting, SpaceUsage& usage,
               Region*& out);
  /// One user less. While TCEs lead into it, it stays pinned for good.
  void release(Region* region, Accounting& accounting, SpaceUsage& usage) noexcept;
  /// The region of exactly this range, or nullptr.
  Region* find(std::uint64_t start, std::uint64_t bytes) noexcept;
  /// One more TCE leads into the region that has all of [address, address + bytes): where to, which is `address` itself
  /// as long as its pages have not left; 0 when none has.
  std::uint64_t map(std::uint64_t address, std::uint64_t bytes);
  /// `place`: what map() answered.
  void unmap(std::uint64_t place) noexcept;
  /// The process is about to have other pages there. TCEs that lead there must be asked about by moved().
  void pages_leave(std::uint64_t address, std::uint64_t bytes);
  /// Where a TCE that leads to `place` has to lead since the last pages_leave().
  std::uint64_t moved(std::uint64_t place, std::uint64_t bytes);
  /// Pages that stay pinned without a user.
  std::uint64_t orphan_pages() const noexcept;

 private:
  Region* containing(std::uint64_t address, std::uint64_t bytes) noexcept;
  std::uint64_t place_of(Region& region, std::uint64_t address, std::uint64_t bytes);

  mutable std::mutex mutex_;
  std::list<Region> regions_;
  std::map<std::uint64_t, Region*> copies_;  ///< which region a copy belongs to, by its place
  std::uint64_t orphan_pages_ = 0;
};

}  // namespace iovane::backends::model
