// Live migration through the shadow: a guest maps, cuts and maps again while a device writes, and what the target says
// was written brings a copy of guest memory up to date. On the software IOMMU as iommufd and as type1 imitate it.
#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <map>
#include <set>

#include "backends/model/model_kernel.hpp"
#include "backends/open.hpp"
#include "engine/engine_core.hpp"
#include "guest_ram.hpp"
#include "iovane/engine.hpp"
#include "viommu/backend_target.hpp"
#include "viommu/engine_target.hpp"
#include "viommu/shadow_domain.hpp"

namespace iovane::viommu {
namespace {

using backends::model::ModelKernel;
using backends::model::ModelOptions;

constexpr std::uint64_t page = 4096;
constexpr std::uint64_t ram_start = 0x10'0000;  // so that an address is not an offset
constexpr std::uint64_t ram_pages = 256;
constexpr std::uint64_t iova_pages = 128;

struct Setup {
  const char* name;
  const char* interface;
  bool register_memory;
  bool large_entries;      // a mark stands for a whole one: too many, never too few
  std::uint32_t runs_max;  // few: the engine's log of gone mappings spills
  bool engine = true;      // false: right on the backend
};

struct DirtyTest : ::testing::TestWithParam<Setup> {
  GuestRam ram{ram_pages * page, ram_start};
  GuestMemory memory;
  std::unique_ptr<ModelKernel> kernel;
  Engine engine;
  AddressSpace space;
  std::unique_ptr<backends::Backend> backend;
  std::unique_ptr<backends::BackendSpace> backend_space;
  std::unique_ptr<ShadowTarget> target;
  RegionId region;

