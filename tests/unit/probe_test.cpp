// The probe, on software hosts that lack one thing each.
#include "backends/probe.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>

#include "backends/model/model_kernel.hpp"
#include "backends/open.hpp"

namespace iovane::backends {
namespace {

using model::ModelKernel;
using model::ModelOptions;

std::unique_ptr<ModelKernel> make_host(const ModelOptions& options = {}) {
  auto made = ModelKernel::create(options);
  EXPECT_TRUE(made) << made.error().message();
  return made ? std::move(*made) : nullptr;
}

const InterfaceReport& report_of(const HostReport& host, Interface interface) {
  return *std::find_if(host.interfaces.begin(), host.interfaces.end(),
                       [&](const InterfaceReport& r) { return r.interface == interface; });
}

TEST(ProbeTest, a_whole_host_offers_everything_and_auto_takes_iommufd) {
  const auto kernel = make_host();
  const auto host = probe_host(*kernel);
  ASSERT_TRUE(host) << host.error().message();
  ASSERT_EQ(host->interfaces.size(), 8U);
  for (const InterfaceReport& interface : host->interfaces) {
    if (interface.interface == Interface::stage1) {
      EXPECT_FALSE(interface.usable);
      EXPECT_FALSE(interface.reason.empty() || interface.cure.empty());
      continue;
    }
    if (interface.interface == Interface::spapr_v2 || interface.interface == Interface::spapr_v1) {
      EXPECT_FALSE(interface.usable);
      EXPECT_NE(interface.reason.find("POWER"), std::string::npos) << interface.reason;
      EXPECT_FALSE(interface.cure.empty());
      continue;
    }
    EXPECT_TRUE(interface.present && interface.usable) << to_string(interface.interface) << ": " << interface.reason;
    EXPECT_TRUE(interface.reason.empty() && interface.cure.empty());
    EXPECT_FALSE(interface.version.empty());
  }
  EXPECT_EQ(host->choice, Interface::iommufd);
  ASSERT_EQ(host->devices.size(), 2U);
  for (const DeviceReport& device : host->devices) {
    EXPECT_TRUE(device.attachable) << device.reason;
    EXPECT_EQ(device.attached_through, Interface::iommufd);
    ASSERT_GE(device.usable.size(), 2U);
    EXPECT_LT(device.usable.back().last, iova_max) << "the aperture was not learnt";
    EXPECT_NE(device.page_sizes & 4096U, 0U);
  }
  EXPECT_EQ(host->groups.size(), 2U);
  const auto copy = std::find_if(host->parity.begin(), host->parity.end(),
                                 [](const ParityLine& l) { return l.capability == Capability::copy_reuses_pin; });
  ASSERT_NE(copy, host->parity.end());
  EXPECT_TRUE(copy->iommufd && !copy->type1 && !copy->compat);
  EXPECT_EQ(kernel->usage(), model::ModelUsage{}) << "the probe left something behind";
}

std::unique_ptr<model::ModelKernel> make_nesting_host(bool viommu, bool coherent,
                                                      model::Nesting nesting = model::Nesting::smmuv3) {
  model::ModelOptions options;
  options.iommus.front().nesting = nesting;
  options.iommus.front().coherent = coherent;
  options.viommu = viommu;
  return *model::ModelKernel::create(options);
}

TEST(ProbeTest, auto_prefers_stage1_where_the_iommu_nests) {
  const auto kernel = make_nesting_host(true, true);
  for (const bool attach : {true, false}) {
    const auto host = probe_host(*kernel, {.attach_devices = attach, .ask_nesting = true});
    ASSERT_TRUE(host);
    EXPECT_EQ(host->choice, Interface::stage1) << host->why;
    EXPECT_NE(host->why.find("store"), std::string::npos) << host->why;
    EXPECT_TRUE(report_of(*host, Interface::stage1).usable) << report_of(*host, Interface::stage1).reason;
    EXPECT_EQ(report_of(*host, Interface::stage1).extensions,
              (std::vector<std::string>{"Arm SMMUv3", "fault records"}));
    EXPECT_TRUE(std::any_of(host->parity.begin(), host->parity.end(), [](const ParityLine& l) {
      return l.capability == Capability::map_is_store && l.stage1 && !l.iommufd;
    }));
  }
  const auto backend = open_backend(*kernel, {});
  ASSERT_TRUE(backend);
  EXPECT_EQ((*backend)->interface(), Interface::stage1);
  const auto untouched = probe_host(*kernel, {.attach_devices = false});
  EXPECT_EQ(untouched->choice, Interface::iommufd) << "nobody may be asked";
  EXPECT_NE(report_of(*untouched, Interface::stage1).reason.find("not asked"), std::string::npos);
}

TEST(ProbeTest, a_host_that_does_not_nest_says_why) {
  struct Case {
    bool viommu, coherent;
    model::Nesting nesting;
    const char* word;
  };
  for (const Case& c :
       {Case{false, true, model::Nesting::smmuv3, "6.13"}, Case{true, false, model::Nesting::smmuv3, "coherent"},
        Case{true, true, model::Nesting::amd, "AMD"},
        Case{true, true, model::Nesting::none, "first stage is not known"}}) {
    const auto kernel = make_nesting_host(c.viommu, c.coherent, c.nesting);
    const auto host = probe_host(*kernel);
    ASSERT_TRUE(host);
    const InterfaceReport& stage1 = report_of(*host, Interface::stage1);
    EXPECT_FALSE(stage1.usable);
    EXPECT_NE(stage1.reason.find(c.word), std::string::npos) << stage1.reason;
    EXPECT_EQ(host->choice, Interface::iommufd);
    EXPECT_EQ(kernel->usage(), model::ModelUsage{});
  }
}

TEST(ProbeTest, without_attaching_nothing_is_touched) {
  const auto kernel = make_host();
  const auto host = probe_host(*kernel, {.attach_devices = false});
  ASSERT_TRUE(host);
  EXPECT_EQ(host->choice, Interface::iommufd);
  for (const DeviceReport& device : host->devices) {
    EXPECT_FALSE(device.attached_through.has_value());
    EXPECT_EQ(device.usable.back().last, iova_max);
  }
}

TEST(ProbeTest, a_missing_interface_is_explained_and_type1_taken) {
  ModelOptions options;
  options.iommufd = false;
  const auto kernel = make_host(options);
  const auto host = probe_host(*kernel);
  ASSERT_TRUE(host);
  const InterfaceReport& iommufd = report_of(*host, Interface::iommufd);
  EXPECT_FALSE(iommufd.present || iommufd.usable);
  EXPECT_NE(iommufd.reason.find("/dev/iommu"), std::string::npos);
  EXPECT_NE(iommufd.cure.find("CONFIG_IOMMUFD"), std::string::npos);
  EXPECT_EQ(host->choice, Interface::type1_v2);
  EXPECT_NE(host->why.find("iommufd"), std::string::npos) << host->why;
  EXPECT_GT(host->devices[0].entries_max, 0U);
}

TEST(ProbeTest, permission_is_explained) {
  const auto kernel = make_host();
  kernel->injection().deny("/dev/iommu", EACCES);
  kernel->injection().deny("/dev/vfio/vfio", EACCES);
  const auto host = probe_host(*kernel);
  ASSERT_TRUE(host);
  for (const InterfaceReport& interface : host->interfaces) {
    EXPECT_TRUE(interface.present);
    EXPECT_FALSE(interface.usable);
    EXPECT_NE(interface.cure.find("root"), std::string::npos) << interface.cure;
  }
  EXPECT_FALSE(host->choice.has_value());
  EXPECT_NE(host->why.find("software IOMMU"), std::string::npos) << host->why;
  const auto opened = open_backend(*kernel, {});
  EXPECT_EQ(opened.error().code, Errc::no_device);
}

TEST(ProbeTest, a_device_with_a_host_driver_names_it) {
  ModelOptions options;
  options.devices = {model::DeviceOptions{.address = "0000:01:00.0", .driver = "nvme", .reserved = {}}};
  const auto kernel = make_host(options);
  const auto host = probe_host(*kernel);
  ASSERT_TRUE(host);
  ASSERT_EQ(host->devices.size(), 1U);
  EXPECT_FALSE(host->devices[0].attachable);
  EXPECT_NE(host->devices[0].reason.find("nvme"), std::string::npos);
  EXPECT_NE(host->devices[0].cure.find("driver_override"), std::string::npos);
  EXPECT_FALSE(host->groups[0].viable);
  EXPECT_FALSE(host->choice.has_value());
  EXPECT_FALSE(report_of(*host, Interface::iommufd).reason.empty());
}

TEST(ProbeTest, a_group_shared_with_a_host_driver_is_not_viable) {
  ModelOptions options;
  options.devices = {model::DeviceOptions{.address = "0000:01:00.0", .group = 5},
                     model::DeviceOptions{.address = "0000:01:00.1", .group = 5, .driver = "e1000e"}};
  const auto kernel = make_host(options);
  const auto host = probe_host(*kernel);
  ASSERT_TRUE(host);
  EXPECT_FALSE(host->devices[0].attachable);
  EXPECT_NE(host->devices[0].reason.find("group 5"), std::string::npos) << host->devices[0].reason;
}

TEST(ProbeTest, a_device_in_use_is_reported_and_left_alone) {
  const auto kernel = make_host();
  const auto backend = open_backend(*kernel, {.name = "type1"});
  ASSERT_TRUE(backend);
  const auto space = (*backend)->create_space({});
  const auto attached = (*space)->attach({.pci_address = kernel->device(0).address()});
  ASSERT_TRUE(attached);
  const auto host = probe_host(*kernel);
  ASSERT_TRUE(host);
  EXPECT_FALSE(host->devices[0].attached_through.has_value());
  EXPECT_FALSE(host->devices[0].reason.empty());
  EXPECT_EQ(host->devices[1].attached_through, Interface::iommufd);
  EXPECT_TRUE((*space)->detach(attached->id));
}

TEST(OpenTest, names_are_checked) {
  const auto kernel = make_host();
  for (const char* name : {"auto", "iommufd", "type1", "type1-v1", "compat", "compat-v1", "stage1"}) {
    const auto opened = open_backend(*kernel, {.name = name});
    EXPECT_TRUE(opened) << name << ": " << opened.error().message();
  }
  const auto unknown = open_backend(*kernel, {.name = "iommu"});
  EXPECT_EQ(unknown.error().code, Errc::invalid_argument);
  EXPECT_NE(unknown.error().detail().find("type1-v1"), std::string::npos) << unknown.error().detail();
  EXPECT_EQ(open_backend(*kernel, {.name = "auto", .descriptor = {.fd = 3, .duplicate = false}}).error().code,
            Errc::invalid_argument);
  EXPECT_EQ(kernel->usage(), model::ModelUsage{});
}

}  // namespace
}  // namespace iovane::backends
