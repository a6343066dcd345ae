#include "base/topology.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace iovane::base {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using namespace iovane::literals;

std::vector<unsigned> cpus(const Topology& topology, unsigned node) {
  return {topology.cpus_of(node).begin(), topology.cpus_of(node).end()};
}

std::vector<unsigned> allowed_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  EXPECT_EQ(sched_getaffinity(0, sizeof(set), &set), 0);
  std::vector<unsigned> result;
  for (unsigned cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) result.push_back(cpu);
  }
  return result;
}

TEST(Topology, ThisMachineHasANodeAndTheCpuWeRunOn) {
  const Topology topology = Topology::load();
  ASSERT_GE(topology.node_count(), 1U);
  const unsigned node = topology.current_node();
  ASSERT_LT(node, topology.node_count());
  std::size_t total = 0;
  for (unsigned n = 0; n < topology.node_count(); ++n) {
    total += topology.cpus_of(n).size();
    EXPECT_TRUE(std::is_sorted(topology.cpus_of(n).begin(), topology.cpus_of(n).end()));
  }
  EXPECT_GE(total, allowed_cpus().size());
}

TEST(Topology, EveryCpuBelongsToANodeThatListsIt) {
  const Topology topology = Topology::load();
  for (const unsigned cpu : allowed_cpus()) {
    EXPECT_THAT(cpus(topology, topology.node_of_cpu(cpu)), testing::Contains(cpu));
  }
}

TEST(Topology, AFlatOneHasOneNodeWithTheAllowedCpus) {
  const Topology topology = Topology::flat();
  EXPECT_EQ(topology.node_count(), 1U);
  EXPECT_EQ(cpus(topology, 0), allowed_cpus());
  EXPECT_EQ(topology.current_node(), 0U);
  EXPECT_TRUE(topology.pin_this_thread(0));
  EXPECT_TRUE(topology.bind_memory(nullptr, 4_KiB, 0));
}

TEST(Topology, AMadeUpMachineHasTheNodesItSays) {
  const auto topology = Topology::synthetic("NUMANode:2 Core:2 PU:2");
  ASSERT_TRUE(topology) << topology.error().message();
  EXPECT_EQ(topology->node_count(), 2U);
  EXPECT_THAT(cpus(*topology, 0), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(cpus(*topology, 1), ElementsAre(4, 5, 6, 7));
  EXPECT_EQ(topology->node_of_cpu(3), 0U);
  EXPECT_EQ(topology->node_of_cpu(4), 1U);
  EXPECT_EQ(topology->node_of_cpu(1'000'000), 0U);
}

// Memory beside memory: both nodes are local to the same CPUs.
TEST(Topology, CpusSharedByTwoNodesCountAsTheFirstOnes) {
  const auto topology = Topology::synthetic("[numa] [numa] Core:2 PU:1");
  ASSERT_TRUE(topology) << topology.error().message();
  ASSERT_EQ(topology->node_count(), 2U);
  EXPECT_EQ(topology->node_of_cpu(0), 0U);
  EXPECT_EQ(topology->node_of_cpu(1), 0U);
}

TEST(Topology, RefusesADescriptionThatMeansNothing) {
  const auto topology = Topology::synthetic("two nodes, please");
  ASSERT_FALSE(topology);
  EXPECT_EQ(topology.error().code, Errc::invalid_argument);
  EXPECT_THAT(topology.error().detail(), HasSubstr("two nodes, please"));
}

TEST(Topology, RefusesNodesThatDoNotExist) {
  const Topology topology = Topology::load();
  EXPECT_EQ(topology.pin_this_thread(topology.node_count()).error().code, Errc::not_found);
  EXPECT_EQ(topology.bind_memory(nullptr, 4_KiB, topology.node_count()).error().code, Errc::not_found);
}

TEST(Topology, PinsAThreadToTheCpusOfANode) {
  const Topology topology = Topology::load();
  std::thread{[&] {
    const unsigned node = topology.current_node();
    const auto pinned = topology.pin_this_thread(node);
    if (!pinned && pinned.error().code == Errc::permission) GTEST_SKIP() << pinned.error().message();
    ASSERT_TRUE(pinned) << pinned.error().message();
    for (const unsigned cpu : allowed_cpus()) EXPECT_THAT(cpus(topology, node), testing::Contains(cpu));
    EXPECT_EQ(topology.current_node(), node);
  }}.join();
}

TEST(Topology, BindsMemoryOnEveryNode) {
  const Topology topology = Topology::load();
  constexpr std::size_t length = 1 << 16;
  for (unsigned node = 0; node < topology.node_count(); ++node) {
    void* memory = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(memory, MAP_FAILED);
    const auto bound = topology.bind_memory(memory, Bytes{length}, node);
    static_cast<unsigned char*>(memory)[0] = 1;
    EXPECT_EQ(munmap(memory, length), 0);
    if (!bound && bound.error().code == Errc::permission) GTEST_SKIP() << bound.error().message();
    EXPECT_TRUE(bound) << bound.error().message();
  }
}

}  // namespace
}  // namespace iovane::base
