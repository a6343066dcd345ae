// The probe on a host that has everything: what it reports is what an attach then finds.
#include <gtest/gtest.h>

#include <algorithm>

#include "backends/open.hpp"
#include "backends/probe.hpp"
#include "conformance/machine.hpp"

namespace iovane::test {
namespace {

using namespace backends;

TEST(HostProbe, a_power_host_has_spapr_and_says_why_nothing_else) {
  if (!machine_can_have(Interface::spapr_v2)) GTEST_SKIP() << "no POWER host";
  const auto machine = make_machine({.interface = Interface::spapr_v2, .memlock = {}});
  ASSERT_NE(machine, nullptr);
  const auto host = probe_host(machine->kernel());
  ASSERT_TRUE(host) << host.error().message();
  EXPECT_EQ(host->choice, Interface::spapr_v2) << host->why;
  for (const InterfaceReport& interface : host->interfaces) {
    const bool spapr = interface.interface == Interface::spapr_v1 || interface.interface == Interface::spapr_v2;
    EXPECT_EQ(interface.usable, spapr) << to_string(interface.interface) << ": " << interface.reason;
    EXPECT_EQ(interface.usable, interface.reason.empty());
  }
  for (const std::string& address : machine->devices()) {
    const auto reported = std::find_if(host->devices.begin(), host->devices.end(),
                                       [&](const DeviceReport& d) { return d.pci.address == address; });
    ASSERT_NE(reported, host->devices.end()) << address;
    EXPECT_TRUE(reported->attachable) << reported->reason;
    EXPECT_EQ(reported->attached_through, Interface::spapr_v2);
    EXPECT_EQ(reported->usable.size(), 1U) << "the default window";
    EXPECT_EQ(reported->iommu, "sPAPR TCE");
  }
}

TEST(HostProbe, reports_what_an_attach_then_finds) {
  if (!machine_can_have(Interface::iommufd)) GTEST_SKIP() << "this host has no iommufd";
  const auto machine = make_machine();
  ASSERT_NE(machine, nullptr);
  const auto host = probe_host(machine->kernel());
  ASSERT_TRUE(host) << host.error().message();
  for (const InterfaceReport& interface : host->interfaces) {
    const bool spapr = interface.interface == Interface::spapr_v1 || interface.interface == Interface::spapr_v2;
    // Whether the IOMMU nests is the machine's matter, and told by the attach alone.
    if (interface.interface != Interface::stage1) {
      EXPECT_EQ(interface.usable, machine_can_have(interface.interface) && !spapr)
          << to_string(interface.interface) << ": " << interface.reason;
    }
    EXPECT_EQ(interface.usable, interface.reason.empty());
  }
  if (host->choice == Interface::stage1) GTEST_SKIP() << "this host nests: what follows is about iommufd";
  EXPECT_EQ(host->choice, Interface::iommufd) << host->why;

  const auto backend = open_backend(machine->kernel(), {});
  ASSERT_TRUE(backend) << backend.error().message();
  EXPECT_EQ((*backend)->interface(), Interface::iommufd);
  for (const std::string& address : machine->devices()) {
    const auto reported = std::find_if(host->devices.begin(), host->devices.end(),
                                       [&](const DeviceReport& d) { return d.pci.address == address; });
    ASSERT_NE(reported, host->devices.end()) << address;
    EXPECT_TRUE(reported->attachable) << reported->reason;
    EXPECT_FALSE(reported->pci.cdev.empty());
    ASSERT_TRUE(reported->attached_through.has_value()) << reported->reason;
    const auto space = (*backend)->create_space({});
    ASSERT_TRUE(space) << space.error().message();
    const auto attached = (*space)->attach({.pci_address = address});
    ASSERT_TRUE(attached) << attached.error().message();
    EXPECT_EQ(reported->usable, (*space)->usable_ranges().value_or(std::vector<IovaRange>{}));
    EXPECT_EQ(reported->page_sizes, (*space)->facts().page_sizes);
    EXPECT_NE(reported->page_sizes, 0U);
    EXPECT_EQ(reported->iommu, attached->iommu);
    EXPECT_EQ(reported->pci.reserved, attached->reserved);
  }
}

}  // namespace
}  // namespace iovane::test
