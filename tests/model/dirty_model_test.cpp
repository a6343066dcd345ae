// Dirty pages against a reference: random maps, unmaps, device writes and reads, on the software IOMMU as iommufd and
// as type1 imitate it.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <vector>

#include "backends/model/model_kernel.hpp"
#include "backends/open.hpp"
#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"
#include "support/seed.hpp"

namespace iovane {
namespace {

using backends::model::ModelKernel;
using backends::model::ModelOptions;

constexpr std::uint64_t page = 4096;
constexpr std::uint64_t iova_pages = 512;  // page numbers of the address space under test
constexpr std::uint64_t memory_pages = 96;
constexpr std::uint64_t first_iova = 0x4000'0000;

struct Setup {
  const char* name;
  const char* interface;
  std::size_t iommus;
  std::uint32_t runs_max;
};

class DirtyModel : public ::testing::TestWithParam<Setup> {
 protected:
  void SetUp() override {
    ModelOptions options;
    options.iommus.resize(GetParam().iommus);
    options.devices.resize(2);
    options.devices[1].iommu = GetParam().iommus - 1;
    kernel_ = *ModelKernel::create(options);
    auto backend = backends::open_backend(*kernel_, {.name = GetParam().interface, .descriptor = {}});
    ASSERT_TRUE(backend) << backend.error().message();
    engine_ = EngineAccess::open(*std::move(backend), "model");
    AddressSpaceConfig config;
    config.layout = LayoutPolicy::fixed;
    config.large_iopte = false;  // so that a mark is one page
    config.dirty_tracking = true;
    config.dirty_runs_max = GetParam().runs_max;
    auto space = engine_.create_address_space(config);
    ASSERT_TRUE(space) << space.error().message();
    space_ = *std::move(space);
    for (std::size_t d = 0; d < 2; ++d) {
      const auto device = space_.attach({.pci_address = kernel_->device(d).address()});
      ASSERT_TRUE(device) << device.error().message();
    }
    memory_.resize((memory_pages + 1) * page);
    first_page_ =
        reinterpret_cast<std::byte*>((reinterpret_cast<std::uintptr_t>(memory_.data()) + page - 1) & ~(page - 1));
  }
  bool exact() const { return space_.facts().dirty_is_exact; }
  static IovaRange pages(std::uint64_t first, std::uint64_t count) {
    return *IovaRange::from_length(Iova{first_iova + first * page}, Bytes{count * page});
  }

  // ---- the reference
  struct Live {
    std::uint64_t count;
    std::uint64_t memory;  // page number in memory_
    Access access;
  };
  std::map<std::uint64_t, Live> live_;                           // by first page
  std::set<std::uint64_t> dirty_;                                // live pages
  std::multiset<std::pair<std::uint64_t, std::uint64_t>> kept_;  // (page, memory page) of unmapped ones

  std::map<std::uint64_t, Live>::iterator covering(std::uint64_t p) {
    auto at = live_.upper_bound(p);
    if (at == live_.begin()) return live_.end();
    --at;
    return p < at->first + at->second.count ? at : live_.end();
  }

  void map(test::Random& random) {
    const std::uint64_t count = 1 + random.below(12);
    const std::uint64_t first = random.below(iova_pages - count);
    for (std::uint64_t p = first; p < first + count; ++p)
      if (covering(p) != live_.end()) return;
    const Live mapping{count, random.below(memory_pages - count), random.one_in(5) ? Access::read : Access::read_write};
    MapRequest request;
    request.memory = MemoryPiece::at(first_page_ + mapping.memory * page, Bytes{count * page});
    request.access = mapping.access;
    request.placement = Placement::fixed(pages(first, count).start);
    const Completion done = space_.map(request);
    ASSERT_TRUE(done.ok()) << done.error.message();
    live_[first] = mapping;
  }

  // Whole mappings of a random window, in one unmap.
  void unmap(test::Random& random) {
    if (live_.empty()) return;
    auto first = live_.lower_bound(random.below(iova_pages));
    if (first == live_.end()) first = live_.begin();
    auto last = first;
    for (std::uint64_t more = random.below(4); more > 0 && std::next(last) != live_.end(); --more) ++last;
    const IovaRange range{pages(first->first, 1).start, pages(last->first, last->second.count).last};
    const Completion done = space_.unmap(UnmapRequest::of(range));
    ASSERT_TRUE(done.ok()) << done.error.message();
    for (auto at = first; at != std::next(last); ++at)
      for (std::uint64_t i = 0; i < at->second.count; ++i)
        if (dirty_.erase(at->first + i) != 0 || !exact()) kept_.insert({at->first + i, at->second.memory + i});
    live_.erase(first, std::next(last));
  }

  void write(test::Random& random) {
    const std::uint64_t p = random.below(iova_pages);
    const std::byte value{static_cast<unsigned char>(random.next())};
    const auto result =
        kernel_->device(random.below(2)).dma_write(Iova{pages(p, 1).start.value + random.below(page)}, {&value, 1});
    const auto at = covering(p);
    const bool reaches = at != live_.end() && may_write(at->second.access);
    ASSERT_EQ(result.ok(), reaches) << "page " << p;
    if (reaches) dirty_.insert(p);
  }

