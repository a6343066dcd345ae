#include "pinning/preflight.hpp"

#include <gtest/gtest.h>

#include <array>

namespace iovane::pinning {
namespace {

using namespace iovane::literals;

std::uint64_t charge(const PlannedUse& use) { return predict_charge(use)->bytes; }

TEST(Preflight, Type1ChargesEveryContainer) {
  const PlannedUse use{.backend = PinningBackend::type1, .memory = 8_GiB, .spaces = 3};
  EXPECT_EQ(charge(use), (24_GiB).value);
  EXPECT_EQ(predict_charge(use)->book, MemlockBook::locked);
}

TEST(Preflight, IommufdChargesOncePerMapAndSaysWhichBook) {
  EXPECT_EQ(charge({.backend = PinningBackend::iommufd, .memory = 8_GiB}), (8_GiB).value);
  EXPECT_EQ(predict_charge({.backend = PinningBackend::iommufd, .memory = 8_GiB})->book, MemlockBook::user);
  EXPECT_EQ(predict_charge({.backend = PinningBackend::iommufd_process_mode, .memory = 8_GiB})->book,
            MemlockBook::pinned);
}

TEST(Preflight, SpaprChargesMemoryOnceAndTablesForEveryWindow) {
  // 2 GiB of 4 KiB pages: 512 Ki entries of 8 bytes, 4 MiB, twice.
  const std::array<PlannedWindow, 1> small{PlannedWindow{2_GiB, 12, 1}};
  EXPECT_EQ(charge({.backend = PinningBackend::spapr_v2, .memory = 1_GiB, .windows = small}),
            (1_GiB).value + 2 * (4_MiB).value);
  EXPECT_EQ(charge({.backend = PinningBackend::spapr_v2, .memory = 1_GiB, .spaces = 2, .windows = small}),
            (1_GiB).value + 4 * (4_MiB).value);
  // 64 GiB of 64 KiB pages on two levels: 8 MiB of entries in tables of 64 KiB, and one such table above them.
  const std::array<PlannedWindow, 1> levels{PlannedWindow{64_GiB, 16, 2}};
  EXPECT_EQ(charge({.backend = PinningBackend::spapr_v2, .windows = levels}), 2 * ((8_MiB).value + 65536));
  EXPECT_EQ(charge({.backend = PinningBackend::spapr_v1, .memory = 1_MiB, .windows = small}), (2_GiB).value);
}

TEST(Preflight, IoUringChargesHugePagesWhole) {
  EXPECT_EQ(charge({.backend = PinningBackend::io_uring, .memory = 1_MiB}), (1_MiB).value);
  EXPECT_EQ(charge({.backend = PinningBackend::io_uring, .memory = 4_KiB, .os_page = 2_MiB}),
            4096 + 2 * ((2_MiB).value - 4096));
}

TEST(Preflight, RefusesNonsense) {
  const std::array<PlannedWindow, 1> odd{PlannedWindow{Bytes{12345}, 12, 1}};
  EXPECT_EQ(predict_charge({.backend = PinningBackend::spapr_v2, .windows = odd}).error().code, Errc::invalid_argument);
  EXPECT_EQ(predict_charge({.backend = PinningBackend::type1, .memory = Bytes{1ULL << 63}, .spaces = 2}).error().code,
            Errc::overflow);
}

TEST(Preflight, MessageHasNeedLimitUseAndKnob) {
  MemlockState state;
  state.soft_limit = (8_GiB).value;
  state.hard_limit = (8_GiB).value;
  state.locked = 12345;
  const std::array<PlannedUse, 2> uses{PlannedUse{.backend = PinningBackend::type1, .memory = 4_GiB, .spaces = 3},
                                       PlannedUse{.backend = PinningBackend::iommufd, .memory = 1_GiB}};
  const auto refused = preflight(uses, state);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, Errc::memlock_exceeded);
  const std::string text = refused.error().detail();
  for (const char* part :
       {"12884901888", "8589934592", "12345", "RLIMIT_MEMLOCK", "CAP_IPC_LOCK", "VFIO type1", "3 times", "IOAS_COPY"})
    EXPECT_NE(text.find(part), std::string::npos) << part << " is missing in: " << text;
  const auto report = preflight_report(uses, state);
  EXPECT_FALSE(report->books[0].fits);
  EXPECT_TRUE(report->books[2].fits);
  state.exempt = true;
  EXPECT_TRUE(preflight(uses, state));
}

TEST(Preflight, LimitsOfZeroAndUnlimited) {
  const std::array<PlannedUse, 1> uses{PlannedUse{.backend = PinningBackend::io_uring, .memory = 4_KiB}};
  MemlockState state;
  EXPECT_TRUE(preflight(uses, state));
  state.soft_limit = 0;
  EXPECT_FALSE(preflight(uses, state));
  EXPECT_NE(preflight(uses, state).error().detail().find("may do itself"), std::string::npos);
  EXPECT_TRUE(preflight({}, state)) << "a plan that pins nothing needs nothing";
}

TEST(Memlock, ReadsTheKernelsNumbers) {
  const auto state = read_memlock_state();
  ASSERT_TRUE(state) << state.error().message();
  EXPECT_LE(state->soft_limit, state->hard_limit);
}

}  // namespace
}  // namespace iovane::pinning
