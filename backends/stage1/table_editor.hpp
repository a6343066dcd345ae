// TableEditor: maps and unmaps by storing entries, from several threads, without a lock.
//
// Roles. Any thread may map and unmap ranges that no other thread is working on (the engine's index sees to that); the
//   ranges may lie in the same table. The device's walker reads all the while. Each batch uses a Session of its own.
// Progress. Lock-free: a thread stopped anywhere holds up nobody. Where a thread finds another's unfinished step in an
//   entry it needs, it finishes that step itself (`draining`, `cutting`, `parked` below). Growing the pool and
//   invalidating are system calls.
// Lifetimes. Tables above level 0 stay until the editor goes: one page per GiB of addresses ever touched. Level-0
//   tables that became empty stay for reuse and are collected when the pool would have to grow (trim()). A level-1
//   entry with a table keeps it: a block of 2 MiB is used only where there is none.
// State of a level-0 table: PageState::users = valid (or parked) entries + sessions inside; or `dead` + helpers,
//   `released` once its collector is done.
// I1. A session that counted itself in (and then saw the table still in its place) keeps it there: a table leaves only
//   through users 0 -> dead, and nobody enters a dead one.
// I2. A table that left its place is given back only after an invalidation that covers what walkers may know of it. Its
//   place says `draining` until then; whoever needs the place earlier makes that invalidation himself.
// I3. No entry goes from valid to another valid value: a block is cut by block -> `cutting` -> (invalidation) -> table,
//   with a moment in between in which the device faults (break before make).
// I4. An entry that was cleared is not used again before its invalidation completed: that is the caller's part.
// I5. A dead table is not given back while a helper is counted in it, so the place that the helper marks still speaks
//   of this life of it. `draining` and `cutting` carry the page's generation for those who come back after an
//   invalidation.
// I6. Sixteen leaves carry the contiguous hint only when one map filled all sixteen places from empty (from not present
//   to present needs no break, in whatever order the sixteen become visible: what a walker takes from the first is what
//   the others are about to say). Before a part of them is cleared the hint goes from all (loosen()): each is parked,
//   that is, made invalid; the sixteen are invalidated; each is put back without the hint. Arm ARM DDI 0487, D8
//   ("the Contiguous bit") asks for exactly that: never some with the hint and some without, never a change of it
//   between two valid values.
// I7. Whoever parks owns one of the sixteen places at least, for as long as he works there, so no map can fill all
//   sixteen meanwhile: hinted -> parked -> plain -> empty, never back. That is why a parked entry may be put back by
//   anybody who parked and invalidated after he had seen none of the sixteen hinted, without a tag against ABA.
// Linearization: map, the store of each entry; unmap, the store of 0; entering, the exchange that counts; leaving a
//   place, the exchange of 0 for dead.
// Edges: R.entry / A.entry - an entry that leads to a table is stored with release and loaded with acquire (the
//   device's walker is ordered by its own address dependency), so whoever follows a pointer finds a complete table.
//   R.users / A.users - what a session stored in a table happened before whoever finds it empty.
// E1. A leaf of level 0 is stored relaxed: no thread reads memory through it. A device may, but what it finds there is
//   promised only once the map has completed, and the caller's barrier before that (one for a batch) orders the
//   entries, and what was written to the memory before them, before whatever tells the device. A device that strays in
//   earlier reads what was mapped, no matter how old. Against others of the same group: I6, the order of the sixteen
//   does not matter; whoever loosens them does so for an unmap, which comes after the map in the caller's order.
// Failure and undo: map() checks that everything is free before it writes; if tables run out in the middle it says how
//   far it came and the caller unmaps that. A failed invalidation leaves everything as it was, but for a group that
//   lost its hint: its leaves stay parked, so that the device faults on them, until an unmap that touches the group
//   succeeds with it.
// Proven by tests/unit/stage1_table_test.cpp (exhaustive small cases, random ones against a reference),
//   tests/stress/stage1_stress_test.cpp (TSan), tests/litmus/table_editor_test.cpp (every step frozen while others go
//   on).
#pragma once

#include <atomic>
#include <cstdint>

#include "backends/stage1/table_format.hpp"
#include "backends/stage1/table_pool.hpp"
#include "base/yield_point.hpp"
#include "iovane/types.hpp"

