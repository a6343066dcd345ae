// sPAPR's backend where a kernel has to answer in a way of its own, its books, and the model's exact answers.
#include <gtest/gtest.h>

#include <cerrno>
#include <map>
#include <random>
#include <vector>

#include "backends/kernel_decorators.hpp"
#include "backends/open.hpp"
#include "backends/spapr_tce/registered_memory.hpp"
#include "backends/spapr_tce/tce_book.hpp"
#include "engine/register_provider.hpp"
#include "model_support.hpp"
#include "support/seed.hpp"

namespace iovane::backends {
namespace {

using model::TestMemory;
using model::vfio_api::SpaprRegisterMemory;
using model::vfio_api::Type1DmaMap;
using model::vfio_api::Type1DmaUnmap;

model::ModelOptions power_host() {
  model::ModelOptions options;
  options.iommufd = false;
  options.spapr = model::SpaprOptions{};
  options.spapr->level_entries_max = 1U << 16;
  for (model::DeviceOptions& device : options.devices) device.reserved.clear();
  return options;
}

/// A kernel whose nth map fails as the real one does: what the call had entered is gone.
class ClearingKernel final : public KernelDecorator {
 public:
  using KernelDecorator::KernelDecorator;
  int fail_map = 0;  ///< counts down; 1 fails the next one
  int fail_until = 0;
  std::uint64_t unmaps = 0;

  long ioctl(int fd, unsigned long request, void* argument) noexcept override {
    if (request == Type1DmaMap::request && fail_map > 0 && --fail_map == 0) {
      const auto& map = *static_cast<const Type1DmaMap*>(argument);
      Type1DmaUnmap unmap{.iova = map.iova, .size = map.size};
      inner().ioctl(fd, Type1DmaUnmap::request, &unmap);
      if (fail_until > 0) {
        --fail_until;
        fail_map = 1;
      }
      return -EFAULT;
    }
    if (request == Type1DmaUnmap::request) ++unmaps;
    return inner().ioctl(fd, request, argument);
  }
};

class SpaprBackend : public testing::Test {
 protected:
  void SetUp() override {
    host_ = model::make_host(power_host());
    ASSERT_NE(host_, nullptr);
    kernel_ = std::make_unique<ClearingKernel>(*host_);
    auto backend = open_backend(*kernel_, {.name = "spapr", .descriptor = {}});
    ASSERT_TRUE(backend) << backend.error().message();
    backend_ = *std::move(backend);
    auto space = backend_->create_space({});
    ASSERT_TRUE(space);
    space_ = *std::move(space);
    ASSERT_TRUE(space_->attach({.pci_address = host_->device(0).address()}));
  }
  BackendOpResult run(const BackendOp& op) {
    BackendOpResult result;
    space_->execute({&op, 1}, {&result, 1});
    return result;
  }
  static IovaRange at(std::uint64_t iova, std::uint64_t pages) {
    return *IovaRange::from_length(Iova{iova}, Bytes{pages * 4096});
  }
  BackendOpResult map(IovaRange range, std::uint64_t memory, OpKind kind = OpKind::map) {
    return run({.kind = kind, .access = Access::read_write, .region = {}, .range = range, .memory = memory});
  }
  BackendOpResult unmap(IovaRange range) { return run({.kind = OpKind::unmap, .range = range}); }
  std::byte read(std::uint64_t iova) {
    std::byte got{0xee};
    host_->device(0).dma_read(Iova{iova}, {&got, 1});
    return got;
  }

