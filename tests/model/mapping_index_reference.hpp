// MappingIndex's contract written down with std::map, and a comparison of the two.
#pragma once

#include <gtest/gtest.h>

#include <limits>
#include <map>
#include <optional>
#include <vector>

#include "engine/mapping_index.hpp"

namespace iovane::test {

class ReferenceIndex {
 public:
  struct Entry {
    engine::MappingRecord record;
    MappingId id;
  };
  using Map = std::map<std::uint64_t, Entry>;

  explicit ReferenceIndex(std::size_t mappings_max) : mappings_max_{mappings_max} {}

  /// What insert() is to answer.
  Errc verdict(const engine::MappingRecord& record) const {
    if (record.range.start > record.range.last) return Errc::invalid_argument;
    if (first_in(record.range) != entries_.end()) return Errc::iova_busy;
    return entries_.size() == mappings_max_ ? Errc::limit_reached : Errc::ok;
  }
  void insert(const engine::MappingRecord& record, MappingId id) {
    entries_[record.range.start.value] = Entry{record, id};
  }
  void erase(std::uint64_t start) { entries_.erase(start); }

  Map::const_iterator first_in(IovaRange range) const {
    for (auto at = entries_.lower_bound(range.start.value);; --at) {
      if (at != entries_.end() && at->second.record.range.last < range.start) return next_if(std::next(at), range);
      if (at == entries_.begin()) return next_if(at, range);
    }
  }
  MappingId id_at(Map::const_iterator at) const { return at == entries_.end() ? MappingId{} : at->second.id; }
  MappingId covering(Iova a) const { return id_at(first_in({a, a})); }
  const Map& entries() const { return entries_; }

  Bytes bytes() const {
    std::uint64_t sum = 0;
    for (const auto& [start, entry] : entries_) {
      const std::uint64_t left = std::numeric_limits<std::uint64_t>::max() - sum;
      const std::uint64_t span = entry.record.range.span();
      if (span >= left) return {std::numeric_limits<std::uint64_t>::max()};
      sum += span + 1;
    }
    return {sum};
  }

 private:
  Map::const_iterator next_if(Map::const_iterator at, IovaRange range) const {
    return at != entries_.end() && at->second.record.range.overlaps(range) ? at : entries_.end();
  }

  std::size_t mappings_max_;
  Map entries_;
};

/// Compares everything that can be asked about the records themselves, in order, with every gap and border between.
inline void expect_same(engine::MappingIndex& index, const ReferenceIndex& reference) {
  ASSERT_EQ(index.size(), reference.entries().size());
  ASSERT_EQ(index.bytes(), reference.bytes());
  MappingId walk = index.first_in(IovaRange::everything());
  for (auto at = reference.entries().begin(); at != reference.entries().end(); ++at) {
    const auto& [record, id] = at->second;
    ASSERT_EQ(walk, id);
    const engine::MappingRecord* found = index.find(id);
    ASSERT_NE(found, nullptr);
    ASSERT_EQ(found->range, record.range);
    ASSERT_EQ(found->tag, record.tag);
    for (const std::uint64_t border :
         {record.range.start.value - 1, record.range.start.value, record.range.last.value, record.range.last.value + 1,
          record.range.start.value / 2 + record.range.last.value / 2}) {
      ASSERT_EQ(index.covering(Iova{border}), reference.covering(Iova{border})) << std::hex << border;
    }
    walk = index.next(walk);
  }
  ASSERT_EQ(walk, MappingId{});
  std::vector<MappingId> visited;
  index.for_each(IovaRange::everything(), [&](MappingId id, const engine::MappingRecord&) { visited.push_back(id); });
  ASSERT_EQ(visited.size(), reference.entries().size());
}

}  // namespace iovane::test
