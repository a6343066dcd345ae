#include "iova/metadata_arena.hpp"

#include <sys/mman.h>

#include <cerrno>
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
  void* base = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    const int why = errno;
    return base::fail(Errc::out_of_memory, Stage::open, why,
                      "cannot reserve {} bytes of address space for IOVA metadata; lower the limit or raise RLIMIT_AS",
                      bytes);
  }
  return MetadataArena{static_cast<std::byte*>(base), bytes};
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