  void read(test::Random& random) {
    const std::uint64_t unit = std::uint64_t{1} << random.below(3);  // pages of 4, 8, 16 KiB
    const std::uint64_t count = unit * (1 + random.below(iova_pages / unit));
    const std::uint64_t first = unit * random.below((iova_pages - count) / unit + 1);
    std::vector<std::uint64_t> bitmap(count / unit / 64 + 1);
    const auto read = space_.read_dirty(pages(first, count), Bytes{unit * page}, bitmap);
    ASSERT_TRUE(read) << read.error().message();
    std::set<std::uint64_t> expected;
    for (std::uint64_t p = first; p < first + count; ++p) {
      const bool live = exact() ? dirty_.erase(p) != 0 : covering(p) != live_.end();
      const auto gone = kept_.lower_bound({p, 0});
      const bool kept = gone != kept_.end() && gone->first == p;
      if (live || kept) expected.insert((p - first) / unit);
    }
    std::erase_if(kept_, [&](const auto& k) { return k.first >= first && k.first < first + count; });
    std::set<std::uint64_t> got;
    for (std::uint64_t bit = 0; bit < bitmap.size() * 64; ++bit)
      if ((bitmap[bit / 64] >> (bit % 64) & 1U) != 0) got.insert(bit);
    if (GetParam().runs_max > 1000) {
      EXPECT_EQ(got, expected);
    } else {  // the log spilled: too many, never too few
      EXPECT_TRUE(std::includes(got.begin(), got.end(), expected.begin(), expected.end()));
    }
    EXPECT_EQ(*read, got.size());
  }

  void take(test::Random& random) {
    std::multiset<std::pair<std::uint64_t, std::uint64_t>> got;
    std::vector<DirtyRun> runs(1 + random.below(5));
    for (std::size_t n = 1; n != 0;) {
      n = space_.take_unmapped_dirty(runs);
      for (std::size_t i = 0; i < n; ++i) {
        ASSERT_EQ(runs[i].memory.length, runs[i].range.length());
        const std::uint64_t memory = (runs[i].memory.offset - reinterpret_cast<std::uintptr_t>(first_page_)) / page;
        const std::uint64_t p = (runs[i].range.start.value - first_iova) / page;
        for (std::uint64_t k = 0; k < runs[i].memory.length.value / page; ++k) got.insert({p + k, memory + k});
      }
    }
    EXPECT_EQ(got, kept_);
    kept_.clear();
  }

