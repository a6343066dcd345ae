// The statistics page: what an engine writes is what another process would read.
#include "engine/stats_page.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"

namespace iovane::engine {
namespace {

class StatsPageTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "iovane-stats-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  std::string path() const { return (folder_ / "page").string(); }

  std::filesystem::path folder_;
};

TEST_F(StatsPageTest, AnAddressSpacesCountersAreInTheFileWhileItLives) {
  EngineConfig config;
  config.backend = "model";
  config.stats_page = path();
  auto engine = Engine::open(config);
  ASSERT_TRUE(engine) << engine.error().message();
  struct stat about {};
  ASSERT_EQ(::stat(path().c_str(), &about), 0);
  EXPECT_EQ(about.st_mode & 0777U, 0600U);
  ASSERT_EQ(static_cast<std::size_t>(about.st_size), StatsPage::file_bytes);
  EXPECT_GE(static_cast<std::size_t>(about.st_blocks) * 512, StatsPage::file_bytes)
      << "a counter in a full file system would end the process (SIGBUS)";

  const int file = ::open(path().c_str(), O_RDONLY | O_CLOEXEC);
  void* const memory = ::mmap(nullptr, StatsPage::file_bytes, PROT_READ, MAP_SHARED, file, 0);
  ::close(file);
  ASSERT_NE(memory, MAP_FAILED);
  const auto& header = *static_cast<const StatsPageHeader*>(memory);
  EXPECT_EQ(header.magic, StatsPageHeader::magic_value);
  EXPECT_EQ(header.process, static_cast<std::uint32_t>(::getpid()));
  const auto& slot =
      *reinterpret_cast<const StatsSlot*>(static_cast<const std::byte*>(memory) + StatsPage::header_bytes);
  EXPECT_EQ(slot.state.load(std::memory_order_acquire), 0U);
  {
    AddressSpaceConfig space_config;
    space_config.name = "a name that is longer than there is room for in a slot of the page";
    auto space = engine->create_address_space(space_config);
    ASSERT_TRUE(space);
    (void)space->unmap(UnmapRequest::of(IovaRange{Iova{0x1000}, Iova{0x1fff}}));
    EXPECT_EQ(slot.state.load(std::memory_order_acquire), 1U);
    EXPECT_EQ(std::string{slot.name.data()}, space_config.name.substr(0, 47));
    EXPECT_STREQ(slot.backend.data(), "model");
    EXPECT_EQ(stats_of(slot.counters).failures, 1U);
    EXPECT_EQ(space->stats().failures, 1U) << "the same counters";
  }
  EXPECT_EQ(slot.state.load(std::memory_order_acquire), 0U);
  ::munmap(memory, StatsPage::file_bytes);
  engine = Engine{};
  EXPECT_FALSE(std::filesystem::exists(path()));
}

TEST_F(StatsPageTest, MoreAddressSpacesThanSlotsCountForThemselves) {
  auto page = *StatsPage::create(path());
  for (std::uint32_t i = 0; i < StatsPage::slots_max; ++i) ASSERT_NE(page->acquire("space", "model"), nullptr);
  EXPECT_EQ(page->acquire("space", "model"), nullptr);
}

TEST_F(StatsPageTest, AFileThatExistsIsNotTouched) {
  std::ofstream{path()} << "mine";
  EngineConfig config;
  config.backend = "model";
  config.stats_page = path();
  const auto engine = Engine::open(config);
  ASSERT_FALSE(engine);
  EXPECT_NE(engine.error().detail().find(path()), std::string::npos) << engine.error().message();
  std::string content;
  std::ifstream{path()} >> content;
  EXPECT_EQ(content, "mine");
}

/// A process of the same number was killed and left its page: in a container that starts anew, the usual case.
TEST_F(StatsPageTest, AnAutomaticNameThatIsTakenIsPassedOver) {
  const auto first = *StatsPage::create("auto");
  const std::size_t dot = first->path().rfind('.');
  const auto number = std::stoul(first->path().substr(dot + 1));
  const std::string taken = first->path().substr(0, dot + 1) + std::to_string(number + 1);
  std::ofstream{taken} << "left behind";
  const auto second = StatsPage::create("auto");
  EXPECT_EQ(std::filesystem::file_size(taken), 11U) << "another's file is not touched";
  std::filesystem::remove(taken);
  ASSERT_TRUE(second) << second.error().message();
  EXPECT_NE((*second)->path(), taken);
}

TEST_F(StatsPageTest, EveryCounterHasAName) {
  for (std::size_t i = 0; i < count_kinds; ++i) EXPECT_NE(to_string(static_cast<Count>(i)), "unknown");
}

}  // namespace
}  // namespace iovane::engine
