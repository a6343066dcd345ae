#include "iova/metadata_arena.hpp"

#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <utility>

#include "base/checked_math.hpp"
#include "base/error_text.hpp"
#include "base/yield_point.hpp"

namespace iovane::iova {
namespace {

constexpr unsigned id_bits = 26;
constexpr std::uint64_t id_mask = (std::uint64_t{1} << id_bits) - 1;
static_assert((id_mask + 1) * MetadataArena::step_bytes == MetadataArena::limit_bytes_max);

constexpr std::uint64_t limit_bytes_min = std::uint64_t{64} << 10;
// Kept back for free(): enough tree nodes to give back space when an allocation found the arena full.
constexpr std::uint64_t reserve_bytes = std::uint64_t{24} << 10;

constexpr std::uint64_t huge_page_bytes = std::uint64_t{2} << 20;

// Address space without memory. What lies behind the first huge page asks for huge ones: records of many intervals are
// visited in random order, and one page fault in 3,000 runs is better than one in six. Null: errno says why.
std::byte* reserve(std::uint64_t bytes) noexcept {
  const bool large = bytes >= 4 * huge_page_bytes;
  const std::uint64_t room = large ? bytes + huge_page_bytes : bytes;
  void* const got = ::mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) return nullptr;
  auto* const start = static_cast<std::byte*>(got);
  if (!large) return start;
  const auto address = reinterpret_cast<std::uintptr_t>(start);
  const std::uint64_t before = *base::align_up(address, huge_page_bytes) - address;
  if (before != 0) ::munmap(start, before);
  // The end in whole pages of the system's, whatever their size: what is kept too much holds nothing.
  ::munmap(start + before + bytes, huge_page_bytes - before);
  // Without huge pages it is slower and nothing else.
  ::madvise(start + before + huge_page_bytes, bytes - huge_page_bytes, MADV_HUGEPAGE);
  return start + before;
}

constexpr std::uint64_t with_next_tag(std::uint64_t head, ObjectId id) noexcept {
  return (((head >> id_bits) + 1) << id_bits) | id;
}
constexpr ObjectId id_in(std::uint64_t head) noexcept { return static_cast<ObjectId>(head & id_mask); }

}  // namespace

Result<MetadataArena> MetadataArena::create(Bytes limit) {
  if (limit.value < limit_bytes_min || limit.value > limit_bytes_max)
    return base::fail(Errc::invalid_argument, Stage::validate, 0, "metadata limit of {} bytes; expected {} to {}",
                      limit.value, limit_bytes_min, limit_bytes_max);
  const std::uint64_t bytes = base::align_down(limit.value, step_bytes);
  std::byte* const base = reserve(bytes);
  if (base == nullptr) {
    const int why = errno;
    return base::fail(Errc::out_of_memory, Stage::open, why,
                      "cannot reserve {} bytes of address space for IOVA metadata; lower the limit or raise RLIMIT_AS",
                      bytes);
  }
  return MetadataArena{base, bytes};
}

MetadataArena::MetadataArena(std::byte* base, std::uint64_t limit) noexcept
    : base_{base}, limit_{limit}, cursor_{step_bytes} {}

MetadataArena::MetadataArena(MetadataArena&& o) noexcept
    // relaxed: moving happens before the arena is shared.
    : base_{std::exchange(o.base_, nullptr)}, limit_{o.limit_}, cursor_{o.cursor_.load(std::memory_order_relaxed)} {
  for (std::size_t k = 0; k < object_kinds; ++k) {
    // relaxed: as above.
    free_[k].head.store(o.free_[k].head.load(std::memory_order_relaxed), std::memory_order_relaxed);
    free_[k].bytes_free.store(o.free_[k].bytes_free.load(std::memory_order_relaxed), std::memory_order_relaxed);
  }
}

MetadataArena::~MetadataArena() {
  if (base_ != nullptr) ::munmap(base_, limit_);
}