  std::unique_ptr<ModelKernel> kernel_;
  Engine engine_;
  AddressSpace space_;
  std::vector<std::byte> memory_;
  std::byte* first_page_ = nullptr;
};

TEST_P(DirtyModel, EveryWrittenPageIsToldOnceAndNoOther) {
  const std::uint64_t seed = test::seed();
  SCOPED_TRACE(::testing::Message() << "IOVANE_SEED=" << seed);
  test::Random random{seed};
  EXPECT_EQ(space_.read_dirty(pages(0, 1), Bytes{page}, {}).error().code, Errc::invalid_argument);
  for (int i = 0; i < 40; ++i) map(random);
  for (int i = 0; i < 100; ++i) write(random);
  dirty_.clear();  // what was written before counts for nothing
  ASSERT_TRUE(space_.start_dirty_tracking());
  for (int i = 0; i < 6000 && !HasFailure(); ++i) {
    switch (random.below(16)) {
      case 0:
      case 1:
      case 2:
      case 3: map(random); break;
      case 4:
      case 5: unmap(random); break;
      case 6: read(random); break;
      case 7:
        if (GetParam().runs_max > 1000 && random.one_in(4)) take(random);
        break;
      default: write(random);
    }
  }
  ASSERT_TRUE(space_.stop_dirty_tracking());
  EXPECT_EQ(space_.stop_dirty_tracking().error().code, Errc::invalid_argument);
  EXPECT_EQ(space_.dirty_stats().guessed, 0U);
  EXPECT_EQ(space_.dirty_stats().runs_kept, 0U);
}

TEST_P(DirtyModel, TrackingStopsAndStartsAgainWithoutOldMarks) {
  test::Random random{7};
  for (int round = 0; round < 3; ++round) {
    ASSERT_TRUE(space_.start_dirty_tracking());
    for (int i = 0; i < 20; ++i) map(random);
    for (int i = 0; i < 200; ++i) write(random);
    for (int i = 0; i < 5; ++i) unmap(random);
    dirty_.clear();
    kept_.clear();
    ASSERT_TRUE(space_.start_dirty_tracking());  // again: forgets
    std::vector<std::uint64_t> bitmap(iova_pages / 64);
    const auto read = space_.read_dirty(pages(0, iova_pages), Bytes{page}, bitmap);
    ASSERT_TRUE(read) << read.error().message();
    if (exact()) {
      EXPECT_EQ(*read, 0U);
    }
    for (int i = 0; i < 100; ++i) write(random);
    this->read(random);
    ASSERT_TRUE(space_.stop_dirty_tracking());
    dirty_.clear();
    kept_.clear();
  }
}

INSTANTIATE_TEST_SUITE_P(Software, DirtyModel,
                         ::testing::Values(Setup{"iommufd", "iommufd", 1, 1U << 16},
                                           Setup{"iommufd_two_iommus", "iommufd", 2, 1U << 16},
                                           Setup{"type1", "type1", 1, 1U << 16}, Setup{"short_log", "iommufd", 1, 8}),
                         [](const auto& test) { return test.param.name; });

TEST(DirtyTracking, RefusalsSayWhatIsMissing) {
  const auto kernel = *ModelKernel::create();
  for (const char* interface : {"iommufd", "type1", "type1-v1", "compat"}) {
    SCOPED_TRACE(interface);
    auto backend = backends::open_backend(*kernel, {.name = interface, .descriptor = {}});
    ASSERT_TRUE(backend);
    Engine engine = EngineAccess::open(*std::move(backend), interface);
    auto plain = engine.create_address_space({});
    ASSERT_TRUE(plain);
    EXPECT_EQ(plain->start_dirty_tracking().error().code, Errc::unsupported);
    EXPECT_NE(plain->start_dirty_tracking().error().detail().find("dirty_tracking"), std::string::npos);
    *plain = AddressSpace{};
    AddressSpaceConfig config;
    config.dirty_tracking = true;
    auto tracking = engine.create_address_space(config);
    if (!tracking) continue;
    const Error started = tracking->start_dirty_tracking().error();
    EXPECT_EQ(started.code, std::string_view{interface} == "iommufd" ? Errc::ok
                            : std::string_view{interface} == "type1" ? Errc::no_device
                                                                     : Errc::unsupported)
        << started.message();
  }
}

TEST(DirtyTracking, AnIommuThatCannotTrackIsRefusedAndNamed) {
  ModelOptions options;
  options.iommus.front().dirty_tracking = false;
  const auto kernel = *ModelKernel::create(options);
  auto backend = backends::open_backend(*kernel, {.name = "iommufd", .descriptor = {}});
  ASSERT_TRUE(backend);
  Engine engine = EngineAccess::open(*std::move(backend), "model");
  AddressSpaceConfig config;
  config.dirty_tracking = true;
  auto space = engine.create_address_space(config);
  ASSERT_TRUE(space);
  const auto device = space->attach({.pci_address = kernel->device(0).address()});
  EXPECT_EQ(device.error().code, Errc::unsupported);
  EXPECT_NE(device.error().detail().find(kernel->device(0).address()), std::string::npos) << device.error().detail();
}

TEST(DirtyTracking, ALargeEntryIsWrittenAsAWholeAndAWindowLeavesTheRestAlone) {
  const auto kernel = *ModelKernel::create();
  auto backend = backends::open_backend(*kernel, {.name = "iommufd", .descriptor = {}});
  ASSERT_TRUE(backend);
  Engine engine = EngineAccess::open(*std::move(backend), "model");
  AddressSpaceConfig config;
  config.layout = LayoutPolicy::fixed;
  config.dirty_tracking = true;
  auto space = engine.create_address_space(config);
  ASSERT_TRUE(space);
  ASSERT_TRUE(space->attach({.pci_address = kernel->device(0).address()}));
  constexpr std::uint64_t huge = 2U << 20;
  std::vector<std::byte> memory(3 * huge);
  auto* const start =
      reinterpret_cast<std::byte*>((reinterpret_cast<std::uintptr_t>(memory.data()) + huge - 1) & ~(huge - 1));
  MapRequest request;
  request.memory = MemoryPiece::at(start, Bytes{2 * huge});
  request.placement = Placement::fixed(Iova{first_iova});
  ASSERT_TRUE(space->map(request).ok());
  ASSERT_TRUE(space->start_dirty_tracking());
  const std::byte one{1};
  ASSERT_TRUE(kernel->device(0).dma_write(Iova{first_iova + 5 * page}, {&one, 1}).ok());
  std::vector<std::uint64_t> bitmap(16);
  const auto second =
      space->read_dirty(*IovaRange::from_length(Iova{first_iova + huge}, Bytes{huge}), Bytes{page}, bitmap);
  ASSERT_TRUE(second);
  EXPECT_EQ(*second, 0U);
  const auto first = space->read_dirty(*IovaRange::from_length(Iova{first_iova}, Bytes{huge}), Bytes{page}, bitmap);
  ASSERT_TRUE(first);
  EXPECT_EQ(*first, huge / page);
  EXPECT_EQ(*space->read_dirty(*IovaRange::from_length(Iova{first_iova}, Bytes{2 * huge}), Bytes{huge}, bitmap), 0U)
      << "bit 0 was set already, and nothing new was written";
}

}  // namespace
}  // namespace iovane
