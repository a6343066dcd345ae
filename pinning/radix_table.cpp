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

// `slot` is the one for `key`.
std::uint64_t& group_word(const RadixTable::Slot* slot, std::uint64_t key) noexcept {
  const std::uint64_t at = (key >> RadixTable::level_shifts[0]) & (RadixTable::level_slots[0] - 1);
  auto* words = reinterpret_cast<std::uint64_t*>(const_cast<RadixTable::Slot*>(slot) - at + RadixTable::level_slots[0]);
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

RadixTable::Place RadixTable::lowest(std::uint64_t key) const noexcept {
  Slot* slot = level0_slot(key);
  // A.slot - acquire, pairs with R.table, for mark_accessed(); the writer reads what it wrote itself.
  std::uint64_t word = slot->load(std::memory_order_acquire);
  unsigned level = 0;
  for (; is_table(word); word = slot->load(std::memory_order_acquire)) {  // A.slot
    ++level;
    slot = table_of(word) + ((key >> level_shifts[level]) & (level_slots[level] - 1));
  }
  return {slot, level, word};
}

void RadixTable::mark_accessed(std::uint64_t key, std::uint64_t word) const noexcept {
  const Place place = lowest(key);  // its tables were there a moment ago, and the walking guard keeps them
  // relaxed both: a hint. The exchange (rather than a store) keeps an erased slot erased.
  if (place.word == word)
    place.slot->compare_exchange_strong(word, word | accessed_bit, std::memory_order_relaxed,
                                        std::memory_order_relaxed);
}

template <typename F>
void RadixTable::for_each_slot(const MemoryRange& range, F&& f) const noexcept {
  std::uint64_t key = range.start;
  for (;;) {
    const Place place = lowest(key);
    f(*place.slot, place.level, key);
    const std::uint64_t slot_last = key | block_mask(place.level);
    if (slot_last >= range.last) return;
    key = slot_last + 1;
  }
}

std::uint64_t RadixTable::word_for(RegionId id, unsigned level, std::uint64_t key) const noexcept {
  const RegionRecord& record = records_.at(id);
  std::uint64_t frame = frame_in_record;
  if (fills_block(record.range(), key, level)) {
    const std::uint64_t address = record.handle.address + ((key & ~block_mask(level)) - record.start());
    if (address % granule_bytes == 0 && address / granule_bytes < frame_in_record) frame = address / granule_bytes;
  }
  return (std::uint64_t{id} << id_shift) | (frame << frame_shift) |
         (static_cast<std::uint64_t>(record.access()) << access_shift) | region_tag;
}

RegionId RadixTable::first_in(const MemoryRange& asked) const noexcept {
  if (top_first_ > top_last_) return no_region;
  const MemoryRange used{top_first_ << top_shift, (top_last_ << top_shift) | ((std::uint64_t{1} << top_shift) - 1)};
  if (!asked.overlaps(used)) return no_region;
  const MemoryRange range = asked.common(used);
  std::uint64_t key = range.start;
  for (;;) {
    std::uint64_t skip_mask = (std::uint64_t{1} << top_shift) - 1;
    const Slot* middle = level0_slot(key);
    if (middle != nullptr && (group_word(middle, key) & group_bit(key)) == 0) {
      skip_mask = group_mask;
    } else if (middle != nullptr) {
      const Place place = lowest(key);
      if ((place.word & region_tag) != 0 && records_.at(id_of(place.word)).range().overlaps({key, range.last}))
        return id_of(place.word);
      skip_mask = block_mask(place.level);
    }
    const std::uint64_t skipped_last = key | skip_mask;
    if (skipped_last >= range.last) return no_region;
    key = skipped_last + 1;
  }
}

// A region stood alone in the block of `slot`, which it does not fill, and gets company: a table takes its place.
bool RadixTable::split(Slot& slot, unsigned level, std::uint64_t key) noexcept {
  void* memory = (level == 0 ? coarse_tables_ : fine_tables_).take();
  if (memory == nullptr) return false;
  static_assert(sizeof(Slot) * level_slots[1] == 256 && sizeof(Slot) * level_slots[2] == 128);
  auto* table = static_cast<Slot*>(memory);
  // relaxed: nobody sees the table yet. Words of a reused table are 0 already; its link words are not.
  table[0].store(0, std::memory_order_relaxed);
  table[1].store(0, std::memory_order_relaxed);
  const std::uint64_t word = slot.load(std::memory_order_relaxed);  // relaxed: as in level0_slot()
  const RegionId id = id_of(word);
  const std::uint64_t first = key & ~block_mask(level);
  const MemoryRange part = records_.at(id).range().common({first, first | block_mask(level)});
  for (std::uint64_t at = part.start;;) {
    // relaxed: as above. A mark that is set right now may be lost: it is a hint.
    table[(at >> level_shifts[level + 1]) & (level_slots[level + 1] - 1)].store(
        word_for(id, level + 1, at) | (word & accessed_bit), std::memory_order_relaxed);
    const std::uint64_t slot_last = at | block_mask(level + 1);
    if (slot_last >= part.last) break;
    at = slot_last + 1;
  }
  base::yield_point("pin.split");
  // R.table - release, pairs with A.slot: the table is complete before it is seen.
  slot.store(reinterpret_cast<std::uint64_t>(table) | table_tag, std::memory_order_release);
  return true;
}

// At an end of a range that is to be written: makes the slot for it.
bool RadixTable::prepare_edge(std::uint64_t key) noexcept {
  for (;;) {
    const Place place = lowest(key);
    if (place.word == 0) return true;
    if (!split(*place.slot, place.level, key)) return false;
  }
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
  if (ok && prepare_edge(range.start) && prepare_edge(range.last)) return {};
  return base::fail(Errc::out_of_memory, Stage::publish, ENOMEM,
                    "the pin index could not get memory for the tables of one more region");
}

void RadixTable::unlink(Slot& parent, std::uint64_t first_key, unsigned child_level) noexcept {
  Slot* table = table_of(parent.load(std::memory_order_relaxed));  // relaxed: as in level0_slot()
  // relaxed: readers that still walk the table find nothing; reclaim() waits for them by their guards.
  parent.store(0, std::memory_order_relaxed);
  base::yield_point("pin.unlink");
  // relaxed: link words mean nothing to a reader, as their low bits are 00.
  table[0].store(reinterpret_cast<std::uint64_t>(limbo_), std::memory_order_relaxed);
  table[1].store(first_key | (child_level << 2), std::memory_order_relaxed);
  limbo_ = table;
}

// Unlinks the tables above `key` that hold nothing, lowest first.
void RadixTable::prune(std::uint64_t key) noexcept {
  Slot* path[2] = {nullptr, nullptr};
  Slot* slot = level0_slot(key);
  if (slot == nullptr) return;
  unsigned depth = 0;
  for (; depth < 2; ++depth) {
    const std::uint64_t word = slot->load(std::memory_order_relaxed);  // relaxed: as in level0_slot()
    if (!is_table(word)) break;
    path[depth] = slot;
    slot = table_of(word) + ((key >> level_shifts[depth + 1]) & (level_slots[depth + 1] - 1));
  }
  while (depth > 0) {
    --depth;
    // relaxed: as in level0_slot().
    const Slot* table = table_of(path[depth]->load(std::memory_order_relaxed));
    std::uint64_t used = 0;
    for (std::uint64_t i = 0; i < level_slots[depth + 1]; ++i)
      used += table[i].load(std::memory_order_relaxed) != 0 ? 1U : 0U;
    if (used != 0) return;
    unlink(*path[depth], key & ~block_mask(depth), depth + 1);
  }
}

void RadixTable::write(RegionId id) noexcept {
  RegionRecord& record = records_.at(id);
  const MemoryRange range = record.range();
  for (std::uint64_t group = range.start >> group_shift; group <= range.last >> group_shift; ++group) {
    const std::uint64_t key = group << group_shift;
    // relaxed: as in level0_slot().
    group_word(level0_slot(key), key) |= group_bit(key);
  }
  for_each_slot(range, [&](Slot& slot, unsigned level, std::uint64_t key) {
    if (!fills_block(range, key, level)) record.widen_reach(level_shifts[level]);  // I2
    base::yield_point("pin.publish");
    // R.slot - release, pairs with A.slot: the record is visible before the region is.
    slot.store(word_for(id, level, key), std::memory_order_release);
  });
}

void RadixTable::erase(RegionId id) noexcept {
  const MemoryRange range = records_.at(id).range();
  for_each_slot(range, [](Slot& slot, unsigned, std::uint64_t) {
    // relaxed: the reclaimer's barrier orders this store before its look at the guards.
    slot.store(0, std::memory_order_relaxed);
    base::yield_point("pin.erase");
  });
  prune(range.start);
  if ((range.start >> level_shifts[1]) != (range.last >> level_shifts[1])) prune(range.last);
}

bool RadixTable::take_accessed(RegionId id) noexcept {
  bool accessed = false;
  for_each_slot(records_.at(id).range(), [&](Slot& slot, unsigned, std::uint64_t) {
    // relaxed: a hint. Only marks are set beside us, so a plain test avoids most writes.
    if ((slot.load(std::memory_order_relaxed) & accessed_bit) == 0) return;
    slot.fetch_and(~accessed_bit, std::memory_order_relaxed);
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
    waiting = reinterpret_cast<Slot*>(table[0].load(std::memory_order_relaxed));
    const std::uint64_t tag = table[1].load(std::memory_order_relaxed);
    const auto level = static_cast<unsigned>((tag >> 2) & 3U);
    const std::uint64_t first = tag & ~block_mask(2);
    const MemoryRange keys{first, first | block_mask(level - 1)};
    bool walked = false;
    LeaseGuards::for_each_busy([&](GuardWord w) { walked |= is_walking(w) && walked_keys(w).overlaps(keys); });
    if (walked) {
      table[0].store(reinterpret_cast<std::uint64_t>(limbo_), std::memory_order_relaxed);
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
