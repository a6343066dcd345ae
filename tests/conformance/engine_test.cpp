// The engine's contract (docs/ARCHITECTURE.md) through its public API, with a device's DMA as the proof.
#include <sys/mman.h>

#include <array>
#include <cerrno>
#include <optional>
#include <vector>

#include "backends/uapi/iommufd.hpp"
#include "backends/uapi/vfio.hpp"
#include "conformance/engine_conformance.hpp"

namespace iovane::test {
namespace {

class EngineContract : public EngineConformance {
 protected:
  void SetUp() override {
    Conformance::SetUp();
    if (HasFatalFailure() || IsSkipped()) return;
    open_engine(LayoutPolicy::engine_managed, *kernel_);
  }
  void TearDown() override {
    queue_ = Queue{};
    close_space();
    failing_.reset();
    Conformance::TearDown();
  }

  /// An engine over this interface of `kernel`, an address space with the first device, a queue and a witness.
  void open_engine(LayoutPolicy layout, Kernel& kernel) {
    queue_ = Queue{};
    AddressSpaceConfig config;
    config.layout = layout;
    open_space(kernel, config);
    if (HasFatalFailure()) return;
    auto queue = address_space_.open_queue();
    ASSERT_TRUE(queue) << queue.error().message();
    queue_ = *std::move(queue);
  }

  static MapRequest request(std::uint64_t iova, std::span<std::byte> memory, Access access = Access::read_write) {
    MapRequest map;
    map.memory = MemoryPiece::of(memory);
    map.access = access;
    map.placement = Placement::fixed(Iova{iova});
    return map;
  }
  std::vector<Completion> run_queue() {
    queue_.submit();
    std::vector<Completion> all(queue_.outstanding());
    all.resize(queue_.wait(all, all.size(), std::chrono::seconds{60}));
    return all;
  }
  std::uint64_t page_bytes() const { return os_page_bytes(); }
  bool iommufd() const { return GetParam() == Interface::iommufd; }
  unsigned long map_call() const {
    return iommufd() ? uapi::iommufd::IoasMap::request : uapi::vfio::Type1DmaMap::request;
  }
  unsigned long unmap_call() const {
    if (stage1()) return uapi::iommufd::HwptInvalidate::request;  // what makes an unmap final there
    return iommufd() ? uapi::iommufd::IoasUnmap::request : uapi::vfio::Type1DmaUnmap::request;
  }