// Who takes the first bytes of a block makes the whole block present in one system call, instead of one page fault in
// six runs. 4 OS pages: the call stays rarer than one allocation in a thousand, and short. Where the kernel has none
// (before 5.14) the faults come one by one.
void MetadataArena::populate_behind(std::uint64_t from, std::uint64_t to) noexcept {
#if defined(MADV_POPULATE_WRITE)
  constexpr std::uint64_t block = std::uint64_t{16} << 10;
  if (from / block == to / block) return;
  const std::uint64_t begin = base::align_down(to, block);
  if (begin + block <= limit_) ::madvise(base_ + begin, block, MADV_POPULATE_WRITE);
#else
  static_cast<void>(from);
  static_cast<void>(to);
#endif
}

ObjectId MetadataArena::allocate(ObjectKind kind, std::size_t bytes, bool last_resort) noexcept {
  const std::uint64_t size = *base::align_up(bytes, step_bytes);
  FreeList& list = free_[static_cast<std::size_t>(kind)];
  // R.free - acquire, pairs with W.free in release(): the object's link is visible.
  std::uint64_t head = list.head.load(std::memory_order_acquire);
  while (id_in(head) != 0) {
    // relaxed: the tag in `head` tells whether this link was still the object's when the CAS succeeds.
    const ObjectId next = at<ArenaObject>(id_in(head))->next_free.load(std::memory_order_relaxed);
    base::yield_point("arena.pop");
    // A.pop - acq_rel: acquires the object's last user's writes, passes them on. Linearization of a reuse.
    if (list.head.compare_exchange_weak(head, with_next_tag(head, next), std::memory_order_acq_rel,
                                        std::memory_order_acquire)) {
      // relaxed: a statistic.
      list.bytes_free.fetch_sub(size, std::memory_order_relaxed);
      return id_in(head);
    }
  }
  const std::uint64_t limit = last_resort ? limit_ : limit_ - reserve_bytes;
  // relaxed: the cursor only hands out disjoint offsets of memory that nobody has seen.
  std::uint64_t at_byte = cursor_.load(std::memory_order_relaxed);
  do {
    if (at_byte + size > limit) return 0;
    base::yield_point("arena.bump");
    // relaxed: as above. Linearization of a first use.
  } while (
      !cursor_.compare_exchange_weak(at_byte, at_byte + size, std::memory_order_relaxed, std::memory_order_relaxed));
  populate_behind(at_byte, at_byte + size);
  return static_cast<ObjectId>(at_byte / step_bytes);
}

void MetadataArena::release(ObjectKind kind, std::size_t bytes, ObjectId id) noexcept {
  const std::uint64_t size = *base::align_up(bytes, step_bytes);
  FreeList& list = free_[static_cast<std::size_t>(kind)];
  // relaxed: a statistic.
  list.bytes_free.fetch_add(size, std::memory_order_relaxed);
  // relaxed: only the value to compare with.
  std::uint64_t head = list.head.load(std::memory_order_relaxed);
  do {
    // relaxed: published by W.free.
    at<ArenaObject>(id)->next_free.store(id_in(head), std::memory_order_relaxed);
    base::yield_point("arena.push");
    // W.free - release, pairs with R.free and A.pop. The tag need not change: only pops are fooled by a repeated head,
    // and each pop changes it.
  } while (!list.head.compare_exchange_weak(head, (head & ~id_mask) | id, std::memory_order_acq_rel,
                                            std::memory_order_relaxed));
}

std::uint64_t MetadataArena::bytes_high_water() const noexcept {
  // relaxed: a statistic.
  return cursor_.load(std::memory_order_relaxed) - step_bytes;
}

std::uint64_t MetadataArena::bytes_in_use() const noexcept {
  std::uint64_t bytes = bytes_high_water();
  for (const FreeList& list : free_) {
    // relaxed: a statistic; the two loads are of different moments, so it is kept from going below zero.
    const std::uint64_t unused = list.bytes_free.load(std::memory_order_relaxed);
    bytes -= unused < bytes ? unused : bytes;
  }
  return bytes;
}

}  // namespace iovane::iova
