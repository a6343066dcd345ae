// What only sPAPR has: windows, registered memory, replacing in place, error handling. The same on the model and on
// POWER.
#include <fmt/format.h>
#include <linux/mman.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <fstream>

#include "backends/uapi/vfio.hpp"
#include "conformance/conformance.hpp"
#include "pinning/preflight.hpp"

namespace iovane::test {
namespace {

class SpaprContract : public Conformance {
 protected:
  SpaprControl& control() { return *space_->spapr(); }
  std::uint64_t locked() { return kernel_->memlock().locked.value; }
};

/// Two pages of some size for large TCEs: huge pages of that size or a larger one, where the kernel has some.
class LargeMemory {
 public:
  explicit LargeMemory(std::uint64_t page) : bytes_{std::max<std::size_t>(2 * page, 4U << 20)} {
    for (unsigned shift = 16; shift <= 30 && data_ == nullptr; ++shift)
      if (std::uint64_t{1} << shift >= page) take_huge(shift);
    if (data_ == nullptr) {
      reserved_ = 2 * bytes_;
      base_ = ::mmap(nullptr, reserved_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      data_ = reinterpret_cast<std::byte*>((reinterpret_cast<std::uintptr_t>(base_) + bytes_ - 1) & ~(bytes_ - 1));
    }
    for (std::size_t i = 0; i < bytes_; ++i) data_[i] = static_cast<std::byte>(i * 29 + i / 4096);
  }
  LargeMemory(const LargeMemory&) = delete;
  LargeMemory& operator=(const LargeMemory&) = delete;
  ~LargeMemory() { ::munmap(base_, reserved_); }
  std::uint64_t backing() const { return backing_; }  ///< size of the pages behind it
  std::span<std::byte> span() const { return {data_, bytes_}; }
  std::uint64_t address() const { return reinterpret_cast<std::uintptr_t>(data_); }

 private:
  void take_huge(unsigned shift) {
    const std::uint64_t size = std::uint64_t{1} << shift;
    const std::uint64_t count = (bytes_ + size - 1) / size;
    const auto take = [&] {
      return ::mmap(nullptr, count * size, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | static_cast<int>(shift << MAP_HUGE_SHIFT), -1, 0);
    };
    void* got = take();
    if (got == MAP_FAILED) {  // root in the lab can have some made; elsewhere this is without effect
      std::ofstream{fmt::format("/sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages", size >> 10)} << count;
      got = take();
    }
    if (got == MAP_FAILED) return;
    base_ = got;
    data_ = static_cast<std::byte*>(got);
    reserved_ = count * size;
    backing_ = size;
  }

  std::size_t bytes_;
  void* base_ = nullptr;
  std::size_t reserved_ = 0;
  std::byte* data_ = nullptr;
  std::uint64_t backing_ = os_page_bytes();
};

TEST_P(SpaprContract, the_platform_says_what_windows_it_can_make) {
  space_ = make_space();
  EXPECT_EQ(control().limits().error().code, Errc::no_device);
  EXPECT_TRUE(control().windows().empty());
  device_ = attach(*space_);
  const auto limits = control().limits();
  ASSERT_TRUE(limits) << limits.error().message();
  ASSERT_EQ(control().windows().size(), 1U);
  const SpaprWindow window = control().windows().front();
  EXPECT_TRUE(window.is_default);
  EXPECT_EQ(window.range, limits->default_window);
  EXPECT_EQ(window.page, Bytes{4096});
  EXPECT_GT(window.table.value, 0U) << "its table is charged to the process";
  EXPECT_EQ(limits->page_sizes != 0, spapr_v2());
  std::printf("window of %llu MiB: %llu bytes charged; page sizes %#llx, %u windows, %u levels\n",
              static_cast<unsigned long long>(window.range.length().value >> 20),
              static_cast<unsigned long long>(window.table.value), static_cast<unsigned long long>(limits->page_sizes),
              limits->windows_max, limits->levels_max);
}

TEST_P(SpaprContract, a_window_is_made_used_and_removed) {
  space_ = make_space();
  device_ = attach(*space_);
  witness_ = machine_->witness(*space_, device_);
  ASSERT_NE(witness_, nullptr);
  if (!spapr_v2()) {
    EXPECT_EQ(control().create_window({.length = Bytes{1 << 20}, .page = Bytes{4096}}).error().code, Errc::unsupported);
    EXPECT_EQ(control().remove_window(Iova{0}).error().code, Errc::unsupported);
    return;
  }
  const std::uint64_t before = locked();
  const auto window = control().create_window({.length = Bytes{16U << 20}, .page = Bytes{4096}});
  ASSERT_TRUE(window) << window.error().message();
  EXPECT_EQ(locked() - before, window->table.value);
  EXPECT_EQ(space_->usable_ranges()->size(), 2U);
  const Memory memory{2};
  const Iova last{window->range.last.value - os_page_bytes() + 1};
  ASSERT_TRUE(map(at(last.value, 1), memory.address()).error.ok());
  EXPECT_TRUE(reads(*witness_, last, memory.page(0)));
  EXPECT_TRUE(writes(*witness_, last, memory.page(0)));
  EXPECT_EQ(control().remove_window(window->range.start).error().code, Errc::busy);
  EXPECT_EQ(unmap(at(last.value, 1)).bytes, Bytes{os_page_bytes()});
  EXPECT_TRUE(cannot_write(*witness_, last, memory.page(0)));
  EXPECT_EQ(control().create_window({.length = Bytes{1 << 20}, .page = Bytes{4096}}).error().code, Errc::limit_reached);
  ASSERT_TRUE(control().remove_window(window->range.start));
  EXPECT_EQ(control().remove_window(window->range.start).error().code, Errc::not_found);
  EXPECT_EQ(locked(), before);
  EXPECT_EQ(map(at(last.value, 1), memory.address()).error.code, Errc::iova_reserved);
  EXPECT_TRUE(cannot_read(*witness_, last, memory.page(0))) << "the window is gone";
  EXPECT_TRUE(cannot_write(*witness_, last, memory.page(0)));
}

TEST_P(SpaprContract, without_the_default_window_the_next_one_begins_at_zero) {
  if (!spapr_v2()) return;
  space_ = make_space();
  device_ = attach(*space_);
  ASSERT_TRUE(control().remove_window(control().windows().front().range.start));
  EXPECT_TRUE(space_->usable_ranges()->empty());
  const auto first = control().create_window({.length = Bytes{64U << 20}, .page = Bytes{4096}});
  ASSERT_TRUE(first) << first.error().message();
  EXPECT_EQ(first->range.start, Iova{0});
  EXPECT_FALSE(first->is_default);
}

TEST_P(SpaprContract, a_window_that_cannot_be_is_refused_with_its_reason) {
  if (!spapr_v2()) return;
  space_ = make_space();
  EXPECT_EQ(control().create_window({.length = Bytes{1 << 20}}).error().code, Errc::no_device);
  device_ = attach(*space_);
  EXPECT_EQ(control().create_window({.length = Bytes{1 << 20}, .page = Bytes{8192}}).error().code, Errc::unsupported);
  EXPECT_EQ(control().create_window({.length = Bytes{3 << 20}, .page = Bytes{4096}}).error().code,
            Errc::invalid_argument);
  EXPECT_EQ(control().create_window({.length = Bytes{4096}, .page = Bytes{65536}}).error().code,
            Errc::invalid_argument);
  EXPECT_EQ(control().create_window({.length = Bytes{1 << 20}, .page = Bytes{4096}, .levels = 99}).error().code,
            Errc::unsupported);
  EXPECT_EQ(control().windows().size(), 1U);
}

TEST_P(SpaprContract, large_pages_are_one_tce_each) {
  if (!spapr_v2()) return;
  space_ = make_space();
  device_ = attach(*space_);
  const auto limits = control().limits();
  ASSERT_TRUE(limits);
  const bool real = machine_->kernel().description().find("Linux") == 0;
  for (const std::uint64_t page : {std::uint64_t{64U << 10}, std::uint64_t{2U << 20}, std::uint64_t{16U << 20}}) {
    SCOPED_TRACE(fmt::format("pages of {} KiB", page >> 10));
    if ((limits->page_sizes & page) == 0) continue;
    const LargeMemory memory{page};
    const auto region =
        space_->register_memory({.address = memory.span().data(), .length = Bytes{memory.span().size()}});
    ASSERT_TRUE(region) << region.error().message();
    const auto window = control().create_window({.length = Bytes{page * 64}, .page = Bytes{page}});
    ASSERT_TRUE(window) << window.error().message();
    EXPECT_EQ(space_->facts().page_sizes, 4096 | page);
    witness_ = machine_->witness(*space_, device_);
    const std::uint64_t start = window->range.start.value;
    const BackendOp op{.kind = OpKind::map,
                       .access = Access::read_write,
                       .region = *region,
                       .range = *IovaRange::from_length(Iova{start + page}, Bytes{2 * page}),
                       .memory = 0};
    const auto mapped = run(*space_, op);
    const bool backed = !real || memory.backing() >= page;
    std::printf("pages of %llu KiB over memory of %llu KiB pages: %s\n", static_cast<unsigned long long>(page >> 10),
                static_cast<unsigned long long>(memory.backing() >> 10), mapped.error.message().c_str());
    if (!backed) {
      EXPECT_EQ(mapped.error.code, Errc::bad_memory) << mapped.error.message();
    } else {
      ASSERT_TRUE(mapped.error.ok()) << mapped.error.message();
      EXPECT_TRUE(reads(*witness_, Iova{start + page + page - 4096}, memory.span().subspan(page - 4096, 4096)));
      EXPECT_TRUE(reads(*witness_, Iova{start + 3 * page - 4096}, memory.span().subspan(2 * page - 4096, 4096)));
      EXPECT_TRUE(writes(*witness_, Iova{start + page}, memory.span().first(4096)));
      EXPECT_EQ(unmap({Iova{start + page}, Iova{start + page + 4095}}).error.code, Errc::would_bisect);
      EXPECT_EQ(map({Iova{start + 4096}, Iova{start + 8191}}, memory.address()).error.code, Errc::invalid_argument);
      EXPECT_EQ(unmap({Iova{start + page}, Iova{start + 2 * page - 1}}).bytes, Bytes{page}) << "one of the two";
      EXPECT_TRUE(reads(*witness_, Iova{start + 2 * page}, memory.span().subspan(page, 4096)));
      EXPECT_EQ(unmap(op.range).bytes, Bytes{page});
      EXPECT_TRUE(cannot_read(*witness_, Iova{start + page}, memory.span().first(4096)));
    }
    witness_.reset();
    ASSERT_TRUE(control().remove_window(window->range.start));
    ASSERT_TRUE(space_->unregister_memory(*region));
  }
}

TEST_P(SpaprContract, tables_have_as_many_levels_as_are_asked_for) {
  if (!spapr_v2()) return;
  space_ = make_space();
  device_ = attach(*space_);
  witness_ = machine_->witness(*space_, device_);
  ASSERT_NE(witness_, nullptr);
  const auto limits = control().limits();
  ASSERT_TRUE(limits);
  const Memory memory{2};
  const std::uint64_t before = locked();
  for (std::uint32_t levels = 1; levels <= limits->levels_max; ++levels) {
    SCOPED_TRACE(levels);
    constexpr Bytes length{64U << 20};
    const auto window = control().create_window({.length = length, .page = Bytes{4096}, .levels = levels});
    if (!window) {
      // A table of small levels would translate more bits than there are: Linux says EINVAL, and we what that means.
      EXPECT_EQ(window.error().code, Errc::unsupported) << window.error().message();
      EXPECT_GT(levels, 2U);
      std::printf("%u levels: %s\n", levels, window.error().message().c_str());
      continue;
    }
    EXPECT_EQ(window->levels, levels);
    const Iova first = window->range.start;
    const Iova last{window->range.last.value - os_page_bytes() + 1};
    ASSERT_TRUE(map(at(first.value, 1), memory.address(0)).error.ok());
    ASSERT_TRUE(map(at(last.value, 1), memory.address(1)).error.ok());
    EXPECT_TRUE(reads(*witness_, first, memory.page(0)));
    EXPECT_TRUE(reads(*witness_, last, memory.page(1)));
    EXPECT_EQ(unmap(window->range).bytes, memory.length());
    EXPECT_TRUE(cannot_read(*witness_, first, memory.page(0)));
    EXPECT_TRUE(cannot_read(*witness_, last, memory.page(1)));
    const pinning::PlannedWindow plan{.size = length, .page_shift = 12, .levels = levels};
    const auto predicted =
        pinning::predict_charge({.backend = pinning::PinningBackend::spapr_v2, .windows = {&plan, 1}});
    ASSERT_TRUE(predicted);
    std::printf("%u levels: %llu bytes charged, %llu predicted\n", levels,
                static_cast<unsigned long long>(window->table.value),
                static_cast<unsigned long long>(predicted->bytes));
    EXPECT_GE(predicted->bytes, window->table.value) << "what fits by preflight must fit";
    ASSERT_TRUE(control().remove_window(window->range.start));
    EXPECT_EQ(locked(), before);
  }
}

TEST_P(SpaprContract, a_table_too_large_for_one_piece_gets_more_levels) {
  if (!spapr_v2()) return;
  space_ = make_space();
  device_ = attach(*space_);
  witness_ = machine_->witness(*space_, device_);
  const auto limits = control().limits();
  ASSERT_TRUE(limits);
  if (limits->levels_max < 2) GTEST_SKIP() << "the firmware builds the tables here: one level";
  // 32 MiB of entries: more than Linux has in one piece.
  const auto window = control().create_window({.length = Bytes{std::uint64_t{16} << 30}, .page = Bytes{4096}});
  ASSERT_TRUE(window) << window.error().message();
  if (machine_->kernel().description().find("Linux") == 0) {
    EXPECT_GE(window->levels, 2U);
  }
  const Memory memory{1};
  const Iova last{window->range.last.value - os_page_bytes() + 1};
  ASSERT_TRUE(map(at(last.value, 1), memory.address()).error.ok());
  EXPECT_TRUE(reads(*witness_, last, memory.page(0)));
  EXPECT_TRUE(unmap(at(last.value, 1)).error.ok());
  ASSERT_TRUE(control().remove_window(window->range.start));
}

TEST_P(SpaprContract, one_tce_of_4_kib_whatever_the_hosts_page_is) {
  make_default();
  const Memory memory{1};
  const std::uint64_t tce = space_->facts().granule.value;
  ASSERT_EQ(tce, 4096U);
  const std::uint64_t offset = os_page_bytes() - tce;
  const IovaRange range = *IovaRange::from_length(Iova{base + tce}, Bytes{tce});
  ASSERT_TRUE(map(range, memory.address() + offset).error.ok());
  EXPECT_TRUE(reads(*witness_, range.start, memory.bytes().subspan(offset, tce)));
  EXPECT_TRUE(cannot_read(*witness_, Iova{base + 2 * tce}, memory.bytes().subspan(offset, tce)));
  EXPECT_EQ(unmap(range).bytes, Bytes{tce});
}

TEST_P(SpaprContract, a_map_that_would_pass_the_windows_last_page_never_reaches_the_kernel) {
  make_default();
  const Memory memory{4};
  const std::uint64_t before = kernel_->calls(uapi::vfio::Type1DmaMap::request);
  for (const SpaprWindow& window : control().windows()) {
    const std::uint64_t last_page = window.range.last.value - os_page_bytes() + 1;
    EXPECT_EQ(map(at(last_page, 2), memory.address()).error.code, Errc::iova_reserved);
    EXPECT_EQ(map(at(last_page, 4), memory.address()).error.code, Errc::iova_reserved);
    EXPECT_TRUE(unmap({Iova{last_page}, Iova{last_page + 4 * os_page_bytes() - 1}}).error.ok());
  }
  EXPECT_EQ(kernel_->calls(uapi::vfio::Type1DmaMap::request), before);
}

TEST_P(SpaprContract, replace_leads_elsewhere_in_one_call) {
  make_default();
  const Memory old_memory{2, 1};
  const Memory new_memory{2, 2};
  ASSERT_TRUE(map(at(base, 2), old_memory.address()).error.ok());
  EXPECT_TRUE(reads(*witness_, Iova{base}, old_memory.page(0)));
  const std::uint64_t maps = kernel_->calls(uapi::vfio::Type1DmaMap::request);
  const std::uint64_t unmaps = kernel_->calls(uapi::vfio::Type1DmaUnmap::request);
  const BackendOp op{.kind = OpKind::replace,
                     .access = Access::read_write,
                     .region = {},
                     .range = at(base, 2),
                     .memory = new_memory.address()};
  const auto replaced = run(*space_, op);
  ASSERT_TRUE(replaced.error.ok()) << replaced.error.message();
  EXPECT_EQ(kernel_->calls(uapi::vfio::Type1DmaMap::request), maps + 1);
  EXPECT_EQ(kernel_->calls(uapi::vfio::Type1DmaUnmap::request), unmaps);
  EXPECT_TRUE(reads(*witness_, Iova{base}, new_memory.page(0)));
  EXPECT_TRUE(cannot_write(*witness_, Iova{base}, old_memory.page(0)));
  EXPECT_EQ(unmap(at(base, 2)).bytes, new_memory.length());
  EXPECT_EQ(run(*space_, op).error.code, Errc::not_found) << "nothing is there to be replaced";
}

TEST_P(SpaprContract, memory_stays_registered_until_its_last_tce_is_gone) {
  if (!spapr_v2()) return;
  make_default();
  const Memory memory{8};
  const auto whole = space_->register_memory({.address = memory.data(), .length = memory.length()});
  const auto part = space_->register_memory({.address = memory.page(2).data(), .length = Bytes{2 * os_page_bytes()}});
  ASSERT_TRUE(whole && part);
  EXPECT_EQ(charged(), memory.length()) << "registered twice, charged once";
  const BackendOp op{
      .kind = OpKind::map, .access = Access::read_write, .region = *part, .range = at(base, 1), .memory = 0};
  ASSERT_TRUE(run(*space_, op).error.ok());
  ASSERT_TRUE(space_->unregister_memory(*whole));
  ASSERT_TRUE(space_->unregister_memory(*part));
  EXPECT_EQ(charged(), memory.length()) << "a TCE leads there";
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(2)));
  EXPECT_TRUE(unmap(at(base, 1)).error.ok());
  EXPECT_EQ(charged(), Bytes{});
  EXPECT_TRUE(cannot_read(*witness_, Iova{base}, memory.page(2)));
  EXPECT_TRUE(cannot_write(*witness_, Iova{base}, memory.page(2)));
}

TEST_P(SpaprContract, memory_that_nobody_registered_is_registered_by_its_maps) {
  if (!spapr_v2()) return;
  make_default();
  const Memory memory{8};
  ASSERT_TRUE(map(at(base, 4), memory.address(0)).error.ok());
  ASSERT_TRUE(map(at(base + 0x10'0000, 4), memory.address(2)).error.ok()) << "overlaps the first one's memory";
  EXPECT_EQ(charged(), Bytes{6 * os_page_bytes()});
  EXPECT_TRUE(reads(*witness_, Iova{base + 0x10'0000 + 3 * os_page_bytes()}, memory.page(5)));
  EXPECT_EQ(unmap(at(base, 2)).bytes, Bytes{2 * os_page_bytes()});
  EXPECT_EQ(unmap(at(base, 4)).bytes, Bytes{2 * os_page_bytes()});
  EXPECT_EQ(unmap(at(base + 0x10'0000, 4)).bytes, Bytes{4 * os_page_bytes()});
  EXPECT_EQ(charged(), Bytes{});
}

TEST_P(SpaprContract, spaces_of_one_process_share_what_they_register) {
  if (!spapr_v2()) return;
  if (machine_->devices().size() < 2) GTEST_SKIP() << "one witness only";
  make_default();
  const auto other = make_space();
  const AttachedDevice second = attach(*other, 1);
  const Memory memory{8};
  const std::uint64_t before = locked();
  const auto here = space_->register_memory({.address = memory.data(), .length = memory.length()});
  ASSERT_TRUE(here);
  // Another cut of the same memory, which the kernel would refuse as an overlap.
  const auto there = other->register_memory({.address = memory.page(2).data(), .length = Bytes{6 * os_page_bytes()}});
  ASSERT_TRUE(there) << there.error().message();
  EXPECT_EQ(locked() - before, memory.length().value);
  EXPECT_TRUE(space_->unregister_memory(*here));
  EXPECT_EQ(locked() - before, memory.length().value) << "the other space still holds it";
  EXPECT_TRUE(other->unregister_memory(*there));
  EXPECT_EQ(locked(), before);
}

/// Error handling of the first device's endpoint, or a skip with the reason.
class SpaprErrorHandling : public SpaprContract {
 protected:
  void SetUp() override {
    SpaprContract::SetUp();
    if (HasFatalFailure() || IsSkipped()) return;
    make_default();
    eeh_ = control().eeh();
    if (eeh_ == nullptr) GTEST_SKIP() << "this platform offers no error handling";
    const auto state = eeh_->state();
    if (!state) GTEST_SKIP() << "no error handling for this device: " << state.error().detail();
    ASSERT_EQ(*state, EehState::normal);
  }
  EehState state() { return eeh_->state().value_or(EehState::unavailable); }
  /// Memory decoding and bus mastering are off after a reset: they are the driver's to set.
  void restart_device() {
    witness_ = machine_->witness(*space_, device_);
    ASSERT_NE(witness_, nullptr);
  }

  SpaprEeh* eeh_ = nullptr;
};

TEST_P(SpaprErrorHandling, a_frozen_device_is_let_run_again_and_sees_what_was_mapped_meanwhile) {
  const Memory memory{2};
  const Iova other{base + os_page_bytes()};
  ASSERT_TRUE(map(at(base, 1), memory.address()).error.ok());
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
  std::vector<EehEvent> heard;
  eeh_->set_listener([&](const EehEvent& event) { heard.push_back(event); });
  const auto saw = [&](EehState before, EehState now) {
    const auto event = eeh_->check();
    return event && event->before == before && event->now == now && eeh_->last_seen() == now;
  };
  if (!machine_->freeze(*space_, device_)) {
    EXPECT_TRUE(unmap(at(base, 1)).error.ok());
    GTEST_SKIP() << "this machine's bridge has no freeze that a test can cause";
  }
  EXPECT_TRUE(saw(EehState::normal, EehState::stopped));
  ASSERT_EQ(heard.size(), 1U);
  EXPECT_TRUE(heard.front().frozen());
  EXPECT_TRUE(saw(EehState::stopped, EehState::stopped));
  EXPECT_EQ(heard.size(), 1U) << "a change is told once";

  const bool stops = machine_->frozen_device_is_stopped();
  if (stops) {
    EXPECT_TRUE(cannot_read(*witness_, Iova{base}, memory.page(0))) << "no DMA while frozen";
  }
  EXPECT_TRUE(map(at(other.value, 1), memory.address(1)).error.ok()) << "tables change all the same";
  EXPECT_EQ(unmap(at(base, 1)).bytes, Bytes{os_page_bytes()});

  EXPECT_TRUE(eeh_->unfreeze_io());
  EXPECT_TRUE(saw(EehState::stopped, EehState::stopped_dma));
  ASSERT_EQ(heard.size(), 2U);
  EXPECT_TRUE(heard.back().frozen());
  if (stops) {
    EXPECT_TRUE(cannot_read(*witness_, other, memory.page(1))) << "registers work, DMA does not";
  }
  EXPECT_TRUE(eeh_->unfreeze_dma());
  EXPECT_TRUE(saw(EehState::stopped_dma, EehState::normal));
  EXPECT_EQ(heard.size(), 3U);
  EXPECT_TRUE(reads(*witness_, other, memory.page(1))) << "what was mapped meanwhile counts";
  EXPECT_TRUE(cannot_read(*witness_, Iova{base}, memory.page(0))) << "and what was unmapped";

  ASSERT_TRUE(machine_->freeze(*space_, device_));
  EXPECT_EQ(state(), EehState::stopped);
  EXPECT_TRUE(eeh_->unfreeze_io());
  EXPECT_TRUE(eeh_->unfreeze_dma());
  EXPECT_EQ(state(), EehState::normal);
  EXPECT_EQ(heard.size(), 3U) << "state() tells its caller only";
  EXPECT_TRUE(space_->unmap_all());
}

TEST_P(SpaprErrorHandling, a_reset_ends_a_freeze) {
  const Memory memory{3};
  ASSERT_TRUE(map(at(base, 1), memory.address()).error.ok());
  std::size_t page = 1;
  for (const EehReset kind : {EehReset::hot, EehReset::fundamental}) {
    if (!machine_->freeze(*space_, device_)) {
      EXPECT_TRUE(space_->unmap_all());
      GTEST_SKIP() << "this machine's bridge has no freeze that a test can cause";
    }
    ASSERT_EQ(state(), EehState::stopped);
    EXPECT_TRUE(map(at(base + page * os_page_bytes(), 1), memory.address(page)).error.ok());
    const auto done = eeh_->reset(kind);
    ASSERT_TRUE(done) << done.error().message();
    EXPECT_EQ(state(), EehState::normal);
    restart_device();
    EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
    EXPECT_TRUE(reads(*witness_, Iova{base + page * os_page_bytes()}, memory.page(page)));
    ++page;
  }
  EXPECT_TRUE(space_->unmap_all());
}

TEST_P(SpaprErrorHandling, an_injected_error_is_taken_by_the_platform) {
  ASSERT_TRUE(eeh_->inject({.wide = false, .function = 4, .address = 0, .mask = 0}));
  // QEMU's bridge does not carry it out; where one does, the device has to run again.
  if (state() == EehState::normal) return;
  EXPECT_EQ(state(), EehState::stopped);
  EXPECT_TRUE(eeh_->unfreeze_io());
  EXPECT_TRUE(eeh_->unfreeze_dma());
  EXPECT_EQ(state(), EehState::normal);
}

TEST_P(SpaprErrorHandling, unfreezing_what_is_not_frozen_changes_nothing) {
  const Memory memory{1};
  ASSERT_TRUE(map(at(base, 1), memory.address()).error.ok());
  EXPECT_TRUE(eeh_->enable());
  EXPECT_TRUE(eeh_->unfreeze_io());
  EXPECT_TRUE(eeh_->unfreeze_dma());
  EXPECT_TRUE(eeh_->disable());
  EXPECT_EQ(state(), EehState::normal);
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
  EXPECT_TRUE(unmap(at(base, 1)).error.ok());
}

TEST_P(SpaprErrorHandling, mappings_outlive_a_reset_and_may_be_made_during_it) {
  const Memory memory{4};
  ASSERT_TRUE(map(at(base, 1), memory.address()).error.ok());
  std::size_t page = 1;
  for (const EehReset kind : {EehReset::hot, EehReset::fundamental}) {
    ASSERT_TRUE(eeh_->assert_reset(kind));
    EXPECT_TRUE(map(at(base + page * os_page_bytes(), 1), memory.address(page)).error.ok());
    const auto released = eeh_->deactivate_reset();
    ASSERT_TRUE(released) << released.error().message();
    const auto configured = eeh_->configure();
    ASSERT_TRUE(configured) << configured.error().message();
    EXPECT_EQ(state(), EehState::normal);
    restart_device();
    EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
    EXPECT_TRUE(reads(*witness_, Iova{base + page * os_page_bytes()}, memory.page(page)));
    EXPECT_TRUE(writes(*witness_, Iova{base + page * os_page_bytes()}, memory.page(page)));
    ++page;
  }
  ASSERT_TRUE(eeh_->reset(EehReset::hot));
  restart_device();
  EXPECT_EQ(unmap(at(base, 1)).bytes, Bytes{os_page_bytes()});
  EXPECT_TRUE(cannot_read(*witness_, Iova{base}, memory.page(0)));
  EXPECT_TRUE(space_->unmap_all());
}

INSTANTIATE_TEST_SUITE_P(Kernel, SpaprContract, testing::Values(Interface::spapr_v2, Interface::spapr_v1),
                         [](const auto& test) { return iovane::test::parameter_name(test.param); });
INSTANTIATE_TEST_SUITE_P(Kernel, SpaprErrorHandling, testing::Values(Interface::spapr_v2, Interface::spapr_v1),
                         [](const auto& test) { return iovane::test::parameter_name(test.param); });

}  // namespace
}  // namespace iovane::test