  Queue queue_;
  std::optional<FailingKernel> failing_;
};

TEST_P(EngineContract, bytes_travel_through_addresses_that_the_engine_chose) {
  const Memory memory{4};
  for (std::size_t i = 0; i < 4; ++i) {
    MapRequest map = request(0, memory.page(i));
    map.placement = Placement::anywhere({}, Iova{0xffff'ffff});
    ASSERT_TRUE(queue_.stage(map));
  }
  const auto done = run_queue();
  ASSERT_EQ(done.size(), 4U);
  for (std::size_t i = 0; i < 4; ++i) {
    ASSERT_TRUE(done[i].ok()) << done[i].error.message();
    EXPECT_LE(done[i].iova, Iova{0xffff'ffff});
    EXPECT_TRUE(reads(*witness_, done[i].iova, memory.page(i)));
    EXPECT_TRUE(writes(*witness_, done[i].iova, memory.page(i)));
  }
}

TEST_P(EngineContract, after_a_strict_unmap_completed_the_device_cannot_reach_the_page) {
  const Memory memory{1};
  ASSERT_TRUE(address_space_.map(request(base, memory.page(0))).ok());
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
  const Completion gone = address_space_.unmap(UnmapRequest::of(at(base, 1)));
  ASSERT_TRUE(gone.ok()) << gone.error.message();
  EXPECT_EQ(gone.bytes, memory.length());
  EXPECT_TRUE(cannot_read(*witness_, Iova{base}, memory.page(0)));
  EXPECT_TRUE(cannot_write(*witness_, Iova{base}, memory.page(0)));
}

TEST_P(EngineContract, a_read_only_mapping_cannot_be_written) {
  const Memory memory{1};
  ASSERT_TRUE(address_space_.map(request(base, memory.page(0), Access::read)).ok());
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
  EXPECT_TRUE(cannot_write(*witness_, Iova{base}, memory.page(0)));
}

TEST_P(EngineContract, overlap_cut_and_reserved_are_the_same_errors_everywhere) {
  const Memory memory{4};
  ASSERT_TRUE(address_space_.map(request(base, memory.bytes())).ok());
  EXPECT_EQ(address_space_.map(request(base + page_bytes(), memory.page(0))).error.code, Errc::iova_busy);
  EXPECT_EQ(address_space_.unmap(UnmapRequest::of(at(base, 2))).error.code, Errc::would_bisect);
  EXPECT_EQ(address_space_.unmap(UnmapRequest::of(at(base + 8 * page_bytes(), 1))).error.code, Errc::not_found);
  const auto usable = address_space_.usable_ranges();
  ASSERT_TRUE(usable);
  ASSERT_GE(usable->size(), spapr() ? 1U : 2U) << "these machines have an interrupt window";
  const Completion reserved = address_space_.map(request((*usable)[0].last.value + 1, memory.page(0)));
  EXPECT_EQ(reserved.error.code, Errc::iova_reserved);
  EXPECT_TRUE(reads(*witness_, Iova{base + 3 * page_bytes()}, memory.page(3)));
}

TEST_P(EngineContract, one_bad_map_of_a_batch_fails_alone) {
  const bool software = machine_->kernel().description().starts_with("model");
  failing_.emplace(*kernel_);
  if (software) open_engine(LayoutPolicy::fixed, *failing_);
  if (HasFatalFailure()) return;
  const Memory memory{2};
  void* const hole = ::mmap(nullptr, os_page_bytes(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(hole, MAP_FAILED);
  const std::span<std::byte> unreadable{static_cast<std::byte*>(hole), os_page_bytes()};
  // The software IOMMU does not look at pages: there the call is made to fail as a kernel's would.
  // sPAPR's does, when it registers the memory.
  if (software && !spapr_v2())
    failing_->add({.request = map_call(), .nth = 2, .times = 1, .os_errno = EFAULT, .after_call = false});
  ASSERT_TRUE(queue_.stage(request(base, memory.page(0))));
  ASSERT_TRUE(queue_.stage(request(base + page_bytes(), unreadable)));
  ASSERT_TRUE(queue_.stage(request(base + 2 * page_bytes(), memory.page(1))));
  const auto done = run_queue();
  ::munmap(hole, os_page_bytes());
  ASSERT_EQ(done.size(), 3U);
  EXPECT_TRUE(done[0].ok()) << done[0].error.message();
  EXPECT_EQ(done[1].error.code, Errc::bad_memory) << done[1].error.message();
  EXPECT_TRUE(done[2].ok()) << done[2].error.message();
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
  EXPECT_TRUE(reads(*witness_, Iova{base + 2 * page_bytes()}, memory.page(1)));
}

// A kernel that cannot write a call's answer back says EFAULT for what it has done.
TEST_P(EngineContract, a_map_that_took_effect_and_failed_is_taken_out_again) {
  if (!iommufd()) GTEST_SKIP() << "only iommufd answers a map in the caller's structure";
  failing_.emplace(*kernel_);
  open_engine(LayoutPolicy::fixed, *failing_);
  if (HasFatalFailure()) return;
  const Memory memory{4};
  const std::array pieces{MemoryPiece::of(memory.page(0)), MemoryPiece::of(memory.page(2))};
  MapRequest scattered = request(base + 8 * page_bytes(), memory.page(0));
  scattered.pieces = pieces;
  failing_->add({.request = map_call(), .nth = 2, .times = 1, .os_errno = EFAULT, .after_call = true});
  failing_->add({.request = map_call(), .nth = 4, .times = 1, .os_errno = EFAULT, .after_call = true});
  ASSERT_TRUE(queue_.stage(request(base, memory.page(0))));
  ASSERT_TRUE(queue_.stage(request(base + page_bytes(), memory.page(1))));
  ASSERT_TRUE(queue_.stage(scattered));
  const auto done = run_queue();
  failing_->clear();
  ASSERT_EQ(done.size(), 3U);
  EXPECT_TRUE(done[0].ok()) << done[0].error.message();
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
  for (const std::size_t i : {1U, 2U}) {
    EXPECT_EQ(done[i].error.code, Errc::bad_memory) << done[i].error.message();
    EXPECT_EQ(address_space_.find(done[i].iova).error().code, Errc::not_found);
  }
  EXPECT_TRUE(cannot_read(*witness_, Iova{base + page_bytes()}, memory.page(1)));
  EXPECT_TRUE(cannot_read(*witness_, Iova{base + 8 * page_bytes()}, memory.page(0)));
  EXPECT_TRUE(cannot_read(*witness_, Iova{base + 9 * page_bytes()}, memory.page(2)));
  EXPECT_TRUE(address_space_.map(request(base + page_bytes(), memory.page(1))).ok());
  EXPECT_TRUE(address_space_.map(scattered).ok());
  EXPECT_EQ(address_space_.stats().quarantined_mappings, 0U);
}

TEST_P(EngineContract, an_unmap_that_took_effect_and_failed_is_done_and_not_quarantined) {
  failing_.emplace(*kernel_);
  open_engine(LayoutPolicy::fixed, *failing_);
  if (HasFatalFailure()) return;
  const Memory memory{3};
  for (std::size_t i = 0; i < 3; ++i) ASSERT_TRUE(queue_.stage(request(base + i * page_bytes(), memory.page(i))));
  for (const Completion& c : run_queue()) ASSERT_TRUE(c.ok()) << c.error.message();
  failing_->add({.request = unmap_call(), .nth = 1, .times = 1, .os_errno = EFAULT, .after_call = true});
  const Completion one = address_space_.unmap(UnmapRequest::of(at(base, 1)));
  failing_->clear();
  ASSERT_TRUE(one.ok()) << one.error.message();
  EXPECT_EQ(one.bytes.value, page_bytes());
  failing_->add({.request = unmap_call(), .nth = 1, .times = 1, .os_errno = EFAULT, .after_call = true});
  for (std::size_t i = 1; i < 3; ++i) ASSERT_TRUE(queue_.stage(UnmapRequest::of(at(base + i * page_bytes(), 1))));
  for (const Completion& c : run_queue()) {
    EXPECT_TRUE(c.ok()) << c.error.message();
    EXPECT_EQ(c.bytes.value, page_bytes());
  }
  failing_->clear();
  EXPECT_EQ(address_space_.stats().quarantined_mappings, 0U);
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(cannot_read(*witness_, Iova{base + i * page_bytes()}, memory.page(i)));
    EXPECT_TRUE(address_space_.map(request(base + i * page_bytes(), memory.page(i))).ok());
  }
}

TEST_P(EngineContract, a_replacement_that_took_effect_and_failed_gives_way_to_the_old_mapping) {
  if (!iommufd()) GTEST_SKIP() << "only iommufd answers a map in the caller's structure";
  failing_.emplace(*kernel_);
  open_engine(LayoutPolicy::fixed, *failing_);
  if (HasFatalFailure()) return;
  const Memory memory{2};
  ASSERT_TRUE(address_space_.map(request(base, memory.page(0))).ok());
  ReplaceRequest replace;
  replace.range = at(base, 1);
  replace.memory = MemoryPiece::of(memory.page(1));
  failing_->add({.request = map_call(), .nth = 1, .times = 1, .os_errno = EFAULT, .after_call = true});
  const Completion done = address_space_.replace(replace);
  failing_->clear();
  EXPECT_EQ(done.error.code, Errc::bad_memory) << done.error.message();
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
  EXPECT_TRUE(address_space_.replace(replace).ok());
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(1)));
}

TEST_P(EngineContract, neighbouring_unmaps_are_one_kernel_call) {
  const Memory memory{4};
  // Holes of one granule: sPAPR does not merge across many TCEs, of which an OS page of 64 KiB has 16.
  const std::uint64_t step = page_bytes() + address_space_.facts().granule.value;
  for (std::size_t i = 0; i < 4; ++i) ASSERT_TRUE(queue_.stage(request(base + i * step, memory.page(i))));
  for (const Completion& c : run_queue()) ASSERT_TRUE(c.ok()) << c.error.message();
  const std::uint64_t before = kernel_->calls(unmap_call());
  for (std::size_t i = 0; i < 4; ++i) ASSERT_TRUE(queue_.stage(UnmapRequest::of(at(base + i * step, 1))));
  for (const Completion& c : run_queue()) {
    EXPECT_TRUE(c.ok()) << c.error.message();
    EXPECT_EQ(c.bytes.value, page_bytes());
  }
  EXPECT_EQ(kernel_->calls(unmap_call()) - before, version_1() ? 4U : 1U);
  for (std::size_t i = 0; i < 4; ++i) EXPECT_TRUE(cannot_read(*witness_, Iova{base + i * step}, memory.page(i)));
}

TEST_P(EngineContract, a_failing_part_of_a_merged_unmap_fails_alone_and_stays_out_of_use) {
  failing_.emplace(*kernel_);
  open_engine(LayoutPolicy::fixed, *failing_);
  if (HasFatalFailure()) return;
  const Memory memory{3};
  for (std::size_t i = 0; i < 3; ++i) ASSERT_TRUE(queue_.stage(request(base + i * page_bytes(), memory.page(i))));
  for (const Completion& c : run_queue()) ASSERT_TRUE(c.ok()) << c.error.message();
  // The merged call, then (version 1 has none: its first mapping) the retry of the second mapping.
  if (stage1()) {
    // The invalidation of all three with its repetitions, then the one that the first retry owes.
    failing_->add({.request = unmap_call(), .nth = 1, .times = 8, .os_errno = EBUSY, .after_call = false});
  } else if (version_1()) {
    failing_->add({.request = unmap_call(), .nth = 2, .times = 2, .os_errno = EBUSY, .after_call = false});
  } else {
    failing_->add({.request = unmap_call(), .nth = 1, .times = 1, .os_errno = EBUSY, .after_call = false});
    failing_->add({.request = unmap_call(), .nth = 3, .times = 1, .os_errno = EBUSY, .after_call = false});
  }
  for (std::size_t i = 0; i < 3; ++i) ASSERT_TRUE(queue_.stage(UnmapRequest::of(at(base + i * page_bytes(), 1))));
  const auto done = run_queue();
  failing_->clear();
  ASSERT_EQ(done.size(), 3U);
  const auto stats = address_space_.stats();
  EXPECT_EQ(stats.quarantined_mappings, 1U);
  for (std::size_t i = 0; i < 3; ++i) {
    const Iova iova{base + i * page_bytes()};
    if (done[i].ok()) {
      EXPECT_TRUE(cannot_read(*witness_, iova, memory.page(i)));
      EXPECT_TRUE(address_space_.map(request(iova.value, memory.page(i))).ok());
    } else {
      // First-stage entries are cleared by then, and whether the device still knows them is its affair.
      EXPECT_TRUE(stage1() || reads(*witness_, iova, memory.page(i))) << "the kernel kept it, and so must we";
      EXPECT_EQ(address_space_.map(request(iova.value, memory.page(i))).error.code, Errc::quarantined);
    }
  }
  EXPECT_TRUE(address_space_.unmap_all());
  EXPECT_EQ(address_space_.stats().quarantined_mappings, 0U);
}

TEST_P(EngineContract, a_map_that_its_unmap_overtook_costs_no_kernel_call) {
  const Memory memory{1};
  const std::uint64_t before = kernel_->calls();
  ASSERT_TRUE(queue_.stage(request(base, memory.page(0))));
  ASSERT_TRUE(queue_.stage(UnmapRequest::of(at(base, 1))));
  for (const Completion& c : run_queue()) EXPECT_TRUE(c.ok()) << c.error.message();
  EXPECT_EQ(kernel_->calls(), before);
  EXPECT_TRUE(cannot_read(*witness_, Iova{base}, memory.page(0)));
}

TEST_P(EngineContract, a_scatter_list_is_contiguous_for_the_device) {
  const Memory memory{4};
  const std::array pieces{MemoryPiece::of(memory.page(3)), MemoryPiece::of(memory.page(0)),
                          MemoryPiece::of(memory.page(1))};
  MapRequest map = request(base, memory.page(0));
  map.pieces = pieces;
  const Completion done = address_space_.map(map);
  ASSERT_TRUE(done.ok()) << done.error.message();
  EXPECT_EQ(done.bytes.value, 3 * page_bytes());
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(3)));
  EXPECT_TRUE(reads(*witness_, Iova{base + page_bytes()}, memory.page(0)));
  EXPECT_TRUE(reads(*witness_, Iova{base + 2 * page_bytes()}, memory.page(1)));
  const Completion gone = address_space_.unmap(UnmapRequest::of(done.mapping));
  ASSERT_TRUE(gone.ok()) << gone.error.message();
  EXPECT_EQ(gone.bytes.value, 3 * page_bytes());
  EXPECT_TRUE(cannot_read(*witness_, Iova{base + page_bytes()}, memory.page(0)));
}

TEST_P(EngineContract, registered_memory_is_mapped_piece_by_piece) {
  const Memory memory{8};
  auto registered = address_space_.register_memory({memory.data(), memory.length(), -1, 0});
  ASSERT_TRUE(registered) << registered.error().message();
  for (const std::size_t i : {6U, 1U}) {
    MapRequest map = request(base + i * page_bytes(), memory.page(i));
    map.memory = registered->piece(Bytes{i * page_bytes()}, Bytes{page_bytes()});
    ASSERT_TRUE(queue_.stage(map));
  }
  for (const Completion& c : run_queue()) ASSERT_TRUE(c.ok()) << c.error.message();
  *registered = iovane::Memory{};  // stays registered for as long as it is mapped
  for (const std::size_t i : {6U, 1U}) EXPECT_TRUE(reads(*witness_, Iova{base + i * page_bytes()}, memory.page(i)));
  EXPECT_TRUE(address_space_.unmap(UnmapRequest::of(at(base, 8))).ok());
  for (const std::size_t i : {6U, 1U})
    EXPECT_TRUE(cannot_read(*witness_, Iova{base + i * page_bytes()}, memory.page(i)));
}

TEST_P(EngineContract, replace_leads_the_device_to_the_new_memory) {
  const Memory memory{2};
  ASSERT_TRUE(address_space_.map(request(base, memory.page(0))).ok());
  const Completion done =
      address_space_.replace({at(base, 1), MemoryPiece::of(memory.page(1)), Access::read_write, 0, Order::free});
  ASSERT_TRUE(done.ok()) << done.error.message();
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(1)));
}

TEST_P(EngineContract, a_lease_ends_with_its_scope) {
  const Memory memory{1};
  {
    auto lease = address_space_.map_lease(request(base, memory.page(0)));
    ASSERT_TRUE(lease) << lease.error().message();
    EXPECT_TRUE(reads(*witness_, lease->iova(), memory.page(0)));
  }
  EXPECT_TRUE(cannot_read(*witness_, Iova{base}, memory.page(0)));
}

TEST_P(EngineContract, destroying_the_address_space_gives_everything_back) {
  const Memory memory{4};
  for (std::size_t i = 0; i < 4; ++i) ASSERT_TRUE(queue_.stage(request(base + i * page_bytes(), memory.page(i))));
  for (const Completion& c : run_queue()) ASSERT_TRUE(c.ok()) << c.error.message();
  witness_.reset();
  address_space_ = AddressSpace{};
  EXPECT_EQ(machine_->kernel().memlock().pinned, pinned_before_);
  EXPECT_EQ(machine_->kernel().memlock().locked, locked_before_);
  ASSERT_TRUE(queue_.stage(request(base, memory.page(0))));
  EXPECT_EQ(run_queue().at(0).error.code, Errc::closed);
}

IOVANE_CONFORMANCE(EngineContract);

}  // namespace
}  // namespace iovane::test