  std::unique_ptr<model::ModelKernel> host_;
  std::unique_ptr<ClearingKernel> kernel_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<BackendSpace> space_;
};

TEST_F(SpaprBackend, a_replace_that_fails_half_way_is_taken_back) {
  const TestMemory old_memory{4 * 4096}, new_memory{4 * 4096};
  std::fill_n(old_memory.data(), 4 * 4096, std::byte{1});
  std::fill_n(new_memory.data(), 4 * 4096, std::byte{2});
  // Two maps whose memory does not follow on: restoring takes two calls.
  ASSERT_TRUE(map(at(0x10000, 2), old_memory.address() + 8192).error.ok());
  ASSERT_TRUE(map(at(0x12000, 2), old_memory.address()).error.ok());
  kernel_->fail_map = 1;
  const auto result = map(at(0x10000, 4), new_memory.address(), OpKind::replace);
  EXPECT_EQ(result.error.code, Errc::bad_memory) << result.error.message();
  for (std::uint64_t page = 0; page < 4; ++page) EXPECT_EQ(read(0x10000 + page * 4096), std::byte{1}) << page;
  EXPECT_EQ(unmap(at(0x10000, 4)).bytes, Bytes{4 * 4096});
  EXPECT_EQ(host_->memlock().locked, Bytes{space_->spapr()->windows().front().table.value});
}

TEST_F(SpaprBackend, a_replace_that_cannot_be_taken_back_leaves_nothing_and_says_so) {
  const TestMemory old_memory{2 * 4096}, new_memory{2 * 4096};
  ASSERT_TRUE(map(at(0x10000, 2), old_memory.address()).error.ok());
  kernel_->fail_map = 1;
  kernel_->fail_until = 1;
  const auto result = map(at(0x10000, 2), new_memory.address(), OpKind::replace);
  EXPECT_NE(result.error.detail().find("unmapped now"), std::string::npos) << result.error.detail();
  EXPECT_EQ(unmap(at(0x10000, 2)).bytes, Bytes{});
  EXPECT_EQ(read(0x10000), std::byte{0xee});
  EXPECT_TRUE(map(at(0x10000, 2), old_memory.address()).error.ok());
}

TEST_F(SpaprBackend, positive_answers_are_failures) {
  class Positive final : public KernelDecorator {
   public:
    using KernelDecorator::KernelDecorator;
    unsigned long which = 0;
    long ioctl(int fd, unsigned long request, void* argument) noexcept override {
      return request == which ? 256 : inner().ioctl(fd, request, argument);
    }
  } positive{*host_};
  space_.reset();
  auto backend = open_backend(positive, {.name = "spapr", .descriptor = {}});
  ASSERT_TRUE(backend);
  auto space = (*backend)->create_space({});
  ASSERT_TRUE(space);
  ASSERT_TRUE((*space)->attach({.pci_address = host_->device(0).address()}));
  space_ = *std::move(space);
  const TestMemory memory{4096};
  positive.which = SpaprRegisterMemory::request;
  EXPECT_EQ(space_->register_memory({.address = memory.data(), .length = Bytes{4096}}).error().code, Errc::bad_memory);
  positive.which = Type1DmaMap::request;
  EXPECT_EQ(map(at(0x10000, 1), memory.address()).error.code, Errc::io_error);
  positive.which = 0;
  EXPECT_TRUE(map(at(0x10000, 1), memory.address()).error.ok()) << "the failed map left its TCE in the book";
  positive.which = Type1DmaUnmap::request;
  EXPECT_EQ(unmap(at(0x10000, 1)).error.code, Errc::io_error);
  positive.which = 0;
  EXPECT_EQ(unmap(at(0x10000, 1)).bytes, Bytes{4096});
  space_.reset();
}

TEST_F(SpaprBackend, levels_are_tried_until_one_fits) {
  // 2^17 entries need two levels of the host's 2^16.
  const auto window = space_->spapr()->create_window({.length = Bytes{std::uint64_t{1} << 29}, .page = Bytes{4096}});
  ASSERT_TRUE(window) << window.error().message();
  EXPECT_EQ(window->levels, 2U);
  const TestMemory memory{4096};
  const IovaRange last = at(window->range.last.value - 4095, 1);
  ASSERT_TRUE(map(last, memory.address()).error.ok());
  EXPECT_EQ(space_->unmap_all().value_or(Bytes{}), Bytes{4096});
}

TEST_F(SpaprBackend, what_kvm_owns_is_forgotten_and_stays_in_hardware) {
  const TestMemory memory{4 * 4096};
  std::fill_n(memory.data(), 4 * 4096, std::byte{7});
  const auto region = space_->register_memory({.address = memory.data(), .length = Bytes{4 * 4096}});
  ASSERT_TRUE(region);
  ASSERT_TRUE(map(at(0x10000, 4), memory.address()).error.ok());
  EXPECT_EQ(space_->spapr()->hand_to_kernel(at(0x11000, 2)), Bytes{2 * 4096});
  EXPECT_EQ(read(0x11000), std::byte{7});
  EXPECT_EQ(unmap(at(0x10000, 4)).bytes, Bytes{2 * 4096});
  EXPECT_TRUE(map(at(0x11000, 2), memory.address()).error.ok()) << "the same entries again";
  EXPECT_EQ(space_->spapr()->clear_handed(at(0x10000, 4)).error().code, Errc::busy) << "those are ours";
  EXPECT_EQ(space_->spapr()->hand_to_kernel(at(0x11000, 2)), Bytes{2 * 4096});
  EXPECT_TRUE(space_->spapr()->clear_handed(at(0x10000, 4)));
  EXPECT_NE(read(0x11000), std::byte{7});
  EXPECT_TRUE(space_->unmap_all());
}

TEST_F(SpaprBackend, registrations_pin_for_a_provider) {
  engine::RegisterProvider provider{*space_};
  ASSERT_TRUE(provider.pins());
  const TestMemory memory{16 * 4096};
  const std::uint64_t before = host_->memlock().locked.value;
  const auto range = [&](std::uint64_t first, std::uint64_t pages) {
    return *pinning::MemoryRange::from_length(memory.address() + first * 4096, Bytes{pages * 4096});
  };
  const pinning::PinRequest requests[] = {{.range = range(0, 8)}, {.range = range(4, 8)}};
  pinning::PinOutcome outcomes[2];
  provider.pin(requests, outcomes);
  ASSERT_TRUE(outcomes[0].error.ok() && outcomes[1].error.ok());
  EXPECT_EQ(host_->memlock().locked.value - before, 12U * 4096) << "the common part is pinned once";
  ASSERT_TRUE(run({.kind = OpKind::map,
                   .access = Access::read_write,
                   .region = engine::RegisterProvider::region_of(outcomes[1].handle),
                   .range = at(0x10000, 8),
                   .memory = 0})
                  .error.ok());
  Error gone[2];
  const pinning::UnpinRequest undo[] = {{.range = requests[0].range, .handle = outcomes[0].handle},
                                        {.range = requests[1].range, .handle = outcomes[1].handle}};
  provider.unpin(undo, gone);
  EXPECT_TRUE(gone[0].ok() && gone[1].ok());
  EXPECT_EQ(host_->memlock().locked.value - before, 12U * 4096) << "pieces that a TCE leads into stay, whole";
  EXPECT_EQ(unmap(at(0x10000, 8)).bytes, Bytes{8 * 4096});
  EXPECT_EQ(host_->memlock().locked.value, before);
}

// Registrations go by address, and lead to the pages that were there when they were made.
TEST_F(SpaprBackend, memory_that_changed_is_refused_until_the_old_pages_are_let_go) {
  const TestMemory memory{8 * 4096};
  const auto exchange = [&](std::uint64_t page) {
    host_->pages_leave(memory.data() + page * 4096, 4096);
    space_->memory_changed(memory.address() + page * 4096, memory.address() + page * 4096 + 4095);
  };
  memory.data()[0] = std::byte{1};
  memory.data()[4 * 4096] = std::byte{4};
  ASSERT_TRUE(map(at(0x10000, 2), memory.address()).error.ok());
  ASSERT_TRUE(map(at(0x20000, 2), memory.address() + 4 * 4096).error.ok());
  exchange(0);
  memory.data()[0] = std::byte{2};
  EXPECT_EQ(read(0x10000), std::byte{1}) << "what was mapped stays";
  const auto refused = map(at(0x30000, 1), memory.address());
  EXPECT_EQ(refused.error.code, Errc::busy) << refused.error.message();
  EXPECT_NE(refused.error.detail().find("old pages"), std::string::npos);
  EXPECT_EQ(space_->register_memory({.address = memory.data(), .length = Bytes{8 * 4096}}).error().code, Errc::busy);
  EXPECT_TRUE(map(at(0x30000, 1), memory.address() + 5 * 4096).error.ok()) << "another registration, not concerned";
  EXPECT_EQ(unmap(at(0x30000, 1)).bytes, Bytes{4096});
  // Another container finds the same registration in the kernel's list.
  const auto other = backend_->create_space({});
  ASSERT_TRUE(other);
  ASSERT_TRUE((*other)->attach({.pci_address = host_->device(1).address()}));
  EXPECT_EQ((*other)->register_memory({.address = memory.data(), .length = Bytes{4096}}).error().code, Errc::busy);
  // The last TCE takes the old pages along.
  EXPECT_EQ(unmap(at(0x10000, 1)).bytes, Bytes{4096});
  EXPECT_EQ(map(at(0x30000, 1), memory.address()).error.code, Errc::busy) << "its second page is still mapped";
  EXPECT_EQ(unmap(at(0x10000, 2)).bytes, Bytes{4096});
  ASSERT_TRUE(map(at(0x30000, 1), memory.address()).error.ok());
  EXPECT_EQ(read(0x30000), std::byte{2});
  EXPECT_EQ(read(0x20000), std::byte{4});
  EXPECT_TRUE(space_->unmap_all());
}

TEST_F(SpaprBackend, more_changes_than_are_remembered_are_counted_wider_and_none_is_lost) {
  constexpr std::uint64_t pages = 400;
  const TestMemory memory{pages * 4096};
  for (std::uint64_t page = 0; page < pages; page += 2)
    ASSERT_TRUE(map(at(0x10'0000 + page * 4096, 1), memory.address() + page * 4096).error.ok());
  for (std::uint64_t page = 0; page < pages; page += 4)
    space_->memory_changed(memory.address() + page * 4096, memory.address() + page * 4096 + 4095);
  for (std::uint64_t page = 0; page < pages; page += 4)
    EXPECT_EQ(map(at(0x80'0000, 1), memory.address() + page * 4096).error.code, Errc::busy) << page;
  EXPECT_TRUE(space_->unmap_all());
  for (std::uint64_t page = 0; page < pages; ++page)
    EXPECT_TRUE(map(at(0x80'0000 + page * 4096, 1), memory.address() + page * 4096).error.ok()) << page;
  EXPECT_TRUE(space_->unmap_all());
}

/// Random maps, cuts, replaces and registrations against a map of pages; the device sees what the map says.
TEST_F(SpaprBackend, a_long_random_life_agrees_with_a_map_of_pages) {
  std::mt19937_64 random{test::seed()};
  const TestMemory memory{64 * 4096};
  for (std::size_t page = 0; page < 64; ++page) memory.data()[page * 4096] = static_cast<std::byte>(page + 1);
  std::map<std::uint64_t, std::uint64_t> expected;  // TCE -> page of memory
  std::vector<RegionId> regions;
  const auto pick = [&](std::uint64_t n) { return random() % n; };
  for (int step = 0; step < 4000; ++step) {
    const std::uint64_t first = pick(56), count = 1 + pick(8), page = pick(56);
    const IovaRange range = at(0x10'0000 + first * 4096, count);
    const auto overlap = expected.lower_bound(first);
    switch (pick(5)) {
      case 0:
      case 1: {
        const bool busy = overlap != expected.end() && overlap->first < first + count;
        const auto result = map(range, memory.address() + page * 4096);
        ASSERT_EQ(result.error.code, busy ? Errc::iova_busy : Errc::ok) << result.error.message();
        for (std::uint64_t i = 0; !busy && i < count; ++i) expected[first + i] = page + i;
        break;
      }
      case 2: {
        const auto stop = expected.lower_bound(first + count);
        const auto size = static_cast<std::uint64_t>(std::distance(overlap, stop));
        ASSERT_EQ(unmap(range).bytes, Bytes{size * 4096});
        expected.erase(overlap, stop);
        break;
      }
      case 3: {
        bool whole = true;
        for (std::uint64_t i = 0; i < count; ++i) whole = whole && expected.contains(first + i);
        const auto result = map(range, memory.address() + page * 4096, OpKind::replace);
        ASSERT_EQ(result.error.code, whole ? Errc::ok : Errc::not_found) << result.error.message();
        for (std::uint64_t i = 0; whole && i < count; ++i) expected[first + i] = page + i;
        break;
      }
      default:
        if (regions.size() < 5) {
          const auto made =
              space_->register_memory({.address = memory.data() + page * 4096, .length = Bytes{count * 4096}});
          ASSERT_TRUE(made) << made.error().message();
          regions.push_back(*made);
        } else {
          ASSERT_TRUE(space_->unregister_memory(regions.back()));
          regions.pop_back();
        }
    }
    const std::uint64_t probe = pick(64);
    const auto there = expected.find(probe);
    ASSERT_EQ(read(0x10'0000 + probe * 4096),
              there == expected.end() ? std::byte{0xee} : static_cast<std::byte>(there->second + 1));
  }
  ASSERT_TRUE(space_->unmap_all());
  for (const RegionId region : regions) ASSERT_TRUE(space_->unregister_memory(region));
  EXPECT_EQ(host_->memlock().locked, space_->spapr()->windows().front().table);
}

TEST_F(SpaprBackend, says_how_wide_a_hole_one_call_walks) {
  const Bytes widest = space_->facts().unmap_hole_max;
  const TestMemory memory{4096};
  for (const std::uint64_t hole : {widest.value, widest.value + 4096}) {
    const IovaRange low = at(0x10'0000, 1), high = at(0x10'1000 + hole, 1);
    ASSERT_TRUE(map(low, memory.address()).error.ok());
    ASSERT_TRUE(map(high, memory.address()).error.ok());
    const std::uint64_t before = kernel_->unmaps;
    ASSERT_EQ(unmap({low.start, high.last}).bytes, Bytes{2 * 4096});
    EXPECT_EQ(kernel_->unmaps - before, hole == widest.value ? 1U : 2U);
  }
}

TEST(TceBookTest, stretches_bridge_small_holes_only) {
  auto made = spapr::TceBook::make({.range = *IovaRange::from_length(Iova{1ULL << 59}, Bytes{1ULL << 30})});
  ASSERT_TRUE(made);
  spapr::TceBook book = *std::move(made);
  const spapr::TceRun all{0, (1U << 18) - 1};
  EXPECT_FALSE(book.first_live(all).has_value());
  book.fill({10, 12}, 0x7000'0000'0000, 5, Access::write);
  book.fill({20, 20}, 0x1000, spapr::registrations_max - 1, Access::read);
  book.fill({5000, 5001}, 0x4000, 0, Access::read_write);
  EXPECT_EQ(book.at(11).address(), 0x7000'0000'1000U);
  EXPECT_EQ(book.at(11).registration(), 5U);
  EXPECT_EQ(book.at(20).registration(), spapr::registrations_max - 1);
  EXPECT_EQ(book.at(20).access(), Access::read);
  const auto first = book.next_stretch(all, 16);
  ASSERT_TRUE(first);
  EXPECT_EQ(first->first, 10U);
  EXPECT_EQ(first->last, 20U);
  const auto second = book.next_stretch({21, all.last}, 16);
  ASSERT_TRUE(second);
  EXPECT_EQ(second->first, 5000U);
  EXPECT_EQ(second->last, 5001U);
  EXPECT_EQ(book.range_of(*second).start, Iova{(1ULL << 59) + 5000 * 4096});
}

/// The ioctls themselves, as they were seen on Linux 6.12 and 7.2.
TEST(SpaprModel, answers_as_linux_does) {
  namespace vf = model::vfio_api;
  const auto host = model::make_host(power_host());
  const int container = host->open("/dev/vfio/vfio", 0);
  const int group = host->open("/dev/vfio/0", 0);
  ASSERT_GE(group, 0);
  int fd = container;
  const TestMemory memory{16 * 4096};
  const auto map = [&](std::uint64_t address, std::uint64_t iova, std::uint64_t size, std::uint32_t flags = 3) {
    vf::Type1DmaMap c{.flags = flags, .vaddr = address, .iova = iova, .size = size};
    return host->ioctl(container, vf::Type1DmaMap::request, &c);
  };
  const auto unmap = [&](std::uint64_t iova, std::uint64_t size, std::uint32_t flags = 0) {
    vf::Type1DmaUnmap c{.flags = flags, .iova = iova, .size = size};
    return host->ioctl(container, vf::Type1DmaUnmap::request, &c);
  };
  const auto reg = [&](std::uint64_t address, std::uint64_t size) {
    vf::SpaprRegisterMemory c{.vaddr = address, .size = size};
    return host->ioctl(container, vf::SpaprRegisterMemory::request, &c);
  };
  const auto unreg = [&](std::uint64_t address, std::uint64_t size) {
    vf::SpaprRegisterMemory c{.vaddr = address, .size = size};
    return host->ioctl(container, vf::SpaprRegisterMemory::unregister_request, &c);
  };
  EXPECT_EQ(host->ioctl_value(container, vf::check_extension, vf::type1_v2_iommu), 0);
  EXPECT_EQ(host->ioctl_value(container, vf::set_iommu, vf::spapr_tce_v2_iommu), -EINVAL) << "no group yet";
  ASSERT_EQ(host->ioctl(group, vf::group_set_container, &fd), 0);
  ASSERT_EQ(host->ioctl_value(container, vf::set_iommu, vf::spapr_tce_v2_iommu), 0);
  EXPECT_EQ(unmap(0, 4096), -EPERM) << "enabled by the first REGISTER";
  EXPECT_EQ(reg(memory.address() + 100, 4096), -EINVAL);
  EXPECT_EQ(reg(memory.address(), 8 * 4096), 0);
  EXPECT_EQ(reg(memory.address(), 8 * 4096), -EBUSY);
  EXPECT_EQ(reg(memory.address() + 4096, 4096), -EINVAL) << "overlap";
  EXPECT_EQ(unreg(memory.address(), 4096), -ENOENT);
  EXPECT_EQ(unmap(0, 4096), 0);
  EXPECT_EQ(map(memory.address(), 0, 4096), 0);
  EXPECT_EQ(map(memory.address() + 4096, 0, 4096), 0) << "replaces silently";
  EXPECT_EQ(map(memory.address(), 512, 4096), 1) << "a misaligned IOVA";
  EXPECT_EQ(map(memory.address() + 512, 0, 4096), -EINVAL);
  EXPECT_EQ(map(memory.address(), 0, 4096, 0), -EINVAL);
  EXPECT_EQ(map(memory.address() + 8 * 4096, 4096, 4096), -EINVAL) << "not registered";
  EXPECT_EQ(map(memory.address(), 0x4000'0000, 4096), -ENXIO);
  EXPECT_EQ(map(memory.address(), 0x3fff'f000, 8192), -ENOTRECOVERABLE) << "a real kernel is gone now";
  EXPECT_EQ(unmap(0, 4096, 1), -EINVAL) << "no flags";
  EXPECT_EQ(unmap(0, 16 * 4096), 0) << "holes are fine";
  vf::SpaprTceCreate create{.page_shift = 16, .window_size = 1U << 30, .levels = 1};
  EXPECT_EQ(host->ioctl(container, vf::SpaprTceCreate::request, &create), 0);
  EXPECT_EQ(create.start_addr, std::uint64_t{1} << 59);
  EXPECT_EQ(host->ioctl(container, vf::SpaprTceCreate::request, &create), -ENOSPC);
  vf::SpaprTceRemove remove{.start_addr = create.start_addr + 0x10000};
  EXPECT_EQ(host->ioctl(container, vf::SpaprTceRemove::request, &remove), -EINVAL);
  EXPECT_EQ(map(memory.address(), 0, 4096), 0);
  EXPECT_EQ(unreg(memory.address(), 8 * 4096), 0) << "with a live TCE: the memory stays pinned for good";
  EXPECT_EQ(unmap(0, 4096), 0);
  EXPECT_EQ(host->usage().charged_process.value % (1 << 20), 0x4'0000U + 8U * 4096)
      << "the second window's table, and it";
  host->close(group);
  host->close(container);
}

}  // namespace
}  // namespace iovane::backends
