#include <fcntl.h>
#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>

#include "model_support.hpp"

namespace iovane::backends::model {
namespace {

constexpr std::uint64_t k4 = 4096;
constexpr std::uint64_t u64_max = ~0ULL;

class Iommufd : public ::testing::Test {
 protected:
  explicit Iommufd(const ModelOptions& options = {}) : host{make_host(options)}, user{*host}, cdev{*host, 0} {
    ioas = user.ioas();
    EXPECT_EQ(cdev.bind(user.fd), 0);
  }
  void TearDown() override {
    cdev.close();
    user.close();
    EXPECT_EQ(host->usage(), ModelUsage{}) << "something was not given back";
  }
  bool device_reads(std::uint64_t iova, const std::byte* expected, std::size_t bytes) {
    std::vector<std::byte> got(bytes);
    return host->device(0).dma_read(Iova{iova}, got).ok() && std::memcmp(got.data(), expected, bytes) == 0;
  }
  bool reachable(std::uint64_t iova) {
    std::byte b{};
    return host->device(0).dma_read(Iova{iova}, {&b, 1}).ok();
  }
  std::unique_ptr<ModelKernel> host;
  IommufdUser user;
  CdevUser cdev;
  std::uint32_t ioas = 0;
};

TEST_F(Iommufd, MapsMemoryForADeviceAndTakesItAway) {
  TestMemory memory{4 * k4};
  const auto data = pattern(memory.size(), 1);
  std::memcpy(memory.data(), data.data(), data.size());
  ASSERT_EQ(user.map(ioas, 0x100000, memory.address(), memory.size()), 0);
  EXPECT_FALSE(reachable(0x100000)) << "not attached yet";
  EXPECT_EQ(host->usage().pinned, Bytes{0}) << "nothing is pinned before a table exists";
  ASSERT_EQ(cdev.attach(ioas), 0);
  EXPECT_NE(cdev.hwpt, ioas);
  EXPECT_EQ(host->usage().pinned, Bytes{4 * k4});
  EXPECT_EQ(host->usage().charged_user, Bytes{4 * k4});
  EXPECT_TRUE(device_reads(0x100000, data.data(), data.size()));
  ASSERT_EQ(user.unmap(ioas, 0x100000, memory.size()), 0);
  EXPECT_EQ(user.unmapped, memory.size());
  EXPECT_FALSE(reachable(0x100000));
  EXPECT_EQ(host->usage().pinned, Bytes{0});
}

}  // namespace
}  // namespace iovane::backends::model
