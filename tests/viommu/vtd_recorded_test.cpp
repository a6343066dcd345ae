// Our VT-d decoders against what real guests wrote and what other decoders said about it.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "recorded_data.hpp"
#include "viommu/recording_target.hpp"
#include "viommu/vtd_descriptor.hpp"
#include "viommu/vtd_sync.hpp"
#include "viommu/vtd_tables.hpp"
#include "viommu/vtd_walk.hpp"

namespace iovane::viommu {
namespace {

struct Lister {
  const VtdEntryRules& rules;
  std::vector<Leaf> leaves;
  unsigned reserved = 0;
  bool run(std::uint64_t iova, const std::uint64_t* entries, unsigned count, Access inherited) {
    for (unsigned i = 0; i < count; ++i, iova += 4096) {
      bool bad = false;
      const std::uint64_t word = rules.leaf_word(GuestMemory::View::load(entries + i), inherited, bad);
      if (bad) ++reserved;
      if (word != 0) leaves.push_back({iova, 12, LeafWord::gpa(word), LeafWord::access(word)});
    }
    return true;
  }
  bool superpage(std::uint64_t iova, unsigned shift, std::uint64_t gpa, Access access) {
    leaves.push_back({iova, shift, gpa, access});
    return true;
  }
  bool hole(const IovaRange&, VtdFault) { return true; }
};

struct VtdSnapshotTest : ::testing::TestWithParam<const char*> {};

TEST_P(VtdSnapshotTest, OurWalkGivesTheKernelsOwnListing) {
  const VtdSnapshot snapshot{GetParam()};
  ASSERT_GT(snapshot.page_count, 100U);
  const auto view = snapshot.memory.view();
  const auto capabilities = VtdCapabilities::from_registers(snapshot.reg("CAP"), snapshot.reg("ECAP"), 39);
  const bool scalable = snapshot.text.find("mode scalable") != std::string::npos;
  const auto expected = kernel_listing(snapshot, scalable);
  ASSERT_EQ(expected.size(), 3U);
  std::size_t superpages = 0;
  std::size_t read_only = 0;
  for (const auto& [device, list] : expected) {
    const VtdBinding binding =
        resolve_binding(view, capabilities, snapshot.reg("RTADDR"), source_of(device), std::nullopt);
    ASSERT_EQ(binding.kind, VtdBinding::Kind::paging) << device << ": " << to_string(binding.fault);
    EXPECT_EQ(binding.table.stage, scalable ? VtdPageTable::Stage::first : VtdPageTable::Stage::second);
    EXPECT_EQ(binding.table.levels, scalable ? 4U : 3U);
    const VtdEntryRules rules{binding.table, capabilities};
    Lister lister{rules, {}, 0};
    VtdWalk walk{view, binding.table, rules, lister};
    const auto ranges = input_ranges(binding.table, capabilities);
    EXPECT_FALSE(walk.walk(ranges.low));
    if (ranges.high) {
      EXPECT_FALSE(walk.walk(*ranges.high));
    }
    EXPECT_EQ(lister.leaves, list) << device;
    EXPECT_EQ(lister.reserved, 0U);
    for (const Leaf& leaf : lister.leaves) {
      superpages += leaf.shift > 12 ? 1 : 0;
      read_only += leaf.access == Access::read ? 1 : 0;
    }
    // One address at a time says the same.
    for (const Leaf& leaf : list) {
      const auto found = translate_address(view, binding.table, capabilities, leaf.iova + 0x123, false);
      ASSERT_EQ(found.fault, VtdFault::none);
      EXPECT_EQ(found.gpa, leaf.gpa + 0x123);
      EXPECT_EQ(found.page_shift, leaf.shift);
      const auto written = translate_address(view, binding.table, capabilities, leaf.iova, true);
      EXPECT_EQ(written.fault == VtdFault::none, may_write(leaf.access));
    }
  }
  EXPECT_GT(superpages, 100U);
  EXPECT_GT(read_only, 100U);
}

// Everything that the guest's test driver mapped (its MAP lines) is there, with its rights; and a ShadowDomain that is
// synchronised from the tables holds it on the host, however small the work budget of each step is.
TEST_P(VtdSnapshotTest, AShadowOfItHoldsWhatTheGuestMapped) {
  const VtdSnapshot snapshot{GetParam()};
  const auto view = snapshot.memory.view();
  const auto capabilities = VtdCapabilities::from_registers(snapshot.reg("CAP"), snapshot.reg("ECAP"), 39);
  std::map<std::string, std::vector<std::pair<IovaRange, Access>>> mapped;
  for_each_line(snapshot.text, [&](std::string_view line) {
    if (line.substr(0, 4) != "MAP ") return;
    const auto range = IovaRange::from_length(Iova{number_after(line, "iova=")}, Bytes{number_after(line, "size=")});
    ASSERT_TRUE(range);
    mapped[std::string{line.substr(4, 12)}].emplace_back(
        *range, line.find("perm=rw") != std::string_view::npos ? Access::read_write : Access::read);
  });
  ASSERT_EQ(mapped.size(), 3U);
  for (const auto& [device, list] : mapped) {
    const VtdBinding binding =
        resolve_binding(view, capabilities, snapshot.reg("RTADDR"), source_of(device), std::nullopt);
    ASSERT_EQ(binding.kind, VtdBinding::Kind::paging);
    const VtdEntryRules rules{binding.table, capabilities};
    RecordingTarget host;
    ShadowDomain domain{{}};
    ASSERT_TRUE(domain.attach(view, host));
    unsigned steps = 0;
    for (std::optional<std::uint64_t> at = 0; at; ++steps) {
      WorkBudget budget{600};
      const auto outcome = sync_range(view, domain, binding.table, rules,
                                      {Iova{*at}, input_ranges(binding.table, capabilities).low.last}, budget, 0);
      ASSERT_TRUE(outcome.error.ok()) << outcome.error.message();
      at = outcome.resume;
    }
    EXPECT_GT(steps, 2U);
    domain.commit_and_wait();
    EXPECT_TRUE(domain.failures().empty());
    for (const auto& [range, access] : list) {
      for (std::uint64_t iova = range.start.value; iova < range.last.value; iova += 4096) {
        const auto* held = host.find(iova);
        ASSERT_NE(held, nullptr) << std::hex << iova;
        EXPECT_EQ(held->access, access);
      }
    }
    // A second look finds nothing to do.
    WorkBudget budget{1U << 20};
    const auto again =
        sync_range(view, domain, binding.table, rules, input_ranges(binding.table, capabilities).low, budget, 0);
    EXPECT_TRUE(again.error.ok());
    EXPECT_EQ(domain.staged(), 0U);
  }
}

INSTANTIATE_TEST_SUITE_P(Recorded, VtdSnapshotTest, ::testing::Values("vtd-snap-1", "vtd-snap-sm-3"),
                         [](const auto& p) {
                           return std::string{p.param}.find("sm") == std::string::npos ? "legacy" : "scalable";
                         });

// Each descriptor, and the line in which QEMU says what it is.
struct VtdQueueTest : ::testing::TestWithParam<const char*> {};

TEST_P(VtdQueueTest, OurDecoderAgreesWithQemu) {
  const std::string log = read_recorded(GetParam());
  ASSERT_FALSE(log.empty());
  VtdDescriptorRules rules;
  rules.scalable = std::string_view{GetParam()}.find("scalable") != std::string_view::npos;
  std::optional<VtdDescriptor> last;
  std::set<int> kinds;
  std::size_t decoded = 0;
  std::size_t confirmed = 0;
  for_each_line(log, [&](std::string_view line) {
    const auto starts = [&](std::string_view what) { return line.substr(0, what.size()) == what; };
    using Kind = VtdDescriptor::Kind;
    using Scope = VtdDescriptor::Scope;
    if (starts("vtd_inv_desc ")) {
      last = decode_descriptor({number_after(line, "low "), number_after(line, "high "), 0, 0}, rules);
      ASSERT_TRUE(last) << line;
      ++decoded;
      kinds.insert(static_cast<int>(last->kind));
      const auto named = [&](std::string_view type) { return line.find(type) != std::string_view::npos; };
      const Kind expected = named("type context-cache") ? Kind::context_cache
                            : named("type p-iotlb")     ? Kind::pasid_iotlb
                            : named("type iotlb")       ? Kind::iotlb
                            : named("type pasid-cache") ? Kind::pasid_cache
                                                        : Kind::wait;
      ASSERT_EQ(last->kind, expected) << line;
      return;
    }
    if (!starts("vtd_inv_desc_")) return;
    ++confirmed;
    ASSERT_TRUE(last) << line;
    if (starts("vtd_inv_desc_cc_global") || starts("vtd_inv_desc_iotlb_global")) {
      ASSERT_EQ(last->scope, Scope::global) << line;
    } else if (starts("vtd_inv_desc_cc_devices")) {
      ASSERT_EQ(last->scope, Scope::device);
      ASSERT_EQ(last->source, number_after(line, "sid "));
      ASSERT_EQ(last->function_mask, number_after(line, "fmask "));
    } else if (starts("vtd_inv_desc_iotlb_domain")) {
      ASSERT_EQ(last->scope, Scope::domain);
      ASSERT_EQ(last->domain, number_after(line, "whole domain "));
    } else if (starts("vtd_inv_desc_iotlb_pages")) {
      ASSERT_EQ(last->scope, Scope::page);
      ASSERT_EQ(last->domain, number_after(line, "domain "));
      ASSERT_EQ(last->address, number_after(line, "addr "));
      ASSERT_EQ(last->address_mask, number_after(line, "mask "));
    } else if (starts("vtd_inv_desc_pasid_cache_psi")) {
      ASSERT_EQ(last->scope, Scope::pasid);
      ASSERT_EQ(last->domain, number_after(line, "domain "));
      ASSERT_EQ(last->pasid, number_after(line, "pasid "));
    } else if (starts("vtd_inv_desc_wait_sw")) {
      ASSERT_TRUE(last->write_status);
      ASSERT_EQ(last->status_address, number_after(line, "addr "));
      ASSERT_EQ(last->status_data, number_after(line, "data "));
    }
  });
  EXPECT_GT(decoded, 10000U);
  EXPECT_GT(confirmed, 8000U);
  EXPECT_GE(kinds.size(), rules.scalable ? 5U : 3U);
}

INSTANTIATE_TEST_SUITE_P(Recorded, VtdQueueTest, ::testing::Values("vtd-qi-legacy.log", "vtd-qi-scalable.log"),
                         [](const auto& p) {
                           return std::string{p.param}.find("scalable") == std::string::npos ? "legacy" : "scalable";
                         });

}  // namespace
}  // namespace iovane::viommu
