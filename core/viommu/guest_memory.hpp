// GuestMemory: a VMM's view of guest RAM, for code that must believe nothing it reads there.
//
// Purpose: translate guest physical addresses to host memory and read or write small things in it, while the guest
// changes the bytes and the VMM adds and removes regions.
// Roles: any number of readers through View; add() and remove() are control plane, one at a time (a mutex).
// Progress: taking and dropping a View never waits; remove() waits for the Views that were taken before it, so
// afterwards the VMM may unmap the memory. A View from view() costs two atomic adds, one from a Reader two plain
// stores. Invariant: a reader announces itself before it loads the region table, and remove() stores the new table
// before it looks for announcements; so a reader that still sees the old table is seen.
//   view(): a counter, in the single order of seq_cst. Counters come in two sets that take turns (as in the kernel's
//   SRCU, kernel/rcu/srcutree.c), so new readers cannot keep remove() waiting.
//   Reader: a word that is odd while its View lives and that no two Views share, so remove() waits for a change of each
//   word that it found odd. The announcement is ordered by base/asymmetric_barrier.hpp.
// Read once: every accessor loads each byte of guest memory exactly once, with relaxed atomic loads of up to eight
// bytes; decisions are made on the value that was read, never on a second look.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "base/asymmetric_barrier.hpp"
#include "base/cacheline.hpp"
#include "iovane/result.hpp"
#include "iovane/types.hpp"

namespace iovane::viommu {

/// Names a region for as long as it exists; never reused within one GuestMemory.
struct RegionId {
  std::uint32_t value = 0;
  constexpr auto operator<=>(const RegionId&) const noexcept = default;
  constexpr explicit operator bool() const noexcept { return value != 0; }
};

/// What a VMM knows about a piece of guest RAM.
struct RegionConfig {
  std::uint64_t gpa = 0;         ///< first guest physical address; 4 KiB aligned
  Bytes length{};                ///< multiple of 4 KiB
  std::byte* address = nullptr;  ///< where it is mapped in this process; null: `fd` is mapped by add() (shared)
  int fd = -1;                   ///< what backs it, when known: backends that pin files use it. Borrowed
  std::uint64_t fd_offset = 0;   ///< bytes; 4 KiB aligned
  bool read_only = false;        ///< the guest's devices may only read it (ROM)
};

struct Region {
  RegionId id{};
  std::uint64_t gpa = 0;
  std::uint64_t last = 0;  ///< last guest physical address, included
  std::byte* address = nullptr;
  int fd = -1;
  std::uint64_t fd_offset = 0;
  bool read_only = false;
  bool own_mapping = false;

  bool contains(std::uint64_t a) const noexcept { return gpa <= a && a <= last; }
  Bytes length() const noexcept { return {last - gpa + 1}; }
};

namespace detail {
/// Immutable once published.
struct RegionTable {
  std::vector<Region> regions;      // sorted by gpa
  std::uint64_t generation = 0;     // counts every change of the regions
  const Region* largest = nullptr;  // where a search looks first
};
}  // namespace detail

/// Copy to or from memory that a guest may be writing at the same time: every byte is loaded or stored once, by relaxed
/// atomic accesses of at most eight bytes.
void copy_from_guest(std::byte* to, const std::byte* from, std::size_t bytes) noexcept;
void copy_to_guest(std::byte* to, const std::byte* from, std::size_t bytes) noexcept;

class GuestMemory {
 public:
  GuestMemory();
  GuestMemory(const GuestMemory&) = delete;
  GuestMemory& operator=(const GuestMemory&) = delete;
  ~GuestMemory();

  /// Adds a region. The memory is borrowed until remove() returned (or the destructor ran). Errors: invalid_argument
  /// (misaligned, empty, overlapping, neither address nor descriptor), overflow, and mmap's own. A descriptor's size is
  /// checked here; the VMM must not truncate it afterwards (seal it with F_SEAL_SHRINK).
  Result<RegionId> add(const RegionConfig& config);
  /// Takes a region out of the view and waits until no View refers to it. The shadow domains' mappings of it must have
  /// been withdrawn before (Frontend::memory_removing does it). Never call with a View in hand: it would wait for it.
  Result<void> remove(RegionId id);

  /// The regions, for those who mirror them: a copy.
  std::vector<Region> regions() const;

  class View;
  class Reader;
  /// Any thread, lock-free. Keep it for one guest action, not for longer: remove() waits for it.
  View view() const noexcept;

 private:
  friend class View;
  static constexpr std::uint32_t stripes = 32;
  struct alignas(base::cacheline_bytes) ReaderStripe {
    std::array<std::atomic<std::uint64_t>, 2> readers{};
  };
  void wait_for_readers() noexcept;
  void enlist(Reader& reader) const;
  void dismiss(Reader& reader) const noexcept;

  std::atomic<const detail::RegionTable*> table_;
  mutable std::array<ReaderStripe, stripes> readers_;
  std::atomic<std::uint32_t> phase_{0};  // whose set of counters new readers use
  mutable std::mutex control_;           // add, remove, enlist, dismiss; guards what follows
  mutable std::vector<Reader*> enlisted_;
  std::uint32_t next_id_ = 1;
};

/// Guest memory as it is during one guest action. Move-only, used by one thread.
class GuestMemory::View {
 public:
  View(View&& o) noexcept;
  View& operator=(View&&) = delete;
  ~View();

