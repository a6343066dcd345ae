#include "pinning/pin_index.hpp"

#include <sys/mman.h>

#include <bitset>
#include <cerrno>

#include "base/error_text.hpp"

namespace iovane::pinning {
namespace {

// Numbers in use. Opening an index is rare, so a mutex; never destroyed, for indices in static storage.
constinit std::mutex numbers_lock;
constinit std::bitset<PinIndex::indices_max + 1> numbers_used{1};  // 0 is no index

}  // namespace

Result<void> PinIndex::open() noexcept {
  base::prepare_asymmetric_barrier();
  if (auto opened = table_.open(); !opened) return opened;
  void* word = map_zeroed(granule_bytes, granule_bytes, false);
  if (word == nullptr || madvise(word, granule_bytes, MADV_WIPEONFORK) != 0) {
    if (word != nullptr) unmap(word, granule_bytes);
    return base::fail(Errc::out_of_memory, Stage::open, ENOMEM, "the pin index could not get its fork mark's page");
  }
  alive_ = static_cast<std::atomic<std::uint64_t>*>(word);
  alive_->store(1, std::memory_order_relaxed);  // relaxed: set before the index is shared
  const std::lock_guard held{numbers_lock};
  for (std::uint32_t n = 1; n <= indices_max; ++n)
    if (!numbers_used[n]) {
      numbers_used[n] = true;
      number_ = n;
      return {};
    }
  return base::fail(Errc::limit_reached, Stage::open, 0, "{} pin indices are open in this process already",
                    indices_max);
}

PinIndex::~PinIndex() {
  // In a forked child another thread may have held the lock, for good.
  if (number_ != 0 && !is_forked_copy()) {
    const std::lock_guard held{numbers_lock};
    numbers_used[number_] = false;
  }
  if (alive_ != nullptr) unmap(alive_, granule_bytes);
}

bool PinIndex::is_forked_copy() const noexcept {
  // relaxed: changed only by fork, in the child, before its first instruction.
  return alive_ == nullptr || alive_->load(std::memory_order_relaxed) == 0;
}

std::optional<Translation> PinIndex::translate_first(std::uint64_t key) noexcept {
  if (LeaseGuards::attach() != nullptr) return translate(key);
  const std::lock_guard held{lock_};  // the writer's lock stands in for a guard
  const RadixTable::Found found = table_.find(key);
  if (found.word == 0) return std::nullopt;
  return Translation{found.address, found.slot_last - key + 1, found.id(), found.access()};
}

std::uint64_t PinIndex::last_within(RegionId id, std::uint64_t last) const noexcept {
  if (table_.find(last).id() == id) return last;
  // It ends inside the range (or is being inserted or erased this moment): its record knows where.
  const std::uint64_t region_last = records_.at(id).last();
  return region_last < last ? region_last : last;
}

PinIndex::SlowLease PinIndex::acquire_without_guard(MemoryRange range, Access need, bool note_use) noexcept {
  if (!range.well_formed()) return {};
  if (LeaseGuards::current() == nullptr && LeaseGuards::attach() != nullptr) {
    Lease lease = note_use ? acquire<true>(range, need) : acquire<false>(range, need);
    const SlowLease parts{bool{lease}, lease.word_, lease.id_, lease.address_, lease.length_};
    lease.index_ = nullptr;  // handed over
    return parts;
  }
  return acquire_counted(range, need, note_use);
}

// No guard word is free (or none exists for this thread): walk under the lock, where nothing can be erased, and count.
// erase() takes the same lock, so whoever erases later sees the count.
PinIndex::SlowLease PinIndex::acquire_counted(const MemoryRange& range, Access need, bool note_use) noexcept {
  const std::lock_guard held{lock_};
  const RadixTable::Found found = table_.find(range.start);
  if (!found.allows(need)) return {};
  RegionRecord& record = records_.at(found.id());
  // relaxed: the lock orders it before any erase.
  record.holds.fetch_add(1, std::memory_order_relaxed);
  if (note_use && !found.is_marked()) table_.mark_accessed(range.start, found.word);
  const std::uint64_t last = record.last() < range.last ? record.last() : range.last;
  return {true, nullptr, found.id(), found.address, last - range.start + 1};
}

std::size_t PinIndex::pieces(const MemoryRange& range, std::span<Piece> out) noexcept {
  std::size_t count = 0;
  if (!range.well_formed()) return 0;
  std::uint64_t key = range.start;
  while (count < out.size()) {
    std::uint64_t answered_last = key | (granule_bytes - 1);
    if (const Lease lease = acquire({key, range.last}, Access::none); lease) {
      const RegionRecord& record = records_.at(lease.id());
      answered_last = key + lease.length().value - 1;
      out[count++] = {{key, answered_last}, lease.address(), lease.id(), record.access()};
    } else {
      const auto next = first_in({key, range.last});
      if (!next) return count;
      // Live a moment ago at next->range; go there (or one granule on, should it cover `key` only now).
      if (next->range.start > key) answered_last = next->range.start - 1;
    }
    if (answered_last >= range.last) return count;
    key = answered_last + 1;
  }
  return count;
}

Result<RegionId> PinIndex::insert(const MemoryRange& range, Access access, PinHandle handle,
                                  std::uint8_t node) noexcept {
  if (!range.well_formed() || !range.is_granular() || access == Access::none || node >= nodes_max ||
      range.length().value > region_bytes_max)
    return base::fail(Errc::invalid_argument, Stage::publish, 0,
                      "region [{:#x}, {:#x}] for node {}: expected multiples of {} bytes, at most {} bytes, an access "
                      "right and a node below {}",
                      range.start, range.last, node, granule_bytes, region_bytes_max, nodes_max);
  const std::lock_guard held{lock_};
  if (is_forked_copy())
    return base::fail(Errc::closed, Stage::publish, 0, "the pin index belongs to the process that forked this one");
  if (const RegionId other = table_.first_in(range); other != no_region) {
    const MemoryRange taken = records_.at(other).range();
    return base::fail(Errc::iova_busy, Stage::publish, 0,
                      "region [{:#x}, {:#x}] overlaps [{:#x}, {:#x}], which is live", range.start, range.last,
                      taken.start, taken.last);
  }
  if (auto prepared = table_.prepare(range); !prepared) return prepared.error();
  const RegionId id = records_.take();
  if (id == no_region)
    return base::fail(Errc::limit_reached, Stage::publish, 0, "the pin index has {} regions and takes no more",
                      records_.in_use());
  RegionRecord& record = records_.at(id);
  // relaxed all: R.slot in write() publishes them.
  record.packed.store(range.start | (std::uint64_t{node} << 58) | (static_cast<std::uint64_t>(RegionState::live) << 2) |
                          static_cast<std::uint64_t>(access),
                      std::memory_order_relaxed);
  record.granules.store(static_cast<std::uint32_t>(range.length().value / granule_bytes), std::memory_order_relaxed);
  record.holds.store(0, std::memory_order_relaxed);
  base::yield_point("pin.fill");
  record.handle = handle;
  table_.write(id);
  return id;
}

void PinIndex::erase(RegionId id) noexcept {
  const std::lock_guard held{lock_};
  RegionRecord& record = records_.at(id);
  table_.erase(id);
  record.set_state(RegionState::retired);
}

bool PinIndex::restore(RegionId id) noexcept {
  const std::lock_guard held{lock_};
  RegionRecord& record = records_.at(id);
  const MemoryRange range = record.range();
  if (table_.first_in(range) != no_region || !table_.prepare(range)) return false;
  record.set_state(RegionState::live);
  table_.write(id);
  return true;
}

std::uint64_t PinIndex::find_users(std::span<const RegionId> erased, std::span<bool> in_use) noexcept {
  const std::lock_guard held{lock_};
  base::heavy_barrier();
  base::yield_point("pin.scan");
  // Guards before counts: hold() counts first and drops its guard afterwards, so one of the two is always seen.
  static_assert(batch_max <= 64);
  std::uint64_t walked = 0;
  std::uint64_t used = 0;
  LeaseGuards::for_each_busy([&](GuardWord w) {
    for (std::size_t i = 0; i < erased.size(); ++i) {
      const std::uint64_t bit = std::uint64_t{1} << i;
      if (is_walking(w))
        walked |= walked_keys(w).overlaps(records_.at(erased[i]).walked_range()) ? bit : 0;
      else
        used |= w == leased_guard(number_, erased[i]) ? bit : 0;
    }
  });
  base::yield_point("pin.counts");
  for (std::size_t i = 0; i < erased.size(); ++i) {
    // A.hold - acquire, pairs with R.hold in drop_hold(): the holder's last use comes before the unpin.
    if (records_.at(erased[i]).holds.load(std::memory_order_acquire) != 0) used |= std::uint64_t{1} << i;
    in_use[i] = (((used | walked) >> i) & 1U) != 0;
  }
  if (table_.has_limbo()) table_.reclaim();
  return walked & ~used;
}

void PinIndex::forget(RegionId id) noexcept {
  const std::lock_guard held{lock_};
  records_.put(id);
}

bool PinIndex::take_accessed(RegionId id) noexcept {
  const std::lock_guard held{lock_};
  return table_.take_accessed(id);
}

std::optional<Region> PinIndex::first_in(const MemoryRange& range) noexcept {
  const std::lock_guard held{lock_};
  const RegionId id = table_.first_in(range);
  if (id == no_region) return std::nullopt;
  return region(id);
}

Region PinIndex::region(RegionId id) const noexcept {
  const RegionRecord& record = records_.at(id);
  return {id, record.range(), record.access(), record.node(), record.handle};
}

std::uint32_t PinIndex::region_count() const noexcept {
  const std::lock_guard held{lock_};
  return records_.in_use();
}

std::size_t PinIndex::memory_bytes() const noexcept {
  const std::lock_guard held{lock_};
  return table_.table_bytes() + records_.mapped_bytes();
}

void PinIndex::add_hold(RegionId id) noexcept {
  // relaxed: the caller's guard (or hold) keeps the region until its release, which publishes this count.
  records_.at(id).holds.fetch_add(1, std::memory_order_relaxed);
}

void PinIndex::drop_hold(RegionId id) noexcept {
  // R.hold - release, pairs with A.hold in find_users().
  records_.at(id).holds.fetch_sub(1, std::memory_order_release);
}

Region Lease::region() const noexcept { return index_->region(id_); }
Region Hold::region() const noexcept { return index_->region(id_); }

Hold Lease::hold() const noexcept {
  index_->add_hold(id_);
  base::yield_point("pin.held");
  return Hold{index_, id_, address_, length_};
}

void Lease::drop_counted(PinIndex* index, RegionId id) noexcept { index->drop_hold(id); }

void Hold::drop() noexcept {
  if (index_ == nullptr) return;
  index_->drop_hold(id_);
  index_ = nullptr;
}

}  // namespace iovane::pinning
