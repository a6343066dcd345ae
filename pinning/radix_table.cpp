#include "pinning/radix_table.hpp"

#include <sys/mman.h>

#include <cerrno>
#include <new>

#include "base/error_text.hpp"

namespace iovane::pinning {
namespace {

constexpr std::size_t top_bytes = RadixTable::top_entries * sizeof(void*);
// A level-0 array is followed by one bit for every 1,024 of its slots (2 GiB): set when something was put there, never
// cleared. It lets the writer skip what was never used; most of an array is not even resident.
constexpr unsigned group_shift = 31;
constexpr std::uint64_t group_mask = (std::uint64_t{1} << group_shift) - 1;
constexpr std::size_t groups = std::size_t{1} << (RadixTable::top_shift - group_shift);
constexpr std::size_t middle_bytes = RadixTable::level_slots[0] * sizeof(RadixTable::Slot) + granule_bytes;

std::uint64_t& group_word(RadixTable::Slot* middle, std::uint64_t key) noexcept {
  auto* words = reinterpret_cast<std::uint64_t*>(middle + RadixTable::level_slots[0]);
  return words[((key >> group_shift) & (groups - 1)) / 64];
}
constexpr std::uint64_t group_bit(std::uint64_t key) noexcept {
  return std::uint64_t{1} << ((key >> group_shift) & 63U);
}

constexpr std::uint64_t block_bytes(unsigned level) noexcept {
  return std::uint64_t{1} << RadixTable::level_shifts[level];
}
constexpr std::uint64_t block_mask(unsigned level) noexcept { return block_bytes(level) - 1; }

bool fills_block(const MemoryRange& range, std::uint64_t key, unsigned level) noexcept {
  const std::uint64_t first = key & ~block_mask(level);
  return range.start <= first && (first | block_mask(level)) <= range.last;
}

std::size_t resident_bytes(const void* memory, std::size_t bytes) noexcept {
  std::size_t resident = 0;
  unsigned char pages[256];
  const auto* at = static_cast<const std::byte*>(memory);
  for (std::size_t done = 0; done < bytes; done += sizeof pages * granule_bytes) {
    const std::size_t step = bytes - done < sizeof pages * granule_bytes ? bytes - done : sizeof pages * granule_bytes;
    if (mincore(const_cast<std::byte*>(at + done), step, pages) != 0) return bytes;
    for (std::size_t i = 0; i < step / granule_bytes; ++i) resident += (pages[i] & 1U) != 0 ? granule_bytes : 0;
  }
  return resident;
}

}  // namespace

RadixTable::~RadixTable() {
  for (MiddleRecord* m = middles_; m != nullptr; m = m->next) unmap(m->slots, middle_bytes);
  if (top_ != nullptr) unmap(top_, top_bytes);
}

Result<void> RadixTable::open() noexcept {
  void* memory = map_zeroed(top_bytes, granule_bytes, false);
  if (memory == nullptr)
    return base::fail(Errc::out_of_memory, Stage::open, ENOMEM,
                      "the pin index needs {} MiB of address space for its top table; the kernel gave none",
                      top_bytes >> 20);
  // A forked child must not see the parent's pins as its own: the kernel empties the table there (Linux 4.14). Where
  // it cannot, PinIndex's own check of the process id closes the slow path only, so refuse.
  if (madvise(memory, top_bytes, MADV_WIPEONFORK) != 0) {
    const int error = errno;
    unmap(memory, top_bytes);
    return base::fail(Errc::unsupported, Stage::open, error,
                      "the pin index needs madvise(MADV_WIPEONFORK), which Linux has since 4.14");
  }
  top_ = static_cast<std::atomic<Slot*>*>(memory);
  return {};
}

RadixTable::Slot* RadixTable::level0_slot(std::uint64_t key) const noexcept {
  // relaxed: the writer reads what it wrote itself.
  Slot* middle = top_[key >> top_shift].load(std::memory_order_relaxed);
  return middle == nullptr ? nullptr : middle + ((key >> level_shifts[0]) & (level_slots[0] - 1));
}

template <typename F>
void RadixTable::for_each_slot(const MemoryRange& range, F&& f) const noexcept {
  std::uint64_t key = range.start;
  for (;;) {
    Slot* slot = level0_slot(key);
    unsigned level = 0;
    while (!fills_block(range, key, level)) {
      // relaxed: as in level0_slot(). prepare() made the table.
      slot = table_of(slot->word.load(std::memory_order_relaxed));
      ++level;
      slot += (key >> level_shifts[level]) & (level_slots[level] - 1);
    }
    f(*slot, level, key);
    const std::uint64_t slot_last = key | block_mask(level);
    if (slot_last >= range.last) return;
    key = slot_last + 1;
  }
}

RegionId RadixTable::first_in(const MemoryRange& asked) const noexcept {
  if (top_first_ > top_last_) return no_region;
  const MemoryRange used{top_first_ << top_shift, (top_last_ << top_shift) | ((std::uint64_t{1} << top_shift) - 1)};
  if (!asked.overlaps(used)) return no_region;
  const MemoryRange range = asked.common(used);
  std::uint64_t key = range.start;
  for (;;) {
    std::uint64_t skip_mask = (std::uint64_t{1} << top_shift) - 1;
    Slot* middle = top_[key >> top_shift].load(std::memory_order_relaxed);  // relaxed: as in level0_slot()
    if (middle != nullptr && (group_word(middle, key) & group_bit(key)) == 0) {
      skip_mask = group_mask;
    } else if (middle != nullptr) {
      const Slot* slot = middle + ((key >> level_shifts[0]) & (level_slots[0] - 1));
      for (unsigned level = 0;; ++level) {
        skip_mask = block_mask(level);
        const std::uint64_t word = slot->word.load(std::memory_order_relaxed);  // relaxed: as in level0_slot()
        if ((word & region_tag) != 0) return static_cast<RegionId>(word >> 32);
        if (word == 0) break;
        slot = table_of(word) + ((key >> level_shifts[level + 1]) & (level_slots[level + 1] - 1));
      }
    }
    const std::uint64_t skipped_last = key | skip_mask;
    if (skipped_last >= range.last) return no_region;
    key = skipped_last + 1;
  }
}

bool RadixTable::ensure_child(Slot& slot, unsigned child_level) noexcept {
  if (slot.word.load(std::memory_order_relaxed) != 0) return true;  // relaxed: as in level0_slot()
  void* memory = (child_level == 1 ? coarse_tables_ : fine_tables_).take();
  if (memory == nullptr) return false;
  static_assert(sizeof(Slot) * level_slots[1] == 512 && sizeof(Slot) * level_slots[2] == 256);
  auto* table = static_cast<Slot*>(memory);
  // relaxed: nobody sees the table yet. Words of a reused table are 0 already; its link words are not.
  table[0].word.store(0, std::memory_order_relaxed);
  slot.address.store(0, std::memory_order_relaxed);
  // R.table - release, pairs with A.slot: the child's zeroes are visible before it is.
  slot.word.store(reinterpret_cast<std::uint64_t>(table), std::memory_order_release);
  return true;
}

bool RadixTable::prepare_edge(const MemoryRange& range, std::uint64_t key) noexcept {
  Slot* slot = level0_slot(key);
  for (unsigned level = 0; !fills_block(range, key, level); ++level) {
    if (!ensure_child(*slot, level + 1)) return false;
    slot = table_of(slot->word.load(std::memory_order_relaxed)) +  // relaxed: as in level0_slot()
           ((key >> level_shifts[level + 1]) & (level_slots[level + 1] - 1));
  }
  return true;
}

Result<void> RadixTable::prepare(const MemoryRange& range) noexcept {
  bool ok = true;
  for (std::uint64_t t = range.start >> top_shift; t <= range.last >> top_shift && ok; ++t) {
    if (top_[t].load(std::memory_order_relaxed) != nullptr) continue;  // relaxed: as in level0_slot()
    void* record = middle_tables_.take();
    void* slots = record == nullptr ? nullptr : map_zeroed(middle_bytes, granule_bytes, false);
    if (slots == nullptr) {
      if (record != nullptr) middle_tables_.put(record);
      ok = false;
      break;
    }
    middles_ = ::new (record) MiddleRecord{middles_, static_cast<Slot*>(slots)};
    // R.top - release, pairs with A.top in find().
    top_[t].store(middles_->slots, std::memory_order_release);
    if (t < top_first_) top_first_ = t;
    if (t > top_last_) top_last_ = t;
  }
  // Only the two ends can be ragged: every block between them is filled.
  if (ok && prepare_edge(range, range.start) && prepare_edge(range, range.last)) return {};
  if (ok) {
    prune(range.start);
    prune(range.last);
  }
  return base::fail(Errc::out_of_memory, Stage::publish, ENOMEM,
                    "the pin index could not get memory for the tables of one more region");
}

void RadixTable::unlink(Slot& parent, std::uint64_t first_key, unsigned child_level) noexcept {
  Slot* table = table_of(parent.word.load(std::memory_order_relaxed));  // relaxed: as in level0_slot()
  // relaxed: readers that still walk the table find zeroes; reclaim() waits for them by their guards.
  parent.word.store(0, std::memory_order_relaxed);
  base::yield_point("pin.unlink");
  table[0].address.store(reinterpret_cast<std::uint64_t>(limbo_), std::memory_order_relaxed);
  table[1].address.store(first_key | child_level, std::memory_order_relaxed);
  limbo_ = table;
}

// Unlinks the tables above `key` that hold nothing, lowest first.
void RadixTable::prune(std::uint64_t key) noexcept {
  Slot* path[2] = {nullptr, nullptr};
  Slot* slot = level0_slot(key);
  if (slot == nullptr) return;
  unsigned depth = 0;
  for (; depth < 2; ++depth) {
    const std::uint64_t word = slot->word.load(std::memory_order_relaxed);  // relaxed: as in level0_slot()
    if (word == 0 || (word & region_tag) != 0) break;
    path[depth] = slot;
    slot = table_of(word) + ((key >> level_shifts[depth + 1]) & (level_slots[depth + 1] - 1));
  }
  while (depth > 0) {
    --depth;
    // relaxed: as in level0_slot().
    const Slot* table = table_of(path[depth]->word.load(std::memory_order_relaxed));
    std::uint64_t used = 0;
    for (std::uint64_t i = 0; i < level_slots[depth + 1]; ++i)
      used += table[i].word.load(std::memory_order_relaxed) != 0 ? 1U : 0U;
    if (used != 0) return;
    unlink(*path[depth], key & ~block_mask(depth), depth + 1);
  }
}

void RadixTable::write(const MemoryRange& range, RegionId id, Access access, std::uint64_t address) noexcept {
  const std::uint64_t word =
      (std::uint64_t{id} << 32) | (static_cast<std::uint64_t>(access) << access_shift) | region_tag;
  for (std::uint64_t group = range.start >> group_shift; group <= range.last >> group_shift; ++group) {
    const std::uint64_t key = group << group_shift;
    // relaxed: as in level0_slot().
    group_word(top_[key >> top_shift].load(std::memory_order_relaxed), key) |= group_bit(key);
  }
  for_each_slot(range, [&](Slot& slot, unsigned, std::uint64_t key) {
    // R.address - release, pairs with A.address: the 0 that this slot held before is visible with the new address.
    slot.address.store(address + (key - range.start), std::memory_order_release);
    base::yield_point("pin.publish");
    // R.slot - release, pairs with A.slot: address and record are visible before the region is.
    slot.word.store(word, std::memory_order_release);
  });
}

void RadixTable::erase(const MemoryRange& range) noexcept {
  for_each_slot(range, [](Slot& slot, unsigned, std::uint64_t) {
    // relaxed: the reclaimer's barrier orders this store before its look at the guards.
    slot.word.store(0, std::memory_order_relaxed);
    base::yield_point("pin.erase");
  });
  prune(range.start);
  if ((range.start >> level_shifts[1]) != (range.last >> level_shifts[1])) prune(range.last);
}

bool RadixTable::take_accessed(const MemoryRange& range) noexcept {
  bool accessed = false;
  for_each_slot(range, [&](Slot& slot, unsigned, std::uint64_t) {
    // relaxed: a hint. Only marks are set beside us, so a plain test avoids most writes.
    if ((slot.word.load(std::memory_order_relaxed) & accessed_bit) == 0) return;
    slot.word.fetch_and(~accessed_bit, std::memory_order_relaxed);
    accessed = true;
  });
  return accessed;
}

void RadixTable::reclaim() noexcept {
  Slot* waiting = limbo_;
  limbo_ = nullptr;
  while (waiting != nullptr) {
    Slot* table = waiting;
    // relaxed: link words are the writer's own.
    waiting = table_of(table[0].address.load(std::memory_order_relaxed));
    const std::uint64_t tag = table[1].address.load(std::memory_order_relaxed);
    const auto level = static_cast<unsigned>(tag & 3U);
    const MemoryRange keys{tag & ~std::uint64_t{3}, (tag & ~std::uint64_t{3}) | block_mask(level - 1)};
    bool walked = false;
    LeaseGuards::for_each_busy([&](GuardWord w) { walked |= is_walking(w) && walked_keys(w).overlaps(keys); });
    if (walked) {
      table[0].address.store(reinterpret_cast<std::uint64_t>(limbo_), std::memory_order_relaxed);
      limbo_ = table;
    } else {
      (level == 1 ? coarse_tables_ : fine_tables_).put(table);
    }
  }
}

std::size_t RadixTable::table_bytes() const noexcept {
  std::size_t bytes = middle_tables_.mapped_bytes() + fine_tables_.mapped_bytes() + coarse_tables_.mapped_bytes();
  if (top_ != nullptr) bytes += resident_bytes(top_, top_bytes);
  for (const MiddleRecord* m = middles_; m != nullptr; m = m->next) bytes += resident_bytes(m->slots, middle_bytes);
  return bytes;
}

}  // namespace iovane::pinning
