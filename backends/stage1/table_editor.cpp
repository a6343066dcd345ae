#include "backends/stage1/table_editor.hpp"

#include <algorithm>

namespace iovane::backends::stage1 {

using base::yield_point;

void TableEditor::Session::leave() noexcept {
  if (table_ == nullptr) return;
  yield_point("table_editor.leave");
  // R.users - pairs with A.users in collect_below(): the entries, before the count that says how many there are.
  editor_.pool_.state(table_).users.fetch_add(change_ - 1, std::memory_order_release);
  table_ = nullptr;
  region_ = nowhere;
  change_ = 0;
}

bool TableEditor::open() noexcept {
  root_ = new_upper_table();
  return root_ != nullptr;
}

// A table for level 0, with its taker's share counted (users = 1).
Table* TableEditor::new_table() noexcept {
  if (Table* const table = pool_.take_free(); table != nullptr) return table;
  // Growing is the moment to look for empty ones: when twice as many are in use as after the last look.
  std::uint32_t at = trim_at_.load(std::memory_order_relaxed);  // relaxed: a hint, its value is all it says
  if (pool_.taken() >= at) {
    const auto next = [&] { return std::max<std::uint32_t>(trim_from, 2 * pool_.taken()); };
    if (trim_at_.compare_exchange_strong(at, ~0U, std::memory_order_relaxed)) {  // relaxed: as above
      trim();
      trim_at_.store(next(), std::memory_order_relaxed);  // relaxed: as above
      if (Table* const table = pool_.take_free(); table != nullptr) return table;
    }
  }
  if (Table* const table = pool_.take(); table != nullptr) return table;
  return trim() != 0 ? pool_.take_free() : nullptr;
}

Table* TableEditor::new_upper_table() noexcept {
  Table* const table = new_table();
  // relaxed: published with the pointer to the table.
  if (table != nullptr) pool_.state(table).users.fetch_or(PageState::dead, std::memory_order_relaxed);
  return table;
}

// The level-1 table for `iova`; null when a block is in the way, there is none, or none can be had.
Table* TableEditor::upper_table(std::uint64_t iova, bool create, Place& otherwise) noexcept {
  Table* table = root_;
  for (unsigned level = levels_ - 1; level > 1;) {
    Entry& place = table->entries[index_of(iova, level)];
    std::uint64_t entry = place.load(std::memory_order_acquire);  // A.entry
    switch (format_.kind(entry, level)) {
      case EntryKind::table:
        table = table_at(entry);
        --level;
        break;
      case EntryKind::parked:
      case EntryKind::leaf: otherwise = Place::block; return nullptr;
      case EntryKind::cutting:
        if (!finish_cut(place, level, iova, entry)) {
          otherwise = Place::block;
          return nullptr;
        }
        break;
      case EntryKind::draining:  // never above level 1
      case EntryKind::empty: {
        otherwise = Place::absent;
        if (!create) return nullptr;
        Table* const fresh = new_upper_table();
        if (fresh == nullptr) {
          otherwise = Place::exhausted;
          return nullptr;
        }
        yield_point("table_editor.link_upper");
        // R.entry - pairs with A.entry: the table is all zeroes.
        if (!place.compare_exchange_strong(entry, format_.table(pool_.address_of(fresh)), std::memory_order_acq_rel,
                                           std::memory_order_acquire)) {
          // relaxed: nobody else has it. The taker's share stays counted.
          pool_.state(fresh).users.fetch_and(~PageState::dead, std::memory_order_relaxed);
          pool_.give(fresh);
        }
        break;
      }
    }
  }
  return table;
}

bool TableEditor::count_in(Table* table) noexcept {
  std::atomic<std::uint32_t>& users = pool_.state(table).users;
  std::uint32_t seen = users.load(std::memory_order_relaxed);  // relaxed: the exchange checks it
  do {
    if ((seen & PageState::dead) != 0) return false;
    yield_point("table_editor.count_in");
    // A.users - acquire: what earlier sessions did to the entries.
  } while (!users.compare_exchange_weak(seen, seen + 1, std::memory_order_acquire, std::memory_order_relaxed));
  return true;
}

// Marks the place of a table that its collector has declared dead, so that nobody waits for the collector. Counted in,
// the helper keeps the table from being given back: without that it could by now be alive in the very same place.
void TableEditor::help_drain(Entry& place, std::uint64_t entry, Table* table) noexcept {
  std::atomic<std::uint32_t>& users = pool_.state(table).users;
  std::uint32_t seen = users.load(std::memory_order_relaxed);  // relaxed: the exchange checks it
  do {
    if ((seen & PageState::dead) == 0 || (seen & PageState::released) != 0) return;  // the place has changed already
    yield_point("table_editor.help_drain");
    // A.users - acquire: what the place says after it is not older than the table's death.
  } while (!users.compare_exchange_weak(seen, seen + 1, std::memory_order_acquire, std::memory_order_relaxed));
  // relaxed: `draining` leads nowhere.
  place.compare_exchange_strong(entry, draining_of(table), std::memory_order_relaxed, std::memory_order_relaxed);
  yield_point("table_editor.helped");
  // R.users - the place, before the count that lets the table go.
  if (users.fetch_sub(1, std::memory_order_acq_rel) == (PageState::dead | PageState::released | 1)) give_dead(table);
}

// Nobody is in it, nobody can come in, no walker knows it.
void TableEditor::give_dead(Table* table) noexcept {
  // relaxed: push() publishes. The next taker's share.
  pool_.state(table).users.store(1, std::memory_order_relaxed);
  pool_.give(table);
}

// Counts the session into the level-0 table for `iova`, after counting it out of the one before.
TableEditor::Place TableEditor::enter(Session& session, std::uint64_t iova, bool create) noexcept {
  session.leave();
  Place otherwise = Place::absent;
  Table* const above = upper_table(iova, create, otherwise);
  if (above == nullptr) return otherwise;
  Entry& place = above->entries[index_of(iova, 1)];
  const std::uint64_t start = iova & ~(bytes_of(1) - 1);
  const IovaRange covered{Iova{start}, Iova{start + bytes_of(1) - 1}};
  Table* fresh = nullptr;
  const auto finish = [&](Place result) {
    if (fresh != nullptr) pool_.give(fresh);
    return result;
  };
  const auto settle = [&](Table* table) {
    session.table_ = table;
    session.region_ = iova >> shift_of(1);
  };
  while (true) {                                                  // each further round is somebody else's success
    std::uint64_t entry = place.load(std::memory_order_acquire);  // A.entry
    switch (format_.kind(entry, 1)) {
      case EntryKind::parked:
      case EntryKind::leaf: return finish(Place::block);
      case EntryKind::table: {
        Table* const table = table_at(entry);
        if (count_in(table)) {
          // A.entry - still in its place after we were counted: I1 holds from here.
          if (place.load(std::memory_order_acquire) == entry) {
            settle(table);
            return finish(Place::table);
          }
          pool_.state(table).users.fetch_sub(1, std::memory_order_release);  // R.users
          break;
        }
        help_drain(place, entry, table);
        break;
      }
      case EntryKind::cutting:
        if (!finish_cut(place, 1, iova, entry)) return finish(Place::block);
        break;
      case EntryKind::draining:
        if (!create) return finish(Place::absent);
        if (!walkers_.forget(covered)) return finish(Place::exhausted);  // I2
        [[fallthrough]];
      case EntryKind::empty:
        if (!create) return finish(Place::absent);
        if (fresh == nullptr) fresh = new_table();
        if (fresh == nullptr) return Place::exhausted;
        yield_point("table_editor.link");
        // R.entry - pairs with A.entry: the table is all zeroes, and we are counted in.
        if (place.compare_exchange_strong(entry, format_.table(pool_.address_of(fresh)), std::memory_order_acq_rel,
                                          std::memory_order_acquire)) {
          settle(fresh);
          return Place::table;
        }
        break;
    }
  }
}

// Takes the hint from the group of leaves around `iova`, a place in it being ours (I6, I7). True when none of them has
// it or is parked any more, whoever did it.
bool TableEditor::loosen(Table* table, unsigned level, std::uint64_t iova) noexcept {
  Entry* const group = &table->entries[index_of(group_of(iova, level).start.value, level)];
  for (std::size_t i = 0; i < group_entries; ++i) {
    std::uint64_t entry = group[i].load(std::memory_order_acquire);  // A.entry
    yield_point("table_editor.park");
    // R.entry - as every store. Another thread's step in between is the same step, or a later one.
    while (format_.is_hinted(entry) &&
           !group[i].compare_exchange_weak(entry, format_.parked(entry), std::memory_order_acq_rel,
                                           std::memory_order_acquire)) {
    }
  }
  if (!walkers_.forget(group_of(iova, level))) return false;
  for (std::size_t i = 0; i < group_entries; ++i) {
    std::uint64_t entry = group[i].load(std::memory_order_acquire);  // A.entry
    yield_point("table_editor.unpark");
    // R.entry - where it fails, another thread has put it back, and its owner may have cleared it since.
    if (format_.kind(entry, level) == EntryKind::parked)
      group[i].compare_exchange_strong(entry, TableFormat::unparked(entry), std::memory_order_acq_rel,
                                       std::memory_order_relaxed);
  }
  return true;
}

// Replaces a block by a table of 512 smaller leaves.
bool TableEditor::cut(Entry& place, unsigned level, std::uint64_t base, std::uint64_t entry) noexcept {
  Table* const table = level > 1 ? new_upper_table() : new_table();
  if (table == nullptr) return false;
  for (std::size_t i = 0; i < entries_per_table; ++i)  // relaxed: nobody sees the table yet
    table->entries[i].store(format_.part_of(entry, level - 1, i * bytes_of(level - 1)), std::memory_order_relaxed);
  // The taker's share becomes that of the first entry. relaxed: as above.
  if (level == 1) pool_.state(table).users.fetch_add(entries_per_table - 1, std::memory_order_relaxed);
  const std::uint64_t cutting = TableFormat::cutting(pool_.address_of(table), generation_of(table));
  const auto undo = [&] {
    for (Entry& e : table->entries) e.store(0, std::memory_order_relaxed);  // relaxed: nobody else has the table
    if (level > 1)
      pool_.state(table).users.fetch_and(~PageState::dead, std::memory_order_relaxed);
    else
      pool_.state(table).users.fetch_sub(entries_per_table - 1, std::memory_order_relaxed);  // relaxed: as above
    pool_.give(table);
  };
  yield_point("table_editor.cut");
  // R.entry - pairs with A.entry in finish_cut(): the table is complete.
  std::uint64_t seen = entry;
  if (!place.compare_exchange_strong(seen, cutting, std::memory_order_acq_rel, std::memory_order_acquire)) {
    undo();
    // Another thread cuts the same block for its own part.
    return format_.kind(seen, level) != EntryKind::cutting || finish_cut(place, level, base, seen);
  }
  if (finish_cut(place, level, base, cutting)) return true;
  seen = cutting;
  // R.entry, A.entry - the block again, unless a helper's invalidation went through.
  if (!place.compare_exchange_strong(seen, entry, std::memory_order_acq_rel, std::memory_order_acquire)) return true;
  undo();
  return false;
}

// Makes the table valid that waits behind `entry`. True when it is, whoever did it.
bool TableEditor::finish_cut(Entry& place, unsigned level, std::uint64_t iova, std::uint64_t entry) noexcept {
  const std::uint64_t start = iova & ~(bytes_of(level) - 1);
  if (!walkers_.forget({Iova{start}, Iova{start + bytes_of(level) - 1}}))                   // I3
    return format_.kind(place.load(std::memory_order_acquire), level) == EntryKind::table;  // A.entry
  yield_point("table_editor.finish_cut");
  std::uint64_t seen = entry;
  // R.entry - pairs with A.entry.
  if (place.compare_exchange_strong(seen, format_.table(format_.address(entry)), std::memory_order_acq_rel,
                                    std::memory_order_acquire))
    return true;
  return format_.kind(seen, level) == EntryKind::table;
}

// Whether nothing is mapped in `range`.
bool TableEditor::is_free(Session& session, const Table* table, unsigned level, std::uint64_t base,
                          IovaRange range) noexcept {
  const std::uint64_t first = range.start.value <= base ? 0 : (range.start.value - base) >> shift_of(level);
  for (std::uint64_t i = first; i < entries_per_table; ++i) {
    const std::uint64_t start = base + i * bytes_of(level);
    if (start > range.last.value) break;
    const std::uint64_t entry = table->entries[i].load(std::memory_order_acquire);  // A.entry
    const EntryKind kind = format_.kind(entry, level);
    if (kind == EntryKind::empty || kind == EntryKind::draining) continue;
    if (kind != EntryKind::table) return false;
    const IovaRange part = *IovaRange{Iova{start}, Iova{start + bytes_of(level) - 1}}.intersection(range);
    if (level > 1) {
      if (!is_free(session, table_at(entry), level - 1, start, part)) return false;
      continue;
    }
    const Place found = enter(session, start, false);
    if (found == Place::absent) continue;
    if (found != Place::table) return false;
    for (std::size_t e = index_of(part.start.value, 0); e <= index_of(part.last.value, 0); ++e)
      // relaxed: nothing is read through it.
      if (session.table_->entries[e].load(std::memory_order_relaxed) != 0) return false;
  }
  return true;
}

// The largest block that fits at `iova`, if its place is empty.
bool TableEditor::put_block(std::uint64_t iova, std::uint64_t address, std::uint64_t left, Access access,
                            std::uint64_t mark, std::uint64_t& step) noexcept {
  const unsigned top = std::min(levels_ - 1, 2U);
  for (unsigned level = top; level >= 1; --level) {
    if (((iova | address) & (bytes_of(level) - 1)) != 0 || left < bytes_of(level)) continue;
    Table* table = root_;
    for (unsigned above = levels_ - 1; above > level && table != nullptr; --above) {
      Entry& place = table->entries[index_of(iova, above)];
      std::uint64_t entry = place.load(std::memory_order_acquire);  // A.entry
      if (entry == 0) {
        Table* const fresh = new_upper_table();
        if (fresh == nullptr) return false;
        // R.entry - as in upper_table().
        if (place.compare_exchange_strong(entry, format_.table(pool_.address_of(fresh)), std::memory_order_acq_rel,
                                          std::memory_order_acquire)) {
          entry = format_.table(pool_.address_of(fresh));
        } else {
          pool_.state(fresh).users.fetch_and(~PageState::dead, std::memory_order_relaxed);  // relaxed: ours alone
          pool_.give(fresh);
        }
      }
      table = format_.kind(entry, above) == EntryKind::table ? table_at(entry) : nullptr;
    }
    if (table == nullptr) continue;
    Entry* const places = &table->entries[index_of(iova, level)];
    const std::uint64_t group = group_entries * bytes_of(level);
    if (format_.hint_bit != 0 && ((iova | address) & (group - 1)) == 0 && left >= group &&
        // A.entry - what is empty stays so: nobody else maps here.
        std::all_of(places, places + group_entries,
                    [](const Entry& place) { return place.load(std::memory_order_acquire) == 0; })) {
      std::uint64_t entry = format_.leaf(level, address, access, mark) | format_.hint_bit;
      for (std::size_t i = 0; i < group_entries; ++i, entry += bytes_of(level))
        places[i].store(entry, std::memory_order_release);  // R.entry
      step = group;
      return true;
    }
    std::uint64_t empty = 0;
    // R.entry - release as every entry's store; a place that is not empty keeps what it has.
    if (places->compare_exchange_strong(empty, format_.leaf(level, address, access, mark), std::memory_order_release,
                                        std::memory_order_relaxed)) {
      step = bytes_of(level);
      return true;
    }
  }
  return false;
}

MapVerdict TableEditor::map(Session& session, IovaRange range, std::uint64_t address, Access access, std::uint64_t mark,
                            bool large, std::uint64_t& written) noexcept {
  written = 0;
  const std::uint64_t length = range.span() + 1;
  const bool one_table = (range.start.value ^ range.last.value) >> shift_of(1) == 0;
  if (!one_table || length == bytes_of(1)) {
    if (!is_free(session, root_, levels_ - 1, 0, range)) return MapVerdict::occupied;
  }
  while (written < length) {
    const std::uint64_t iova = range.start.value + written;
    const std::uint64_t left = length - written;
    std::uint64_t step = 0;
    if (large && left >= bytes_of(1) && put_block(iova, address + written, left, access, mark, step)) {
      written += step;
      continue;
    }
    if (session.region_ != iova >> shift_of(1)) {
      const Place place = enter(session, iova, true);
      if (place == Place::block) return MapVerdict::occupied;
      if (place != Place::table) return MapVerdict::no_tables;
    }
    const std::size_t first = index_of(iova, 0);
    const std::size_t count = std::min<std::uint64_t>(entries_per_table - first, left / page_bytes);
    Entry* const entries = &session.table_->entries[first];
    if (one_table) {
      // relaxed: nothing is read through them.
      for (std::size_t i = 0; i < count; ++i)
        if (entries[i].load(std::memory_order_relaxed) != 0) return MapVerdict::occupied;
    }
    std::uint64_t entry = format_.leaf(0, address + written, access, mark);
    // Whole groups get the hint where the memory lies as the addresses do (I6).
    const std::size_t before = (group_entries - first % group_entries) % group_entries;
    std::size_t hinted = 0;
    if (large && format_.hint_bit != 0 && count >= before + group_entries &&
        (((iova ^ (address + written)) / page_bytes) % group_entries) == 0)
      hinted = (count - before) / group_entries * group_entries;
    for (std::size_t i = 0; i < count; ++i, entry += page_bytes)  // relaxed: E1
      entries[i].store(i - before < hinted ? entry | format_.hint_bit : entry, std::memory_order_relaxed);
    session.change_ += static_cast<std::uint32_t>(count);
    written += count * page_bytes;
  }
  return MapVerdict::done;
}

std::uint64_t TableEditor::find(Iova iova, unsigned& level) noexcept {
  Table* table = root_;
  for (level = levels_ - 1; level > 0; --level) {
    const std::uint64_t entry = table->entries[index_of(iova.value, level)].load(std::memory_order_acquire);  // A.entry
    const EntryKind kind = format_.kind(entry, level);
    if (kind == EntryKind::leaf) return entry;
    if (kind != EntryKind::table) return 0;
    if (level == 1) {
      Session session{*this};
      if (enter(session, iova.value, false) != Place::table) return 0;
      level = 0;
      // relaxed: nothing is read through it.
      return session.table_->entries[index_of(iova.value, 0)].load(std::memory_order_relaxed);
    }
    table = table_at(entry);
  }
  return 0;
}

// Takes the collected tables out of the walkers' sight and gives them back.
bool TableEditor::let_go(Collected* list, std::size_t count) noexcept {
  if (count == 0) return true;
  const bool forgotten = walkers_.forget({Iova{0}, last_address(levels_)});
  for (std::size_t i = 0; i < count; ++i) {
    Table* const table = list[i].table;
    std::uint64_t draining = list[i].draining;
    if (forgotten) {
      yield_point("table_editor.let_go");
      // relaxed: the place leads nowhere before and after; a helper may have used it meanwhile.
      list[i].place->compare_exchange_strong(draining, 0, std::memory_order_relaxed);
      // R.users, A.users - the place, before the mark; helpers that are still in it come first, and the last gives it.
      if (pool_.state(table).users.fetch_or(PageState::released, std::memory_order_acq_rel) == PageState::dead)
        give_dead(table);
      continue;
    }
    // Back to where it was, empty and enterable; if a helper took the place, the page is lost until the space goes,
    // because a walker may still know it. relaxed: nobody enters it before the exchange below.
    // Those who remember `draining` have invalidated too early for its next death.
    pool_.state(table).generation.fetch_add(1, std::memory_order_relaxed);
    pool_.state(table).users.fetch_and(~PageState::dead, std::memory_order_relaxed);
    // R.entry - as every link.
    list[i].place->compare_exchange_strong(draining, format_.table(pool_.address_of(table)), std::memory_order_release,
                                           std::memory_order_relaxed);
  }
  return forgotten;
}

bool TableEditor::collect_below(Table* table, unsigned level, std::size_t& total, Collected* list,
                                std::size_t& count) noexcept {
  for (Entry& place : table->entries) {
    std::uint64_t entry = place.load(std::memory_order_acquire);  // A.entry
    if (format_.kind(entry, level) != EntryKind::table) continue;
    Table* const below = table_at(entry);
    if (level > 1) {
      if (!collect_below(below, level - 1, total, list, count)) return false;
      continue;
    }
    // A table has one place in each of its lives: seen there twice with its generation read in between, it is the life
    // that `life` names, or an older one and then not collected this time. A.entry.
    const std::uint32_t life = generation_of(below);
    if (place.load(std::memory_order_acquire) != entry) continue;
    std::uint32_t empty = 0;
    yield_point("table_editor.collect");
    // A.users - pairs with R.users: every entry's clearing. Nobody enters from here on.
    if (!pool_.state(below).users.compare_exchange_strong(empty, PageState::dead, std::memory_order_acquire,
                                                          std::memory_order_relaxed))
      continue;
    yield_point("table_editor.dead");
    if (generation_of(below) != life) {  // it lives elsewhere now, and goes on living
      pool_.state(below).users.fetch_and(~PageState::dead, std::memory_order_release);  // R.users
      continue;
    }
    const std::uint64_t draining = TableFormat::draining(format_.address(entry), life);
    std::uint64_t seen = entry;
    yield_point("table_editor.drain");
    // Fails where a helper was here first, who may have linked another table since. relaxed: `draining` leads nowhere.
    place.compare_exchange_strong(seen, draining, std::memory_order_relaxed, std::memory_order_relaxed);
    list[count++] = {&place, below, draining};
    ++total;
    if (count == collect_max) {
      if (!let_go(list, count)) return false;
      count = 0;
    }
  }
  return true;
}

std::size_t TableEditor::trim() noexcept {
  Collected list[collect_max];
  std::size_t count = 0, total = 0;
  if (levels_ < 2 || root_ == nullptr) return 0;
  if (!collect_below(root_, levels_ - 1, total, list, count)) return 0;
  return let_go(list, count) ? total : 0;
}

}  // namespace iovane::backends::stage1
