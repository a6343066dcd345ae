// Limits: said before they hit, named when they do; and failures anywhere leave nothing behind.
#include <thread>

#include "backends/uapi/iommufd.hpp"
#include "base/fault_point.hpp"
#include "conformance/conformance.hpp"

namespace iovane::test {
namespace {

using LimitContract = Conformance;

TEST_P(LimitContract, the_entry_limit_is_known_before_it_hits) {
  make_default();
  const std::uint64_t limit = space_->facts().entries_max;
  if (!type1()) {
    EXPECT_EQ(limit, 0U);
    EXPECT_FALSE(space_->headroom().entries.has_value());
    return;
  }
  ASSERT_GT(limit, 0U);
  if (limit > 100'000) GTEST_SKIP() << "the limit was raised to " << limit;
  EXPECT_EQ(space_->headroom().entries, limit);
  const Memory memory{1};
  std::vector<BackendOp> ops;
  for (std::uint64_t i = 0; i < limit; ++i)
    ops.push_back(map_op(at(0x1'0000'0000 + 2 * i * os_page_bytes(), 1), memory.address()));
  for (const auto& result : run_batch(*space_, ops)) ASSERT_TRUE(result.error.ok()) << result.error.message();
  EXPECT_EQ(space_->headroom().entries, 0U);
  const auto result = map(at(base, 1), memory.address());
  EXPECT_EQ(result.error.code, Errc::entry_limit) << result.error.message();
  EXPECT_NE(result.error.detail().find(std::to_string(limit)), std::string::npos) << result.error.detail();
  EXPECT_TRUE(unmap(at(0x1'0000'0000, 1)).error.ok());
  EXPECT_EQ(space_->headroom().entries, 1U);
  EXPECT_TRUE(map(at(base, 1), memory.address()).error.ok());
  EXPECT_TRUE(space_->unmap_all());
}

TEST_P(LimitContract, memlock_is_named_with_limit_use_and_need) {
  constexpr Bytes limit{1 << 20};
  if (GetParam() == Interface::spapr_v1) GTEST_SKIP() << "charges its window when a device comes, and no map";
  std::uint64_t windows = 0;
  if (spapr()) {
    make_default();
    for (const SpaprWindow& window : space_->spapr()->windows()) windows += window.table.value;
    witness_.reset();
    space_.reset();
    // One byte less than the windows need, and no device can come in; said with numbers.
    restart({.memlock = Bytes{windows / 2}});
    space_ = make_space();
    const auto refused = space_->attach({.pci_address = machine_->devices().front()});
    EXPECT_EQ(refused.error().code, Errc::memlock_exceeded) << refused.error().message();
    space_.reset();
  }
  if (stage1()) {  // its tables are pinned memory
    make_default();
    windows = space_->table_memory().value;
    witness_.reset();
    space_.reset();
  }
  restart({.memlock = Bytes{limit.value + windows}});
  ASSERT_NE(machine_, nullptr) << "this machine cannot limit pinned memory";
  make_default();
  const Memory large{512};
  const Memory small{4};
  EXPECT_EQ(space_->headroom().memlock, limit);
  const auto result = map(at(base, 512), large.address());
  ASSERT_EQ(result.error.code, Errc::memlock_exceeded) << result.error.message();
  EXPECT_NE(result.error.detail().find(std::to_string(limit.value + windows)), std::string::npos)
      << result.error.detail();
  EXPECT_NE(result.error.detail().find(std::to_string(large.length().value)), std::string::npos);
  EXPECT_EQ(space_->headroom().memlock, limit) << "the refused map kept some";
  ASSERT_TRUE(map(at(base, 4), small.address()).error.ok());
  EXPECT_EQ(space_->headroom().memlock, Bytes{limit.value - small.length().value});
  EXPECT_TRUE(unmap(at(base, 4)).error.ok());
  EXPECT_EQ(space_->headroom().memlock, limit);
  if (has(space_->facts().capabilities, Capability::explicit_pin)) {
    const auto region = space_->register_memory({.address = large.data(), .length = large.length()});
    EXPECT_EQ(region.error().code, Errc::memlock_exceeded) << region.error().message();
  }
}

TEST_P(LimitContract, threads_map_disjoint_ranges_where_the_space_allows) {
  make_default();
  const bool parallel = has(space_->facts().capabilities, Capability::parallel_map);
  EXPECT_EQ(parallel, by_cdev() || spapr());
  if (!parallel) return;
  const Memory memory{8};
  constexpr int rounds = 100;
  auto work = [&](std::uint64_t where, std::size_t page, int& failures) {
    for (int i = 0; i < rounds; ++i) {
      if (run(*space_, map_op(at(where, 4), memory.address(page))).error) ++failures;
      if (run(*space_, unmap_op(at(where, 4))).bytes != Bytes{4 * os_page_bytes()}) ++failures;
    }
  };
  int failed_here = 0, failed_there = 0;
  std::thread other{[&] { work(base + 0x1000'0000, 4, failed_there); }};
  work(base, 0, failed_here);
  other.join();
  EXPECT_EQ(failed_here + failed_there, 0);
}

/// Everything a space does, once; gives up at the first failure, as a caller would.
void whole_life(Kernel& kernel, Interface interface, const std::string& device, const Memory& memory) {
  auto backend = open_backend(kernel, {.name = std::string{to_string(interface)}});
  if (!backend) return;
  auto space = (*backend)->create_space({});
  if (!space) return;
  const auto before = (*space)->register_memory({.address = memory.data(), .length = memory.length()});
  const auto attached = (*space)->attach({.pci_address = device});
  if (!before || !attached) return;
  const auto region = (*space)->register_memory({.address = memory.data(), .length = Bytes{os_page_bytes()}});
  const bool copies = has((*space)->facts().capabilities, Capability::copy_reuses_pin);
  const std::uint64_t page = os_page_bytes();
  const BackendOp ops[] = {
      {.kind = OpKind::map,
       .access = Access::read_write,
       .region = {},
       .range = *IovaRange::from_length(Iova{0x1000'0000}, memory.length()),
       .memory = memory.address()},
      {.kind = copies ? OpKind::copy : OpKind::map,
       .access = Access::read,
       .region = *before,
       .range = *IovaRange::from_length(Iova{0x2000'0000}, Bytes{page}),
       .memory = page},
      {.kind = OpKind::unmap, .range = *IovaRange::from_length(Iova{0x1000'0000}, memory.length())}};
  BackendOpResult results[3];
  (*space)->execute(ops, results);
  if (region) (void)(*space)->unregister_memory(*region).has_value();
  (void)(*space)->usable_ranges().has_value();
  (void)(*space)->unmap_all().has_value();
  (void)(*space)->unregister_memory(*before).has_value();
  (void)(*space)->detach(attached->id).has_value();
}

TEST_P(LimitContract, any_failing_call_leaves_nothing_behind) {
  backend_.reset();
  const Memory memory{4};
  FailingKernel failing{*kernel_};
  for (const int os_errno : {ENOMEM, EINVAL}) {
    failing.set_fault_errno(os_errno);
    std::uint64_t n = 1;
    for (; n < 500; ++n) {
      base::arm_fault(static_cast<std::uint32_t>(base::FaultKind::kernel_call), n);
      whole_life(failing, GetParam(), machine_->devices()[0], memory);
      const bool fired = base::disarm_fault();
      ASSERT_EQ(kernel_->open_descriptors(), 0) << "call " << n << " failing leaks a descriptor";
      ASSERT_EQ(kernel_->memlock().pinned, pinned_before_) << "call " << n << " failing leaks pins";
      if (!fired) break;
    }
    EXPECT_GT(n, 10U) << "the sweep reached nothing";
    EXPECT_LT(n, 500U);
  }
}

IOVANE_CONFORMANCE(LimitContract);

}  // namespace
}  // namespace iovane::test
