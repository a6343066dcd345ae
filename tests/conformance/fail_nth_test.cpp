// The kernel's own fault injection (/proc/thread-self/fail-nth, Documentation/fault-injection): the nth allocation or
// copy inside one system call fails. After each, the engine's index and the kernel must agree. In the lab only.
#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>

#include "base/unique_fd.hpp"
#include "conformance/conformance.hpp"
#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"

namespace iovane::test {
namespace {

class FailNth : public Conformance {
 protected:
  void SetUp() override {
    if (std::getenv("IOVANE_LAB") == nullptr) GTEST_SKIP() << "needs a kernel with fault injection: the lab";
    nth_ = base::UniqueFd{::open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC)};
    if (!nth_) GTEST_SKIP() << "this kernel has no /proc/thread-self/fail-nth (CONFIG_FAULT_INJECTION)";
    // Allocations that may sleep, which is all of a map's, are spared by default.
    for (const char* knob : {"failslab/ignore-gfp-wait", "fail_page_alloc/ignore-gfp-wait"})
      std::ofstream{std::string{"/sys/kernel/debug/"} + knob} << "N\n";
    std::ofstream{"/sys/kernel/debug/fail_page_alloc/min-order"} << "0\n";
    Conformance::SetUp();
    if (HasFatalFailure() || IsSkipped()) return;
    backend_.reset();
    auto backend = open_backend(*kernel_, {.name = std::string{to_string(GetParam())}, .descriptor = {}});
    ASSERT_TRUE(backend) << backend.error().message();
    engine_ = EngineAccess::open(*std::move(backend), "under test");
    AddressSpaceConfig config;
    config.layout = LayoutPolicy::fixed;
    auto space = engine_.create_address_space(config);
    ASSERT_TRUE(space) << space.error().message();
    address_space_ = *std::move(space);
    const auto device = address_space_.attach({.pci_address = machine_->devices().front()});
    ASSERT_TRUE(device) << device.error().message();
  }
  void TearDown() override {
    address_space_ = AddressSpace{};
    engine_ = Engine{};
    Conformance::TearDown();
  }

  /// Runs `call` with the nth chance to fail taken; false when the call ended before its nth.
  template <typename Call>
  bool failing(unsigned n, Call&& call) {
    const std::string text = std::to_string(n);
    EXPECT_GT(::pwrite(nth_.get(), text.data(), text.size(), 0), 0);
    call();
    char left[16] = {};
    const bool read = ::pread(nth_.get(), left, sizeof left - 1, 0) > 0;
    while (::pwrite(nth_.get(), "0", 1, 0) != 1) {
      // bounded: disarming can itself be the call that fails, once
    }
    return read && std::strtoul(left, nullptr, 10) == 0;
  }
  MapRequest request(const Memory& memory) const {
    MapRequest map;
    map.memory = MemoryPiece::of(memory.bytes());
    map.placement = Placement::fixed(Iova{base});
    return map;
  }

  base::UniqueFd nth_;
  Engine engine_;
  AddressSpace address_space_;
};

constexpr unsigned tries_max = 500;

TEST_P(FailNth, a_map_that_fails_inside_the_kernel_leaves_nothing) {
  // On Linux 6.12 the 11th failure is IOAS_MAP's own answer: EFAULT, and the mapping stands.
  Memory memory{3};
  unsigned failed = 0, n = 1;
  for (bool fired = true; fired && n < tries_max; ++n) {
    SCOPED_TRACE(testing::Message() << "failure " << n);
    Completion done;
    fired = failing(n, [&] { done = address_space_.map(request(memory)); });
    if (done.ok()) {  // a failure that the kernel has a way around
      EXPECT_TRUE(address_space_.find(Iova{base}));
    } else {
      ++failed;
      EXPECT_EQ(address_space_.find(Iova{base}).error().code, Errc::not_found);
      const Completion again = address_space_.map(request(memory));
      ASSERT_TRUE(again.ok()) << "the kernel kept something: " << again.error.message();
    }
    const Completion gone = address_space_.unmap(UnmapRequest::of(at(base, 3)));
    ASSERT_TRUE(gone.ok()) << gone.error.message();
    ASSERT_EQ(gone.bytes, memory.length());
  }
  EXPECT_GT(failed, 0U) << "nothing was injected";
  EXPECT_LT(n, tries_max);
  RecordProperty("failed_maps", static_cast<int>(failed));
  std::printf("%u of %u injected failures failed the map\n", failed, n - 2);
}

TEST_P(FailNth, an_unmap_that_fails_inside_the_kernel_is_quarantined_and_goes_later) {
  Memory memory{3};
  unsigned failed = 0, n = 1;
  for (bool fired = true; fired && n < tries_max; ++n) {
    SCOPED_TRACE(testing::Message() << "failure " << n);
    const Completion mapped = address_space_.map(request(memory));
    ASSERT_TRUE(mapped.ok()) << mapped.error.message();
    Completion gone;
    fired = failing(n, [&] { gone = address_space_.unmap(UnmapRequest::of(at(base, 3))); });
    if (gone.ok()) {
      EXPECT_EQ(gone.bytes, memory.length());
      continue;
    }
    ++failed;
    EXPECT_EQ(address_space_.stats().quarantined_mappings, 1U);
    EXPECT_EQ(address_space_.map(request(memory)).error.code, Errc::quarantined);
    const auto all = address_space_.unmap_all();
    EXPECT_TRUE(all) << all.error().message();
    EXPECT_EQ(address_space_.stats().quarantined_mappings, 0U);
  }
  EXPECT_LT(n, tries_max);
  std::printf("%u of %u injected failures failed the unmap\n", failed, n - 2);
}

IOVANE_CONFORMANCE(FailNth);

}  // namespace
}  // namespace iovane::test
