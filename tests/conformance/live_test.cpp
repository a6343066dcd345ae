// What happens to an address space while it works: dirty tracking, and devices that move.
#include <algorithm>
#include <array>
#include <atomic>
#include <thread>
#include <vector>

#include "conformance/conformance.hpp"
#include "conformance/tapped_backend.hpp"
#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"

namespace iovane::test {
namespace {

class LiveContract : public Conformance {
 protected:
  void SetUp() override {
    Conformance::SetUp();
    if (HasFatalFailure() || IsSkipped()) return;
    backend_.reset();
    auto backend = open_backend(*kernel_, {.name = std::string{to_string(GetParam())}, .descriptor = {}});
    ASSERT_TRUE(backend) << backend.error().message();
    engine_ = EngineAccess::open(std::make_unique<TappedBackend>(*std::move(backend), inner_), "under test");
  }
  void TearDown() override {
    witness_.reset();
    first_ = AddressSpace{};
    second_ = AddressSpace{};
    engine_ = Engine{};
    Conformance::TearDown();
  }

  AddressSpace make(bool dirty_tracking) {
    AddressSpaceConfig config;
    config.layout = LayoutPolicy::fixed;
    config.dirty_tracking = dirty_tracking;
    auto made = engine_.create_address_space(config);
    EXPECT_TRUE(made) << made.error().message();
    return made ? *std::move(made) : AddressSpace{};
  }
  std::unique_ptr<Witness> witness_of(BackendSpace& space, const DeviceInfo& device) {
    AttachedDevice attached;
    attached.id = DeviceId{device.id};
    attached.name = device.name;
    attached.device_fd = device.device_fd;
    return machine_->witness(space, attached);
  }
  static MapRequest request(std::uint64_t iova, std::span<std::byte> memory) {
    MapRequest map;
    map.memory = MemoryPiece::of(memory);
    map.placement = Placement::fixed(Iova{iova});
    return map;
  }
  static bool is_set(const std::vector<std::uint64_t>& bitmap, std::size_t bit) {
    return (bitmap[bit / 64] >> (bit % 64) & 1U) != 0;
  }

