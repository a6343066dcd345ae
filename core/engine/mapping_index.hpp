// The index of live mappings of one address space.
//
// Purpose: says what is mapped where, in address order, and gives every mapping a name that outlives it safely.
// Roles: one thread at a time (the holder of the address space's lane). No locks, no atomics.
// Structure: records are cells of a slab, linked in address order. Above them stands a radix tree over start addresses,
//   six bits per level, in which a node exists only where at least two records part ways (as in PATRICIA, Morrison
//   1968; small and large nodes as in the adaptive radix tree, Leis et al. 2013). A lookup that hits follows one
//   pointer per level and compares nothing until it reaches a record; the links make neighbours, and with them overlap
//   checks and scans, one step. Compared with B+-trees: no keys to search in a node and none to move.
//   The finger, the node touched last, saves the descent for operations near the last one.
// Cost: insert, erase and lookups walk at most 11 nodes whatever is live; scans are linear in what they visit.
// Memory: 64 bytes per record and nodes of 64 (up to 5 children) or 576 bytes; the worst case is about 210 bytes per
//   record, dense spaces need about 75. It grows with what is live, is reused at once, and is given back by the
//   destructor.
// Proven by: tests/unit/mapping_index_test, tests/model/mapping_index_model_test,
//   tests/exhaustive/mapping_index_exhaustive_test, tests/fault/mapping_index_fault_test.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <type_traits>

#include "base/memory_source.hpp"
#include "base/object_pool.hpp"
#include "base/slab.hpp"
#include "engine/radix_node.hpp"
#include "iovane/mapping_id.hpp"
#include "iovane/result.hpp"
#include "iovane/types.hpp"

namespace iovane::engine {

/// Where a mapping is in its life.
enum class MappingState : std::uint8_t {
  mapping,      ///< its map has been given to the backend
  live,         ///< devices can reach it
  unmapping,    ///< its unmap has been given to the backend
  stale,        ///< relaxed mode: its unmap was answered, and waits for the flush
  quarantined,  ///< its unmap failed: never reused
};
std::string_view to_string(MappingState state) noexcept;

/// What is known about one mapping. The owner may change everything but `range` in place.
struct MappingRecord {
  IovaRange range{};
  std::uint64_t memory = 0;
  std::uint32_t region = 0;
  Access access{};
  MappingState state{};
  std::uint16_t flags = 0;
  std::uint32_t tag = 0;
};
static_assert(sizeof(MappingRecord) <= 48);

namespace detail {
struct MappingEntry {
  MappingRecord record;
  MappingEntry* prev = nullptr;
  MappingEntry* next = nullptr;
};
static_assert(base::Slab<MappingEntry>::cell_bytes == 64, "one cache line per mapping; radix::Ref needs the alignment");
}  // namespace detail

class MappingIndex {
 public:
  /// An empty index of at most `mappings_max` (at least 1) records. Metadata comes from `source`, which outlives it.
  /// Errors: invalid_argument.
  static Result<MappingIndex> create(std::uint32_t mappings_max, base::MemorySource& source = base::heap_memory());
  MappingIndex(MappingIndex&& o) noexcept;
  MappingIndex& operator=(MappingIndex&& o) noexcept;
  ~MappingIndex() = default;

  /// Adds a record. Errors, which change nothing: invalid_argument (start > last), iova_busy (the detail names the
  /// range in the way and its state), limit_reached, out_of_memory.
  Result<MappingId> insert(const MappingRecord& record) noexcept;
  /// The same for a holder of the lane that may have a remedy and fills the record in place: a record of this range, or
  /// nullptr and nothing changed, at no cost for a text. why_not() then says what insert() would have said.
  MappingRecord* try_insert(IovaRange range) noexcept;
  Error why_not(IovaRange range) const noexcept;
  /// The named record, nullptr when it is gone; valid until it is erased.
  MappingRecord* find(MappingId id) noexcept;
  const MappingRecord* find(MappingId id) const noexcept;
  /// The record that contains `iova`, or none.
  MappingId covering(Iova iova) const noexcept;
  /// The lowest record that overlaps `range`, or none.
  MappingId first_in(IovaRange range) const noexcept;
  /// The next record in address order, or none; none too when `id` is gone.
  MappingId next(MappingId id) const noexcept;
  /// False when `id` is gone. Never fails for want of memory.
  bool erase(MappingId id) noexcept;

