// Memory that one IOAS_MAP or IOAS_MAP_FILE named, and who holds it pinned (the kernel's iopt_pages).
//
// IOAS_COPY shares these objects: an os_page is pinned and charged once, however many areas of however many IOASes on
// the descriptor lead to it, and is let go with the last of them. Pinned is the union of the areas that are filled
// into at least one domain; an area of an IOAS without a domain pins nothing.
//
// Threads. An area's IOAS mutex protects the area. `mutex` protects the counts here, and is skipped while only one area
// refers to the pages: a second reference can only be taken from that area, under the same IOAS mutex.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>

#include "backends/model/accounting.hpp"
#include "backends/model/host_memory.hpp"
#include "base/unique_fd.hpp"

namespace iovane::backends::model {

class Pages {
 public:
  /// Process memory: `bytes` from `address`, any alignment; whole os_pages are held.
  void name_memory(std::uint64_t address, std::uint64_t bytes, bool writable, Ledger ledger) noexcept;
  /// File memory; takes the descriptor.
  void name_file(base::UniqueFd fd, std::uint64_t offset, std::uint64_t bytes, bool writable, Ledger ledger) noexcept;

  bool writable() const noexcept { return writable_; }
  /// Address or file offset of the first os_page.
  std::uint64_t base() const noexcept { return base_; }
  /// Where byte `offset` (from base()) lies in this process. Pinned pages only.
  std::byte* memory(std::uint64_t offset) const noexcept;

  /// An area that covers os_pages [first, last] is being filled. 0, -EFAULT, -ENOMEM (memlock), -EINVAL (file).
  [[nodiscard]] int pin(std::uint64_t first, std::uint64_t last, HostMemory& host, Accounting& accounting,
                        SpaceUsage& usage) noexcept;
  /// A filled area over [first, last] became two, the right one from `right`. 0 or -ENOMEM, which changes nothing.
  [[nodiscard]] int cut(std::uint64_t first, std::uint64_t last, std::uint64_t right) noexcept;
  /// The reverse of pin(), for what is an area now.
  void unpin(std::uint64_t first, std::uint64_t last, Accounting& accounting, SpaceUsage& usage) noexcept;

  // relaxed: the taker holds a reference or the mutex of the IOAS whose area holds one.
  void add_reference() noexcept { references_.fetch_add(1, std::memory_order_relaxed); }
  /// True for the last one: the caller forgets the contents and may reuse the object.
  bool drop_reference() noexcept;
  /// Returns to the state of a new object. No references, nothing pinned.
  void forget() noexcept;

 private:
  bool shared() const noexcept;
  int pin_locked(std::uint64_t first, std::uint64_t last, HostMemory& host, Accounting& accounting, SpaceUsage& usage);
  void unpin_locked(std::uint64_t first, std::uint64_t last, Accounting& accounting, SpaceUsage& usage) noexcept;
  std::uint64_t held_partially(std::uint64_t first, std::uint64_t last) const noexcept;
  void add_partial(std::uint64_t first, std::uint64_t last);
  void drop_partial(std::uint64_t first, std::uint64_t last) noexcept;

  std::uint64_t base_ = 0;
  std::uint64_t page_count_ = 0;
  bool writable_ = false;
  Ledger ledger_ = Ledger::none;
  bool is_file_ = false;
  std::atomic<std::uint32_t> references_{1};
  std::mutex mutex_;
  std::uint64_t whole_holders_ = 0;  // filled areas that cover every page
  // Where the number of partial holders changes. An entry lives as long as a holder begins or stops there, even if the
  // changes cancel out, so that dropping a holder never has to allocate.
  struct Boundary {
    std::int64_t change = 0;
    std::uint32_t users = 0;
  };
  std::map<std::uint64_t, Boundary> partial_;
  base::UniqueFd fd_;
  FileWindow window_;
};

}  // namespace iovane::backends::model