  /// The region that holds an address, or null.
  const Region* find(std::uint64_t gpa) const noexcept {
    if (largest_ != nullptr && largest_->contains(gpa)) return largest_;
    if (other_ != nullptr && other_->contains(gpa)) return other_;
    return find_slow(gpa);
  }
  /// The first address above `gpa` at which a region begins; nothing when none does.
  std::optional<std::uint64_t> next_region_start(std::uint64_t gpa) const noexcept;
  /// The 512 words of a 4 KiB guest table, or null when it is not RAM. `gpa` is 4 KiB aligned. The guest may write to
  /// them meanwhile: read each with load() and once.
  const std::uint64_t* table(std::uint64_t gpa) const noexcept {
    const Region* region = find(gpa);
    if (region == nullptr) return nullptr;
    return reinterpret_cast<const std::uint64_t*>(region->address + (gpa - region->gpa));
  }
  /// One word of guest memory, once.
  static std::uint64_t load(const std::uint64_t* word) noexcept {
    // relaxed: the guest orders its stores with its own invalidation; nothing else is read through the value.
    return __atomic_load_n(word, __ATOMIC_RELAXED);
  }
  /// An aligned little-endian word.
  std::optional<std::uint64_t> read_le64(std::uint64_t gpa) const noexcept;
  /// An aligned big-endian word.
  std::optional<std::uint64_t> read_be64(std::uint64_t gpa) const noexcept;
  /// Copies bytes, which may lie in several adjacent regions. False when any is not RAM; `out` is then unspecified.
  bool read(std::uint64_t gpa, std::span<std::byte> out) const noexcept;
  /// Stores an aligned little-endian 32-bit value after everything this thread did before (release).
  bool write_le32(std::uint64_t gpa, std::uint32_t value) const noexcept;
  bool write(std::uint64_t gpa, std::span<const std::byte> in) const noexcept;

  std::span<const Region> regions() const noexcept { return table_->regions; }
  /// Two views of one GuestMemory with the same number see the same regions: host pointers of one are good in the
  /// other.
  std::uint64_t generation() const noexcept { return table_->generation; }

 private:
  friend class GuestMemory;
  View(const GuestMemory& memory, std::uint32_t stripe, std::uint32_t phase) noexcept;
  View(const GuestMemory& memory, Reader& reader) noexcept;
  const Region* find_slow(std::uint64_t gpa) const noexcept;

  const GuestMemory* memory_;  // null: moved from
  const detail::RegionTable* table_;
  Reader* reader_ = nullptr;  // whose View it is, if any
  // Where a search looks first: a guest's tables and queues often lie in another region than what its devices use.
  const Region* largest_ = nullptr;
  mutable const Region* other_ = nullptr;
  std::uint32_t stripe_ = 0;
  std::uint32_t phase_ = 0;
};

/// One who takes a View for each of many guest actions, and uses one thread at a time. Its Views may nest.
class GuestMemory::Reader {
 public:
  /// `memory` outlives it.
  explicit Reader(const GuestMemory& memory) : memory_{memory} { memory.enlist(*this); }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;
  ~Reader() { memory_.dismiss(*this); }

  View view() noexcept { return View{memory_, *this}; }

 private:
  friend class GuestMemory;
  friend class View;
  const GuestMemory& memory_;
  std::uint32_t depth_ = 0;              // Views that live: its own thread's
  std::atomic<std::uint64_t> turns_{0};  // odd while one lives
};

inline GuestMemory::View::View(const GuestMemory& memory, Reader& reader) noexcept
    : memory_{&memory}, reader_{&reader} {
  if (reader.depth_++ == 0)
    // W.announce - pairs with A.turns in wait_for_readers(). relaxed load: only this reader stores it.
    base::announce(reader.turns_, reader.turns_.load(std::memory_order_relaxed) + 1);
  // A.table - pairs with R.table: the regions are there. seq_cst: after the announcement.
  table_ = memory.table_.load(std::memory_order_seq_cst);
  largest_ = table_->largest;
}

inline GuestMemory::View::~View() {
  if (memory_ == nullptr) return;
  if (reader_ == nullptr) {
    // R.readers - pairs with A.readers in wait_for_readers().
    memory_->readers_[stripe_].readers[phase_].fetch_sub(1, std::memory_order_release);
  } else if (--reader_->depth_ == 0) {
    // R.turns - pairs with A.turns: what the View read happened before the memory goes. relaxed load: as above.
    reader_->turns_.store(reader_->turns_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
  }
}

inline bool GuestMemory::View::write_le32(std::uint64_t gpa, std::uint32_t value) const noexcept {
  const Region* region = (gpa & 3U) == 0 ? find(gpa) : nullptr;
  if (region == nullptr || region->read_only) return false;
  if constexpr (std::endian::native == std::endian::big) value = __builtin_bswap32(value);
  // R.status - pairs with the guest's own load: it sees the completion after everything it stands for.
  __atomic_store_n(reinterpret_cast<std::uint32_t*>(region->address + (gpa - region->gpa)), value, __ATOMIC_RELEASE);
  return true;
}

}  // namespace iovane::viommu
