// Fails the 1st, 2nd, ... allocation of a mixed workload: each failure is an error that changes nothing.
#include <gtest/gtest.h>

#include "base/fault_point.hpp"
#include "model/mapping_index_reference.hpp"

namespace iovane::engine {
namespace {

using test::ReferenceIndex;

TEST(MappingIndexFault, EveryFailedAllocationIsAnErrorThatChangesNothing) {
  constexpr std::uint32_t mappings_max = 4096;
  unsigned refusals = 0;
  for (std::uint64_t nth = 1;; ++nth) {
    auto index = *MappingIndex::create(mappings_max);
    ReferenceIndex reference{mappings_max};
    base::arm_fault(static_cast<std::uint32_t>(base::FaultKind::allocation), nth);
    // Grows the slab and both kinds of nodes, then thins them out, which makes large nodes narrow.
    for (std::uint64_t n = 0; n < 1500; ++n) {
      MappingRecord record;
      const std::uint64_t start = (n * 7919 % 1501) * 4096 * (n % 3 == 0 ? 4096 : 1);
      record.range = {Iova{start}, Iova{start + 4095}};
      record.tag = static_cast<std::uint32_t>(n);
      if (reference.verdict(record) != Errc::ok) continue;
      const auto id = index.insert(record);
      if (!id) {
        ++refusals;
        ASSERT_EQ(id.error().code, Errc::out_of_memory);
        ASSERT_NO_FATAL_FAILURE(test::expect_same(index, reference));
        continue;
      }
      reference.insert(record, *id);
    }
    std::vector<ReferenceIndex::Entry> live;
    for (const auto& [start, entry] : reference.entries()) live.push_back(entry);
    for (std::size_t n = 0; n < live.size(); ++n) {
      if (n % 9 < 2) continue;
      ASSERT_TRUE(index.erase(live[n].id));
      reference.erase(live[n].record.range.start.value);
    }
    const bool failed = base::disarm_fault();
    ASSERT_NO_FATAL_FAILURE(test::expect_same(index, reference)) << "allocation " << nth;
    if (!failed) {
      EXPECT_GE(refusals, 10U) << "the workload reached too few allocations to mean anything";
      return;
    }
  }
}

// An erase does not need memory: it works while every allocation fails.
TEST(MappingIndexFault, EraseWorksWithoutMemory) {
  auto index = *MappingIndex::create(4096);
  ReferenceIndex reference{4096};
  for (std::uint64_t n = 0; n < 2000; ++n) {  // large nodes only: no small node is free for reuse
    MappingRecord record;
    record.range = {Iova{n * 4096}, Iova{n * 4096 + 4095}};
    reference.insert(record, *index.insert(record));
  }
  const auto live = reference.entries();
  for (const auto& [start, entry] : live) {
    base::arm_fault(static_cast<std::uint32_t>(base::FaultKind::allocation), 1);
    ASSERT_TRUE(index.erase(entry.id));
    base::disarm_fault();
    reference.erase(start);
    if (start % (97 * 4096) == 0) {
      ASSERT_NO_FATAL_FAILURE(test::expect_same(index, reference));
    }
  }
  EXPECT_EQ(index.size(), 0U);
}

}  // namespace
}  // namespace iovane::engine
