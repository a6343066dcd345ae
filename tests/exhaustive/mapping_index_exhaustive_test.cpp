// Every short sequence of operations on a tiny set of ranges, compared with std::map at its end.
#include <gtest/gtest.h>

#include <algorithm>
#include <span>

#include "model/mapping_index_reference.hpp"

namespace iovane::engine {
namespace {

using test::ReferenceIndex;

constexpr std::uint64_t top = std::numeric_limits<std::uint64_t>::max();

// An operation is "toggle range r": erase the record that is exactly r, else try to insert r. With ranges that overlap,
// touch and part ways at different levels, sequences of toggles reach every shape of a small tree.
void run(std::span<const IovaRange> ranges, unsigned long sequence, unsigned length) {
  constexpr std::uint32_t mappings_max = 7;
  auto index = *MappingIndex::create(mappings_max);
  ReferenceIndex reference{mappings_max};
  for (unsigned step = 0; step < length; ++step, sequence /= ranges.size()) {
    const IovaRange range = ranges[sequence % ranges.size()];
    const auto there = reference.entries().find(range.start.value);
    if (there != reference.entries().end() && there->second.record.range == range) {
      ASSERT_TRUE(index.erase(there->second.id));
      reference.erase(range.start.value);
    } else {
      MappingRecord record;
      record.range = range;
      record.tag = step;
      const Errc expected = reference.verdict(record);
      const auto id = index.insert(record);
      ASSERT_EQ(id.error().code, expected);
      if (id) reference.insert(record, *id);
    }
  }
  for (const IovaRange& other : ranges) {
    ASSERT_EQ(index.first_in(other), reference.id_at(reference.first_in(other)));
  }
  ASSERT_NO_FATAL_FAILURE(test::expect_same(index, reference));
}

void run_all(std::span<const IovaRange> ranges, unsigned length_max) {
  unsigned long sequences = 1;
  for (unsigned length = 1; length <= length_max; ++length) {
    sequences *= ranges.size();
    for (unsigned long sequence = 0; sequence < sequences; ++sequence) {
      run(ranges, sequence, length);
      if (testing::Test::HasFatalFailure()) FAIL() << "sequence " << sequence << " of length " << length;
    }
  }
}

constexpr IovaRange range(std::uint64_t start, std::uint64_t last) { return {Iova{start}, Iova{last}}; }

TEST(MappingIndexExhaustive, TinySpaceAtTheBottom) {
  constexpr IovaRange ranges[] = {range(0, 0), range(1, 1), range(2, 3), range(0, 3), range(3, 3), range(4, 64)};
  run_all(ranges, 5);
}

TEST(MappingIndexExhaustive, TinySpaceAtTheTop) {
  constexpr IovaRange ranges[] = {range(top, top),          range(top - 1, top - 1), range(top - 3, top),
                                  range(top - 64, top - 4), range(0, top),           range(top - 1, top)};
  run_all(ranges, 6);
}

TEST(MappingIndexExhaustive, RangesThatPartWaysAtEveryKindOfLevel) {
  constexpr IovaRange ranges[] = {range(0, 0),
                                  range(1, 1),
                                  range(64, 64),
                                  range(65, 100),
                                  range(1ULL << 60, top),
                                  range(4096, 8191),
                                  range(1ULL << 59, 1ULL << 59)};
  run_all(ranges, 5);
}

// Nodes change size at six and at three children: every order of arrival and of departure around both borders.
TEST(MappingIndexExhaustive, EveryOrderAcrossTheBordersOfNodeSizes) {
  std::vector<unsigned> order{0, 1, 2, 3, 4, 5, 6};
  constexpr std::uint64_t stride[] = {1, 1ULL << 58};
  for (const std::uint64_t s : stride) {
    do {
      auto index = *MappingIndex::create(16);
      ReferenceIndex reference{16};
      std::vector<MappingId> ids(order.size());
      for (const unsigned n : order) {
        MappingRecord record;
        record.range = range(n * s, n * s);
        record.tag = n;
        ids[n] = *index.insert(record);
        reference.insert(record, ids[n]);
      }
      ASSERT_NO_FATAL_FAILURE(test::expect_same(index, reference));
      for (unsigned n = 0; n < order.size(); ++n) {  // leave in ascending order, having come in any
        ASSERT_TRUE(index.erase(ids[n]));
        reference.erase(n * s);
        ASSERT_NO_FATAL_FAILURE(test::expect_same(index, reference));
      }
    } while (std::next_permutation(order.begin(), order.end()));
  }
}

}  // namespace
}  // namespace iovane::engine