  void SetUp() override {
    kernel = *ModelKernel::create(ModelOptions{});
    const auto added = memory.add(ram.config());
    ASSERT_TRUE(added);
    region = *added;
    auto opened = backends::open_backend(*kernel, {.name = GetParam().interface, .descriptor = {}});
    ASSERT_TRUE(opened) << opened.error().message();
    if (GetParam().engine) {
      open_engine_target(*std::move(opened));
    } else {
      backend = *std::move(opened);
      open_backend_target();
    }
  }
  void open_engine_target(std::unique_ptr<backends::Backend> under) {
    engine = EngineAccess::open(std::move(under), "model");
    AddressSpaceConfig config;
    config.layout = LayoutPolicy::fixed;
    config.large_iopte = GetParam().large_entries;
    config.dirty_tracking = true;
    config.dirty_runs_max = GetParam().runs_max;
    auto made = engine.create_address_space(config);
    ASSERT_TRUE(made) << made.error().message();
    space = *std::move(made);
    const auto device = space.attach({.pci_address = kernel->device(0).address()});
    ASSERT_TRUE(device) << device.error().message();
    EngineTargetConfig with;
    with.register_memory = GetParam().register_memory;
    auto opened = EngineTarget::create(space, memory, with);
    ASSERT_TRUE(opened) << opened.error().message();
    target = *std::move(opened);
  }
  void open_backend_target() {
    backends::SpaceOptions options;
    options.large_iopte = GetParam().large_entries;
    options.dirty_tracking = true;
    auto made = backend->create_space(options);
    ASSERT_TRUE(made) << made.error().message();
    backend_space = *std::move(made);
    const auto device = backend_space->attach({.pci_address = kernel->device(0).address()});
    ASSERT_TRUE(device) << device.error().message();
    target = std::make_unique<BackendTarget>("backend", *backend_space, BackendTarget::Dirty::tracked);
    ASSERT_TRUE(target->add_region(memory.regions().front()));
  }
  void TearDown() override { target.reset(); }
  bool exact() const {
    if (!GetParam().engine) return GetParam().interface == std::string{"iommufd"};
    return space.facts().dirty_is_exact && !GetParam().large_entries && GetParam().runs_max > 1000;
  }
};

TEST_P(DirtyTest, ACopyOfGuestMemoryStaysCompleteWhileTheGuestKeepsMapping) {
  std::mt19937_64 random{test_seed()};
  ShadowDomain domain{{}};
  const auto view = memory.view();
  ASSERT_TRUE(domain.attach(view, *target));
  ASSERT_TRUE(target->track_dirty(true));
  std::vector<std::byte> copy(ram_pages * page);  // guest memory is zero at first, too
  std::set<std::uint64_t> written;                // pages of guest memory, since the last look
  const auto look = [&] {
    std::set<std::uint64_t> told;
    const auto taken = target->take_dirty([&](const DirtyMemory& d) {
      ASSERT_EQ(d.region, region);
      ASSERT_LE(d.offset + d.length.value, copy.size());
      std::memcpy(copy.data() + d.offset, ram.at(ram_start + d.offset), d.length.value);
      for (std::uint64_t at = d.offset; at < d.offset + d.length.value; at += page) told.insert(at / page);
    });
    ASSERT_TRUE(taken) << taken.error().message();
    EXPECT_TRUE(std::includes(told.begin(), told.end(), written.begin(), written.end()));
    if (exact()) {
      EXPECT_EQ(told, written);
    }
    EXPECT_EQ(std::memcmp(copy.data(), ram.at(ram_start), copy.size()), 0);
    written.clear();
  };
  for (int step = 0; step < 3000 && !HasFailure(); ++step) {
    const std::uint64_t first = random() % iova_pages;
    const std::uint64_t count = 1 + random() % std::min<std::uint64_t>(16, iova_pages - first);
    const IovaRange range{Iova{first * page}, Iova{(first + count) * page - 1}};
    switch (random() % 8) {
      case 0:
      case 1: {
        const std::uint64_t to = random() % (ram_pages - count);
        const Access access = random() % 8 == 0 ? Access::read : Access::read_write;
        ASSERT_TRUE(domain.assign(view, range, ram_start + to * page, access));
        domain.commit_and_wait();
        break;
      }
      case 2:
        ASSERT_TRUE(domain.unmap(view, range, CutRule::cut));
        domain.commit_and_wait();
        break;
      default: {
        const std::uint64_t iova = first * page + random() % page;
        const std::byte value{static_cast<unsigned char>(random())};
        const auto meant = domain.translate(iova);
        const auto done = kernel->device(0).dma_write(Iova{iova}, {&value, 1});
        ASSERT_EQ(done.ok(), meant && may_write(meant->second)) << "at " << iova;
        if (done.ok()) written.insert((meant->first - ram_start) / page);
      }
    }
    ASSERT_TRUE(domain.failures().empty());
    if (step % 101 == 100) look();
  }
  domain.commit_and_wait();
  ASSERT_TRUE(domain.detach(*target));  // what is gone now was written all the same
  look();
  ASSERT_TRUE(target->track_dirty(false));
  EXPECT_EQ(target->take_dirty([](const DirtyMemory&) {}).error().code, Errc::invalid_argument);
}

TEST_P(DirtyTest, NamesNothingOfARegionThatIsGone) {
  ShadowDomain domain{{}};
  {
    const auto view = memory.view();
    ASSERT_TRUE(domain.attach(view, *target));
    ASSERT_TRUE(target->track_dirty(true));
    ASSERT_TRUE(domain.map(view, {Iova{0}, Iova{page - 1}}, ram_start, Access::read_write));
    domain.commit_and_wait();
    const std::byte value{1};
    ASSERT_TRUE(kernel->device(0).dma_write(Iova{0}, {&value, 1}).ok());
    const auto gone = *view.find(ram_start);
    ASSERT_TRUE(domain.withdraw_region(gone));
    domain.commit_and_wait();
  }
  target->remove_region(region);
  int visits = 0;
  ASSERT_TRUE(target->take_dirty([&](const DirtyMemory&) { ++visits; }));
  EXPECT_EQ(visits, 0);
  ASSERT_TRUE(domain.detach(*target));
}

INSTANTIATE_TEST_SUITE_P(Hosts, DirtyTest,
                         ::testing::Values(Setup{"iommufd", "iommufd", true, false, 4096},
                                           Setup{"iommufd_addresses", "iommufd", false, false, 4096},
                                           Setup{"iommufd_large_entries", "iommufd", true, true, 4096},
                                           Setup{"iommufd_short_log", "iommufd", true, false, 8},
                                           Setup{"type1", "type1", true, false, 4096},
                                           Setup{"backend_iommufd", "iommufd", true, false, 4096, false},
                                           Setup{"backend_type1", "type1", true, false, 4096, false}),
                         [](const auto& p) { return std::string{p.param.name}; });

// What does not fit into the log is not lost: its whole region counts.
struct BackendDirtyLogTest : DirtyTest {};

TEST_P(BackendDirtyLogTest, WhenFullSaysTooMuchAndNeverTooLittle) {
  target.reset();
  BackendDirtyLog log{Bytes{page}, 3};
  ASSERT_TRUE(backend_space->start_dirty_tracking(log));
  const auto here = memory.regions();
  for (std::uint64_t i = 0; i < 8; ++i) {
    const IovaRange at{Iova{i * page}, Iova{i * page + page - 1}};
    log.mapped(at, region, 2 * i * page);
    log.take(at, std::array<std::uint64_t, 1>{1});
    log.unmapped(at);
    std::set<std::uint64_t> told;
    if (i % 4 != 2 && i % 4 != 3) continue;
    ASSERT_TRUE(log.take(*backend_space, here, [&](const DirtyMemory& d) {
      for (std::uint64_t done = 0; done < d.length.value; done += page) told.insert((d.offset + done) / page);
    }));
    if (i % 4 == 2) {
      EXPECT_EQ(told, (std::set<std::uint64_t>{2 * i - 4, 2 * i - 2, 2 * i}));
      for (std::uint64_t more = 20; more < 24; ++more) {
        const IovaRange also{Iova{more * page}, Iova{more * page + page - 1}};
        log.mapped(also, region, more * page);
        log.take_all(also);
        log.unmapped(also);
      }
    } else {
      EXPECT_EQ(told.size(), ram_pages);
    }
  }
  log.mapped({Iova{0}, Iova{4 * page - 1}}, region, 0);
  log.unmapped({Iova{page}, Iova{2 * page - 1}});  // a kernel that cuts
  EXPECT_EQ(log.mapped_run(IovaRange::everything()), (IovaRange{Iova{0}, Iova{page - 1}}));
  log.take_all({Iova{0}, Iova{4 * page - 1}});
  log.forget(region);
  ASSERT_TRUE(log.take(*backend_space, here, [](const DirtyMemory&) { ADD_FAILURE() << "forgotten"; }));
  ASSERT_TRUE(backend_space->stop_dirty_tracking());
}

INSTANTIATE_TEST_SUITE_P(Hosts, BackendDirtyLogTest,
                         ::testing::Values(Setup{"iommufd", "iommufd", true, false, 4096, false}),
                         [](const auto& p) { return std::string{p.param.name}; });

TEST(Dirty, AnAddressSpaceThatWasNotMadeForItSaysSo) {
  EngineConfig config;
  config.backend = "model";
  Engine engine = *Engine::open(config);
  AddressSpaceConfig fixed;
  fixed.layout = LayoutPolicy::fixed;
  AddressSpace space = *engine.create_address_space(fixed);
  GuestMemory memory;
  auto target = EngineTarget::create(space, memory, {});
  ASSERT_TRUE(target);
  EXPECT_EQ((*target)->track_dirty(true).error().code, Errc::unsupported);
  EXPECT_FALSE((*target)->take_dirty([](const DirtyMemory&) {}));
}

TEST(Dirty, ABackendTargetThatWasNotMadeForItSaysSo) {
  const auto kernel = *ModelKernel::create(ModelOptions{});
  const auto backend = *backends::open_backend(*kernel, {.name = "type1", .descriptor = {}});
  const auto space = *backend->create_space({});
  BackendTarget target{"backend", *space};
  EXPECT_EQ(target.track_dirty(true).error().code, Errc::unsupported);
  EXPECT_EQ(target.take_dirty([](const DirtyMemory&) {}).error().code, Errc::unsupported);
  BackendTarget tracked{"tracked", *space, BackendTarget::Dirty::tracked};
  EXPECT_FALSE(tracked.track_dirty(true)) << "the space was not made for it";
  EXPECT_EQ(tracked.take_dirty([](const DirtyMemory&) {}).error().code, Errc::invalid_argument);
}

}  // namespace
}  // namespace iovane::viommu
