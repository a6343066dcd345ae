// Windows and error handling through the public AddressSpace: made, used by a device, removed, and refused where the
// interface has none.
#include <optional>
#include <vector>

#include "conformance/engine_conformance.hpp"

namespace iovane::test {
namespace {

class WindowContract : public EngineConformance {
 protected:
  void TearDown() override {
    close_space();
    Conformance::TearDown();
  }
  static MapRequest request(Iova iova, std::span<std::byte> memory) {
    MapRequest map;
    map.memory = MemoryPiece::of(memory);
    map.placement = Placement::fixed(iova);
    return map;
  }
};

TEST_P(WindowContract, windows_come_and_go_while_the_address_space_lives) {
  open_space(*kernel_);
  if (HasFatalFailure()) return;
  const auto windows = address_space_.windows();
  if (!spapr()) {
    EXPECT_EQ(windows.error().code, Errc::unsupported) << windows.error().message();
    EXPECT_EQ(address_space_.error_handling().error().code, Errc::unsupported);
    return;
  }
  ASSERT_TRUE(windows) << windows.error().message();
  ASSERT_EQ(windows->list()->size(), 1U);
  EXPECT_EQ(windows->list()->front().range, windows->limits()->default_window);
  const WindowRequest wanted{.length = Bytes{16U << 20}, .page = Bytes{4096}};
  const auto made = windows->create(wanted);
  if (!spapr_v2()) {
    EXPECT_EQ(made.error().code, Errc::unsupported);
    return;
  }
  ASSERT_TRUE(made) << made.error().message();
  ASSERT_EQ(address_space_.usable_ranges()->size(), 2U);
  EXPECT_EQ(address_space_.usable_ranges()->back(), made->range);
  EXPECT_EQ(windows->create({.length = Bytes{16U << 20}, .page = Bytes{65536}}).error().code, Errc::unsupported)
      << "the engine chooses IOVAs, and a map of 4 KiB could land there";
  EXPECT_EQ(windows->create(wanted).error().code, Errc::limit_reached);

  const Memory memory{2};
  const Iova last{made->range.last.value - os_page_bytes() + 1};
  ASSERT_TRUE(address_space_.map(request(last, memory.page(0))).ok());
  MapRequest low = request({}, memory.page(1));
  low.placement = Placement::anywhere({}, Iova{0xffff'ffff});
  const Completion chosen = address_space_.map(low);
  ASSERT_TRUE(chosen.ok()) << chosen.error.message();
  EXPECT_TRUE(reads(*witness_, last, memory.page(0)));
  EXPECT_TRUE(writes(*witness_, last, memory.page(0)));
  EXPECT_EQ(windows->remove(made->range.start).error().code, Errc::busy);
  ASSERT_TRUE(address_space_.unmap(UnmapRequest::of(at(last.value, 1))).ok());
  ASSERT_TRUE(windows->remove(made->range.start));
  EXPECT_EQ(windows->remove(made->range.start).error().code, Errc::not_found);
  EXPECT_EQ(address_space_.usable_ranges()->size(), 1U);
  EXPECT_EQ(address_space_.map(request(last, memory.page(0))).error.code, Errc::iova_reserved);
  EXPECT_TRUE(cannot_read(*witness_, last, memory.page(0)));
  EXPECT_TRUE(reads(*witness_, chosen.iova, memory.page(1))) << "the other window is as it was";
  ASSERT_TRUE(address_space_.unmap(UnmapRequest::of(chosen.mapping)).ok());

  const Windows outlives = *windows;
  close_space();
  EXPECT_EQ(outlives.list().error().code, Errc::closed);
  EXPECT_EQ(outlives.create(wanted).error().code, Errc::closed);
}

TEST_P(WindowContract, a_window_with_cached_mappings_is_removed_when_nobody_uses_them) {
  if (!spapr_v2()) return;
  open_space(*kernel_);
  if (HasFatalFailure()) return;
  const auto windows = address_space_.windows();
  ASSERT_TRUE(windows);
  const auto made = windows->create({.length = Bytes{16U << 20}, .page = Bytes{4096}});
  ASSERT_TRUE(made) << made.error().message();
  ASSERT_TRUE(address_space_.open_cache({.chunk = Bytes{os_page_bytes()}}));
  const Memory memory{1};
  auto lease = address_space_.acquire(MemoryPiece::of(memory.page(0)), Access::read_write);
  ASSERT_TRUE(lease) << lease.error().message();
  const bool high = made->range.contains(lease->iova());
  const Iova window = high ? made->range.start : windows->list()->front().range.start;
  EXPECT_EQ(windows->remove(window).error().code, Errc::busy);
  lease->release();
  EXPECT_TRUE(windows->remove(window));
  EXPECT_EQ(address_space_.usable_ranges()->size(), 1U);
}

TEST_P(WindowContract, a_caller_with_a_layout_of_its_own_may_mix_page_sizes) {
  if (!spapr_v2()) return;
  AddressSpaceConfig config;
  config.layout = LayoutPolicy::fixed;
  open_space(*kernel_, config);
  if (HasFatalFailure()) return;
  const auto windows = address_space_.windows();
  ASSERT_TRUE(windows);
  const auto made = windows->create({.length = Bytes{16U << 20}, .page = Bytes{65536}});
  ASSERT_TRUE(made) << made.error().message();
  EXPECT_EQ(made->page, Bytes{65536});
  EXPECT_EQ(address_space_.facts().page_sizes, 65536U | 4096U);
  const Memory memory{1};
  ASSERT_TRUE(address_space_.map(request(Iova{base}, memory.page(0))).ok());
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
  const Iova inside{made->range.start.value + 4096};
  EXPECT_EQ(address_space_.map(request(inside, memory.page(0))).error.code, Errc::invalid_argument);
  EXPECT_TRUE(windows->remove(made->range.start));
}

TEST_P(WindowContract, a_device_is_reset_or_let_run_again_through_the_address_space) {
  if (!spapr()) return;
  open_space(*kernel_);
  if (HasFatalFailure()) return;
  auto recovery = address_space_.error_handling();
  if (!recovery) GTEST_SKIP() << "this platform offers no error handling: " << recovery.error().detail();
  const auto state = recovery->state();
  if (!state) GTEST_SKIP() << "no error handling for this device: " << state.error().detail();
  EXPECT_EQ(*state, EehState::normal);
  const Memory memory{2};
  const Iova other{base + os_page_bytes()};
  ASSERT_TRUE(address_space_.map(request(Iova{base}, memory.page(0))).ok());
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));

  std::vector<EehEvent> heard;
  recovery->set_listener([&](const EehEvent& event) {
    heard.push_back(event);
    if (!event.frozen()) return;
    // A listener recovers, and what it maps meanwhile is what the device sees then.
    if (machine_->frozen_device_is_stopped()) {
      EXPECT_TRUE(cannot_read(*witness_, Iova{base}, memory.page(0))) << "no DMA while frozen";
    }
    EXPECT_TRUE(address_space_.map(request(other, memory.page(1))).ok());
    EXPECT_TRUE(recovery->unfreeze_io());
    EXPECT_TRUE(recovery->unfreeze_dma());
  });
  if (machine_->freeze(*inner_, attached_)) {
    ASSERT_TRUE(recovery->check());
    ASSERT_EQ(heard.size(), 1U);
    EXPECT_EQ(heard.front().now, EehState::stopped);
    EXPECT_TRUE(reads(*witness_, other, memory.page(1)));
    ASSERT_TRUE(recovery->check());
    ASSERT_EQ(heard.size(), 2U) << "frozen, and running again";
    EXPECT_EQ(heard.back().now, EehState::normal);
    EXPECT_TRUE(address_space_.unmap(UnmapRequest::of(at(other.value, 1))).ok());
  }
  for (const EehReset kind : {EehReset::hot, EehReset::fundamental}) {
    ASSERT_TRUE(recovery->assert_reset(kind));
    EXPECT_TRUE(address_space_.map(request(other, memory.page(1))).ok()) << "tables change during a reset";
    ASSERT_TRUE(recovery->deactivate_reset());
    ASSERT_TRUE(recovery->configure());
    restart_device();
    EXPECT_TRUE(reads(*witness_, other, memory.page(1)));
    EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
    EXPECT_TRUE(address_space_.unmap(UnmapRequest::of(at(other.value, 1))).ok());
  }
  const ErrorHandling outlives = *recovery;
  close_space();
  EXPECT_EQ(outlives.state().error().code, Errc::closed);
}

IOVANE_CONFORMANCE(WindowContract);

}  // namespace
}  // namespace iovane::test