namespace iovane::backends::stage1 {

/// The devices' walkers, as far as the editor needs them.
class TableWalkers {
 public:
  virtual ~TableWalkers() = default;
  /// When it returns true, no walker uses anything it read for `range` before the call: neither leaves nor tables. Any
  /// thread; a system call.
  virtual bool forget(IovaRange range) noexcept = 0;
};

enum class MapVerdict : std::uint8_t { done, occupied, no_tables };

class TableEditor {
 public:
  /// A batch's place in the tables: the level-0 table used last is counted in once and out once.
  class Session {
   public:
    explicit Session(TableEditor& editor) noexcept : editor_{editor} {}
    ~Session() { leave(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
    void leave() noexcept;

   private:
    friend class TableEditor;
    static constexpr std::uint64_t nowhere = ~std::uint64_t{0};
    TableEditor& editor_;
    std::uint64_t region_ = nowhere;  // iova >> 21
    Table* table_ = nullptr;
    std::uint32_t change_ = 0;  // of the number of valid entries, modulo 2^32
  };

  TableEditor(const TableFormat& format, unsigned levels, TablePool& pool, TableWalkers& walkers) noexcept
      : format_{format}, levels_{levels}, pool_{pool}, walkers_{walkers} {}
  TableEditor(const TableEditor&) = delete;
  TableEditor& operator=(const TableEditor&) = delete;

  /// Takes the root. False without a page for it.
  bool open() noexcept;
  std::uint64_t root_address() const noexcept { return pool_.address_of(root_); }
  const TableFormat& format() const noexcept { return format_; }
  unsigned levels() const noexcept { return levels_; }

  /// Makes `range` lead to `address`; both multiples of 4 KiB, the range within what the levels translate. `mark` as in
  /// TableFormat::leaf(). `large`: blocks and contiguous hints where both are aligned. On no_tables the first `written`
  /// bytes are mapped.
  MapVerdict map(Session& session, IovaRange range, std::uint64_t address, Access access, std::uint64_t mark,
                 bool large, std::uint64_t& written) noexcept;

  /// map() of the one page at `iova` by `leaf`, where that takes nothing but the store. False, and nothing was done:
  /// the session is in another table, or the place is taken; map() finds out.
  bool map_page(Session& session, std::uint64_t iova, std::uint64_t leaf) noexcept {
    if (session.region_ != iova >> shift_of(1)) return false;
    Entry& place = session.table_->entries[index_of(iova, 0)];
    // relaxed: nothing is read through it. The place is ours.
    if (place.load(std::memory_order_relaxed) != 0) return false;
    place.store(leaf, std::memory_order_relaxed);  // relaxed: E1
    ++session.change_;
    return true;
  }

  /// Clears what is mapped inside `range`, cutting blocks and loosening groups at its borders. `cleared(iova, bytes,
  /// entry)` is called for each leaf. False when one could not be cut (no table, or its invalidation failed): what came
  /// before it is cleared.
  template <typename Cleared>
  bool unmap(Session& session, IovaRange range, Cleared&& cleared) noexcept {
    const std::uint64_t region = range.start.value >> shift_of(1);
    if (region == range.last.value >> shift_of(1)) {
      const Place place = session.region_ == region ? Place::table : enter(session, range.start.value, false);
      if (place == Place::table) [[likely]]
        return clear_entries(session, range, cleared);
      if (place != Place::block) return true;
    }
    return clear(session, root_, levels_ - 1, 0, range, cleared);
  }

  /// unmap() of the one page at `iova`, where that takes nothing but the store. False, and nothing was done: the
  /// session is in another table, nothing is mapped, or the leaf has a hint or memory of its own; unmap() sees to it.
  bool unmap_page(Session& session, std::uint64_t iova) noexcept {
    if (session.region_ != iova >> shift_of(1)) return false;
    Entry& place = session.table_->entries[index_of(iova, 0)];
    const std::uint64_t special = format_.hint_bit | TableFormat::own_pin_bit;
    // relaxed: the range is ours, and only leaves with a hint are anybody else's business. One that is plain now never
    // had the hint, or whoever loosened its group has invalidated what it said (I7).
    if ((place.load(std::memory_order_relaxed) & (special | TableFormat::valid_bit)) != TableFormat::valid_bit)
      return false;
    base::yield_point("table_editor.clear");
    place.store(0, std::memory_order_relaxed);  // relaxed: the invalidation that follows orders it
    --session.change_;
    return true;
  }

  /// Whether nothing is mapped in `range`. Meaningful while nobody maps there.
  bool is_free(IovaRange range) noexcept {
    Session session{*this};
    return is_free(session, root_, levels_ - 1, 0, range);
  }

  /// The leaf that translates `iova`, and its level; 0 for none.
  std::uint64_t find(Iova iova, unsigned& level) noexcept;

  /// Collects empty level-0 tables: how many.
  std::size_t trim() noexcept;

  static constexpr std::uint32_t trim_from = 1024;  ///< tables in use before growing thinks of collecting

 private:
  using Entry = std::atomic<std::uint64_t>;
  enum class Place : std::uint8_t { table, block, absent, exhausted };
  struct Collected {
    Entry* place;
    Table* table;
    std::uint64_t draining;
  };
  static constexpr std::size_t collect_max = 256;

  Table* table_at(std::uint64_t entry) const noexcept { return pool_.at(format_.address(entry)); }
  Table* new_table() noexcept;
  Table* new_upper_table() noexcept;
  Place enter(Session& session, std::uint64_t iova, bool create) noexcept;
  Table* upper_table(std::uint64_t iova, bool create, Place& otherwise) noexcept;
  bool count_in(Table* table) noexcept;
  void help_drain(Entry& place, std::uint64_t entry, Table* table) noexcept;
  void give_dead(Table* table) noexcept;
  std::uint32_t generation_of(const Table* table) const noexcept {
    // relaxed: it changes when the page is given back, which whoever asks excludes.
    return pool_.state(table).generation.load(std::memory_order_relaxed);
  }
  std::uint64_t draining_of(const Table* table) const noexcept {
    return TableFormat::draining(pool_.address_of(table), generation_of(table));
  }
  bool loosen(Table* table, unsigned level, std::uint64_t iova) noexcept;
  bool cut(Entry& place, unsigned level, std::uint64_t base, std::uint64_t entry) noexcept;
  bool finish_cut(Entry& place, unsigned level, std::uint64_t iova, std::uint64_t entry) noexcept;
  bool is_free(Session& session, const Table* table, unsigned level, std::uint64_t base, IovaRange range) noexcept;
  bool put_block(std::uint64_t iova, std::uint64_t address, std::uint64_t left, Access access, std::uint64_t mark,
                 std::uint64_t& step) noexcept;
  bool collect_below(Table* table, unsigned level, std::size_t& total, Collected* list, std::size_t& count) noexcept;
  bool let_go(Collected* list, std::size_t count) noexcept;

  /// Whether `entry` is one of a group of which `range` has only a part, so that the group has to be loosened first.
  bool is_cut_group(std::uint64_t entry, unsigned level, std::uint64_t iova, IovaRange range) const noexcept {
    if (!format_.is_hinted(entry) && format_.kind(entry, level) != EntryKind::parked) return false;
    return !range.contains(group_of(iova, level));
  }
  static constexpr IovaRange group_of(std::uint64_t iova, unsigned level) noexcept {
    const std::uint64_t bytes = group_entries * bytes_of(level);
    return {Iova{iova & ~(bytes - 1)}, Iova{iova | (bytes - 1)}};
  }

  template <typename Cleared>
  bool clear_entries(Session& session, IovaRange range, Cleared& cleared) noexcept {
    const std::size_t first = index_of(range.start.value, 0);
    const std::size_t count = (range.span() >> 12) + 1;
    if (format_.hint_bit != 0) {
      // Only the groups at the two ends can be cut.
      for (const std::uint64_t iova : {range.start.value, range.last.value}) {
        // A.entry - a plain entry here says that somebody has loosened all of its group.
        const std::uint64_t entry = session.table_->entries[index_of(iova, 0)].load(std::memory_order_acquire);
        if (is_cut_group(entry, 0, iova, range) && !loosen(session.table_, 0, iova)) return false;
      }
    }
    for (std::size_t i = 0; i < count; ++i) {
      Entry& place = session.table_->entries[first + i];
      // relaxed: the range is ours. Others may put back a parked entry, which leads to the same memory.
      const std::uint64_t entry = place.load(std::memory_order_relaxed);
      if (entry == 0) continue;
      base::yield_point("table_editor.clear");
      place.store(0, std::memory_order_relaxed);  // relaxed: the invalidation that follows orders it
      --session.change_;
      cleared(range.start.value + i * page_bytes, page_bytes, entry);
    }
    return true;
  }

  template <typename Cleared>
  bool clear(Session& session, Table* table, unsigned level, std::uint64_t base, IovaRange range,
             Cleared& cleared) noexcept {
    const std::uint64_t first = range.start.value <= base ? 0 : (range.start.value - base) >> shift_of(level);
    for (std::uint64_t i = first; i < entries_per_table; ++i) {
      const std::uint64_t start = base + i * bytes_of(level);
      const IovaRange covered{Iova{start}, Iova{start + bytes_of(level) - 1}};
      if (covered.start > range.last) break;
      Entry& place = table->entries[i];
      std::uint64_t entry = place.load(std::memory_order_acquire);  // A.entry
      if (is_cut_group(entry, level, start, range)) {
        if (!loosen(table, level, start)) return false;
        entry = place.load(std::memory_order_acquire);  // A.entry
      }
      EntryKind kind = format_.kind(entry, level);
      if (kind == EntryKind::empty || kind == EntryKind::draining) continue;
      if (kind == EntryKind::leaf || kind == EntryKind::parked) {
        if (range.contains(covered)) {
          place.store(0, std::memory_order_relaxed);  // relaxed: as in clear_entries()
          cleared(start, bytes_of(level), entry);
          continue;
        }
        if (!cut(place, level, start, entry)) return false;
      } else if (kind == EntryKind::cutting && !finish_cut(place, level, start, entry)) {
        return false;
      }
      const IovaRange part = *covered.intersection(range);
      if (level > 1) {
        entry = place.load(std::memory_order_acquire);  // A.entry
        if (format_.kind(entry, level) != EntryKind::table) continue;
        if (!clear(session, table_at(entry), level - 1, start, part, cleared)) return false;
      } else if (session.region_ == start >> shift_of(1) || enter(session, start, false) == Place::table) {
        if (!clear_entries(session, part, cleared)) return false;
      }
    }
    return true;
  }

  const TableFormat format_;
  const unsigned levels_;
  TablePool& pool_;
  TableWalkers& walkers_;
  Table* root_ = nullptr;
  std::atomic<std::uint32_t> trim_at_{trim_from};
};

}  // namespace iovane::backends::stage1
