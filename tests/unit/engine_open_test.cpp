// Opening engines by name, and the software IOMMU behind the public API.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cstddef>

#include "backends/model/model_kernel.hpp"
#include "backends/open.hpp"
#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"

namespace iovane {
namespace {

using ::testing::HasSubstr;

TEST(EngineOpen, RefusesAnUnknownBackendAndListsTheKnownOnes) {
  EngineConfig config;
  config.backend = "smmu";
  const auto engine = Engine::open(config);
  ASSERT_FALSE(engine);
  EXPECT_EQ(engine.error().code, Errc::invalid_argument);
  EXPECT_THAT(engine.error().detail(), HasSubstr("iommufd"));
}

TEST(EngineOpen, RefusesDescriptorsThatDoNotFit) {
  EngineConfig config;
  config.backend = "type1";
  config.iommu_fd = 0;
  EXPECT_EQ(Engine::open(config).error().code, Errc::invalid_argument);
  config.backend = "model";
  EXPECT_EQ(Engine::open(config).error().code, Errc::invalid_argument);
  config.backend = "auto";
  config.container_fd = 0;
  EXPECT_EQ(Engine::open(config).error().code, Errc::invalid_argument);
}

TEST(EngineOpen, AutoAlwaysFindsSomethingAndSaysWhy) {
  const auto engine = Engine::open();
  ASSERT_TRUE(engine) << engine.error().message();
  EXPECT_FALSE(engine->backend().empty());
  EXPECT_FALSE(engine->reason().empty());
}

class ModelByName : public ::testing::TestWithParam<const char*> {};

TEST_P(ModelByName, MapsAndUnmapsBehindThePublicApi) {
  EngineConfig config;
  config.backend = GetParam();
  auto engine = Engine::open(config);
  ASSERT_TRUE(engine) << engine.error().message();
  EXPECT_EQ(engine->backend(), GetParam());
  auto space = engine->create_address_space();
  ASSERT_TRUE(space) << space.error().message();
  const auto device = space->attach({.pci_address = "0000:00:03.0"});
  ASSERT_TRUE(device) << device.error().message();
  alignas(4096) static std::array<std::byte, 8192> memory;
  MapRequest request;
  request.memory = MemoryPiece::of(memory);
  const Completion mapped = space->map(request);
  ASSERT_TRUE(mapped.ok()) << mapped.error.message();
  const auto found = space->find(Iova{mapped.iova.value + 4096});
  ASSERT_TRUE(found);
  EXPECT_EQ(found->mapping, mapped.mapping);
  const Completion gone = space->unmap(UnmapRequest::of(mapped.mapping));
  ASSERT_TRUE(gone.ok()) << gone.error.message();
  EXPECT_EQ(gone.bytes, Bytes{8192});
}
INSTANTIATE_TEST_SUITE_P(Names, ModelByName,
                         ::testing::Values("model", "model:type1", "model:type1-v1", "model:compat",
                                           "model:compat-v1"));

}  // namespace
}  // namespace iovane