  /// The same by address instead of name, for a holder of the lane that walks and edits in one go: records stay where
  /// they are until erased.
  MappingRecord* first_record(IovaRange range) noexcept {
    Entry* const entry = const_cast<Entry*>(first_entry(range));
    return entry != nullptr ? &entry->record : nullptr;
  }
  /// The record of exactly this range, or nullptr.
  MappingRecord* exact(IovaRange range) noexcept;
  static MappingRecord* next_record(MappingRecord* record) noexcept {
    Entry* const next = entry_of(record)->next;
    return next != nullptr ? &next->record : nullptr;
  }
  MappingId id_of(const MappingRecord* record) const noexcept { return id_of(entry_of(record)); }
  void erase(MappingRecord* record) noexcept { remove(entry_of(record)); }
  /// A new name for a record; the old one is gone.
  MappingId rename(MappingRecord* record) noexcept {
    entries_.renew(entry_of(record));
    return id_of(record);
  }

  std::size_t size() const noexcept { return size_; }
  bool empty() const noexcept { return size_ == 0; }
  std::uint32_t mappings_max() const noexcept { return entries_.entries_max(); }
  /// The sum of the records' lengths, at most 2^64-1 (a space that is mapped completely holds 2^64).
  Bytes bytes() const noexcept;

  /// Calls `visit(MappingId, const MappingRecord&)` for every record that overlaps `range`, in address order, until it
  /// returns false (void: never). `visit` must not insert; it may erase the record it was called with.
  template <typename Visit>
  void for_each(IovaRange range, Visit&& visit) const {
    for (const Entry* entry = first_entry(range); entry != nullptr && entry->record.range.start <= range.last;) {
      const Entry* const next = entry->next;
      if constexpr (std::is_void_v<std::invoke_result_t<Visit&, MappingId, const MappingRecord&>>) {
        visit(id_of(entry), entry->record);
      } else {
        if (!visit(id_of(entry), entry->record)) return;
      }
      entry = next;
    }
  }

 private:
  using Entry = detail::MappingEntry;
  // Where a key belongs: below `node` (nothing: at the root), where `child` stands now (nothing: no one).
  struct Place {
    radix::Ref node;
    radix::Ref child;
  };

  MappingIndex(std::uint32_t mappings_max, base::MemorySource& source) noexcept;

  MappingId id_of(const Entry* entry) const noexcept {
    return entry == nullptr ? MappingId{} : MappingId{entries_.handle_of(entry)};
  }
  static_assert(std::is_standard_layout_v<Entry>, "entry_of() relies on an entry and its record sharing an address");
  static Entry* entry_of(MappingRecord* record) noexcept { return reinterpret_cast<Entry*>(record); }
  static const Entry* entry_of(const MappingRecord* record) noexcept { return reinterpret_cast<const Entry*>(record); }
  void remove(Entry* entry) noexcept;
  static Entry* lowest(radix::Ref child) noexcept;
  static Entry* highest(radix::Ref child) noexcept;
  Place locate(std::uint64_t key) const noexcept;
  static Entry* floor_at(const Place& place, std::uint64_t key) noexcept;
  Entry* floor(std::uint64_t key) const noexcept;
  const Entry* first_entry(IovaRange range) const noexcept;

  [[gnu::noinline]] MappingRecord* insert_anywhere(IovaRange range) noexcept;
  Entry* enter(IovaRange range, Entry* below) noexcept;
  void link(Entry* entry) noexcept;
  bool hang(const Place& place, std::uint64_t key, Entry* entry) noexcept;
  bool hang_anywhere(Place place, std::uint64_t key, radix::Ref leaf) noexcept;
  void unhang(std::uint64_t key) noexcept;
  void unhang_from_large(radix::Ref node, std::uint64_t key) noexcept;
  void unhang_from_small(radix::Ref node, std::uint64_t key) noexcept;
  void set_child(radix::Ref parent, std::uint64_t key, radix::Ref child) noexcept;
  radix::Ref widen(radix::Ref node) noexcept;
  void narrow(radix::Ref node) noexcept;
  void dissolve(radix::Ref node, radix::Ref only_child) noexcept;