  Engine engine_;
  AddressSpace first_, second_;
  BackendSpace* inner_ = nullptr;
};

TEST_P(LiveContract, what_a_device_wrote_is_told_also_after_its_unmap) {
  const bool may_track = GetParam() == Interface::iommufd || GetParam() == Interface::type1_v2;
  if (spapr() || stage1()) {
    AddressSpaceConfig config;
    config.dirty_tracking = true;
    EXPECT_EQ(engine_.create_address_space(config).error().code, Errc::unsupported) << "they record no writes";
    return;
  }
  first_ = make(true);
  const auto device = first_.attach({.pci_address = machine_->devices().front()});
  if (!device) {
    // This IOMMU, or this interface, has no dirty tracking: the refusal must say who and what.
    EXPECT_EQ(device.error().code, Errc::unsupported) << device.error().message();
    EXPECT_NE(device.error().detail().find(machine_->devices().front()), std::string::npos);
    EXPECT_NE(device.error().detail().find("dirty"), std::string::npos) << device.error().detail();
    EXPECT_NE(GetParam(), Interface::type1_v2) << "type1 tracks on every kernel since 5.8";
    if (may_track) GTEST_SKIP() << "not shown here: " << device.error().detail();
    return;
  }
  const auto started = first_.start_dirty_tracking();
  if (!may_track) {
    EXPECT_EQ(started.error().code, Errc::unsupported) << started.error().message();
    return;
  }
  ASSERT_TRUE(started) << started.error().message();
  witness_ = witness_of(*inner_, *device);
  ASSERT_NE(witness_, nullptr);
  const Memory memory{8};
  const std::uint64_t page = os_page_bytes();
  ASSERT_TRUE(first_.map(request(base, memory.bytes().first(6 * page))).ok());
  ASSERT_TRUE(first_.map(request(base + 6 * page, memory.bytes().subspan(6 * page))).ok());
  EXPECT_TRUE(writes(*witness_, Iova{base + 2 * page}, memory.page(2)));
  EXPECT_TRUE(writes(*witness_, Iova{base + 7 * page}, memory.page(7)));
  std::vector<std::uint64_t> bitmap(1);
  auto read = first_.read_dirty(at(base, 8), Bytes{page}, bitmap);
  ASSERT_TRUE(read) << read.error().message();
  EXPECT_TRUE(is_set(bitmap, 2) && is_set(bitmap, 7));
  EXPECT_EQ(*read, first_.facts().dirty_is_exact ? 2U : 8U);

  EXPECT_TRUE(writes(*witness_, Iova{base + 4 * page}, memory.page(4)));
  ASSERT_TRUE(first_.unmap(UnmapRequest::of(at(base, 6))).ok());
  bitmap.assign(1, 0);
  read = first_.read_dirty(at(base, 6), Bytes{page}, bitmap);
  ASSERT_TRUE(read) << read.error().message();
  EXPECT_TRUE(is_set(bitmap, 4));
  EXPECT_EQ(*read, first_.facts().dirty_is_exact ? 1U : 6U);
  bitmap.assign(1, 0);
  EXPECT_EQ(first_.read_dirty(at(base, 6), Bytes{page}, bitmap).value_or(99U), 0U) << "told once";

  EXPECT_TRUE(writes(*witness_, Iova{base + 6 * page}, memory.page(6)));
  ASSERT_TRUE(first_.unmap(UnmapRequest::of(at(base, 8))).ok());
  std::array<DirtyRun, 4> runs;
  ASSERT_EQ(first_.take_unmapped_dirty(runs), 1U);
  EXPECT_EQ(runs[0].range.start, Iova{base + 6 * page});
  EXPECT_EQ(runs[0].memory.offset, memory.address() + 6 * page);
  EXPECT_EQ(first_.dirty_stats().guessed, 0U);
  EXPECT_TRUE(first_.stop_dirty_tracking());
}

TEST_P(LiveContract, a_device_moves_while_both_address_spaces_work) {
  if (machine_->devices().size() < 2) GTEST_SKIP() << "needs two devices in groups of their own";
  if (GetParam() == Interface::spapr_v1) GTEST_SKIP() << "a version 1 container takes one group";
  first_ = make(false);
  BackendSpace* const first_inner = inner_;
  second_ = make(false);
  BackendSpace* const second_inner = inner_;
  const bool gapless = by_cdev();
  // A resident keeps the second space alive on type1, where a container without a group accepts no maps.
  const auto resident = second_.attach({.pci_address = machine_->devices()[1]});
  ASSERT_TRUE(resident) << resident.error().message();
  auto device = first_.attach({.pci_address = machine_->devices()[0]});
  ASSERT_TRUE(device) << device.error().message();
  const Memory memory{6};
  if (gapless) {  // type1's container drops what is mapped when its last device goes
    ASSERT_TRUE(first_.map(request(base, memory.page(0))).ok());
  }
  ASSERT_TRUE(second_.map(request(base, memory.page(1))).ok());

  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> pairs{0};
  std::thread traffic{[&] {
    const std::uint64_t elsewhere = base + 64 * os_page_bytes();
    while (!stop.load(std::memory_order_relaxed)) {  // relaxed: only ends the loop
      const Completion mapped = second_.map(request(elsewhere, memory.page(2)));
      EXPECT_TRUE(mapped.ok()) << mapped.error.message();
      EXPECT_TRUE(second_.unmap(UnmapRequest::of(at(elsewhere, 1))).ok());
      if (gapless) {
        EXPECT_TRUE(first_.map(request(elsewhere, memory.page(3))).ok());
        EXPECT_TRUE(first_.unmap(UnmapRequest::of(at(elsewhere, 1))).ok());
      }
      pairs.fetch_add(1, std::memory_order_relaxed);  // relaxed: a count
    }
  }};
  const auto gap = gapless ? AddressSpace::Gap::refuse : AddressSpace::Gap::accept;
  AddressSpace* here = &first_;
  AddressSpace* there = &second_;
  std::string cannot_join;
  for (int move = 0; move < 5; ++move) {
    auto moved = here->move_device(device->id, *there, gap);
    if (!moved && spapr() && move == 0) {
      cannot_join = moved.error().detail();
      EXPECT_NE(cannot_join.find("back where it was"), std::string::npos) << cannot_join;
      break;
    }
    EXPECT_TRUE(moved) << moved.error().message();
    if (!moved) break;
    if (gapless) {
      EXPECT_EQ(moved->device_fd, device->device_fd);
    }
    device = std::move(moved);
    std::swap(here, there);
    std::this_thread::sleep_for(std::chrono::milliseconds{20});
  }
  stop.store(true, std::memory_order_relaxed);  // relaxed: join() orders the rest
  traffic.join();
  if (!cannot_join.empty()) GTEST_SKIP() << "this platform does not let groups share windows: " << cannot_join;
  EXPECT_GT(pairs.load(std::memory_order_relaxed), 0U);
  ASSERT_EQ(here, &second_) << "five moves end in the second";
  witness_ = witness_of(*second_inner, *device);
  ASSERT_NE(witness_, nullptr);
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(1)));
  if (!gapless) return;
  witness_.reset();
  device = second_.move_device(device->id, first_);
  ASSERT_TRUE(device) << device.error().message();
  witness_ = witness_of(*first_inner, *device);
  ASSERT_NE(witness_, nullptr);
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
}

IOVANE_CONFORMANCE(LiveContract);

}  // namespace
}  // namespace iovane::test