  base::Slab<Entry> entries_;
  base::ObjectPool<radix::SmallNode> small_nodes_;
  base::ObjectPool<radix::LargeNode> large_nodes_;
  radix::Ref root_;    // a node, the only entry, or nothing
  radix::Ref finger_;  // a node, or nothing
  Entry* head_ = nullptr;
  std::size_t size_ = 0;
  std::uint64_t bytes_ = 0;  // modulo 2^64
};

// Inline: what an operation runs through when it lies beside the last one. Every call that is not made saves two jumps
// that an emulated processor has to look up.

[[gnu::always_inline]] inline MappingRecord* MappingIndex::exact(IovaRange range) noexcept {
  const std::uint64_t key = range.start.value;
  const radix::Ref at = radix::follow(finger_ && radix::covers(finger_, key) ? finger_ : root_, key);
  if (!at) return nullptr;
  MappingRecord& record = at.entry<Entry>()->record;
  return record.range == range ? &record : nullptr;
}

// An entry for `range` above `below` (nothing: the lowest) that nothing points at yet; nullptr when something is in the
// way, or there is no room.
[[gnu::always_inline]] inline MappingIndex::Entry* MappingIndex::enter(IovaRange range, Entry* below) noexcept {
  Entry* const above = below != nullptr ? below->next : head_;
  if (below != nullptr && below->record.range.last >= range.start) [[unlikely]]
    return nullptr;
  if (above != nullptr && above->record.range.start <= range.last) [[unlikely]]
    return nullptr;
  if (size_ == entries_.entries_max()) [[unlikely]]
    return nullptr;
  return entries_.acquire(MappingRecord{.range = range}, below, above);
}

// Makes an entry part of the list that its own links lead into.
inline void MappingIndex::link(Entry* entry) noexcept {
  (entry->prev != nullptr ? entry->prev->next : head_) = entry;
  if (entry->next != nullptr) entry->next->prev = entry;
  ++size_;
  bytes_ += entry->record.range.span() + 1;
}

// Most records go where the last one went: to a free digit of the finger, a large node, with a record below it there.
[[gnu::always_inline]] inline MappingRecord* MappingIndex::try_insert(IovaRange range) noexcept {
  if (!range.well_formed()) [[unlikely]]
    return nullptr;
  const std::uint64_t key = range.start.value;
  if (finger_.is_even() && finger_ && radix::covers(finger_, key)) [[likely]] {
    radix::LargeNode& large = *finger_.large();
    const unsigned digit = finger_.digit_of_large(key);
    const std::uint64_t below = large.present & ((std::uint64_t{1} << digit) - 1);
    if ((large.present >> digit & 1) == 0 && below != 0) [[likely]] {
      const radix::Ref neighbour = large.children[63 - std::countl_zero(below)];
      if (neighbour.is_entry()) [[likely]] {
        Entry* const entry = enter(range, neighbour.entry<Entry>());
        if (entry == nullptr) [[unlikely]]
          return nullptr;
        large.add(digit, radix::Ref::to_entry(entry));
        link(entry);
        return &entry->record;
      }
    }
  }
  return insert_anywhere(range);
}

inline void MappingIndex::unhang_from_large(radix::Ref node, std::uint64_t key) noexcept {
  node.large()->remove(node.digit_of_large(key));
  if (node.large()->is_sparse()) [[unlikely]]
    narrow(node);
}

[[gnu::always_inline]] inline void MappingIndex::remove(Entry* entry) noexcept {
  const std::uint64_t key = entry->record.range.start.value;
  const radix::Ref leaf = radix::Ref::to_entry(entry);
  if (finger_.is_even() && finger_ && radix::covers(finger_, key) &&
      finger_.large()->children[finger_.digit_of_large(key)] == leaf) [[likely]]
    unhang_from_large(finger_, key);
  else
    unhang(key);
  (entry->prev != nullptr ? entry->prev->next : head_) = entry->next;
  if (entry->next != nullptr) entry->next->prev = entry->prev;
  --size_;
  bytes_ -= entry->record.range.span() + 1;
  entries_.release(entry);
}

}  // namespace iovane::engine
