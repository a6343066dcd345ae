#include "backends/open.hpp"

#include <array>

#include "backends/iommufd/iommufd_backend.hpp"
#include "backends/probe.hpp"
#include "backends/spapr_tce/spapr_backend.hpp"
#include "backends/stage1/stage1_backend.hpp"
#include "backends/type1/type1_backend.hpp"
#include "base/error_text.hpp"

namespace iovane::backends {
namespace {

constexpr std::array kernel_interfaces{Interface::iommufd,   Interface::type1_v2,  Interface::type1_v1,
                                       Interface::compat_v2, Interface::compat_v1, Interface::spapr_v2,
                                       Interface::spapr_v1,  Interface::stage1};

Result<std::unique_ptr<Backend>> open_interface(Kernel& kernel, Interface interface, const DescriptorSource& source) {
  if (interface == Interface::iommufd) return open_iommufd(kernel, source);
  if (interface == Interface::stage1) return open_stage1(kernel, source);
  if (interface == Interface::spapr_v2 || interface == Interface::spapr_v1)
    return open_spapr(kernel, interface, source);
  return open_type1(kernel, interface, source);
}

Result<std::unique_ptr<Backend>> open_auto(Kernel& kernel) {
  const auto report = probe_host(kernel, {.attach_devices = false, .ask_nesting = true});
  if (!report) return report.error();
  if (report->choice) return open_interface(kernel, *report->choice, {});
  return base::fail(Errc::no_device, Stage::open, 0, "{}", report->why);
}

}  // namespace

Result<Interface> parse_interface(std::string_view name) {
  std::string known;
  for (const Interface interface : kernel_interfaces) {
    if (to_string(interface) == name) return interface;
    known.append(known.empty() ? "" : ", ").append(to_string(interface));
  }
  return base::fail(Errc::invalid_argument, Stage::open, 0, "there is no backend '{}'; there are: {}", name, known);
}

Result<std::unique_ptr<Backend>> open_backend(Kernel& kernel, const BackendChoice& choice) {
  if (choice.name == "auto" && choice.descriptor.fd < 0) return open_auto(kernel);
  if (choice.name == "auto")
    return base::fail(Errc::invalid_argument, Stage::open, 0,
                      "with a descriptor handed in, name its interface: 'auto' does not guess what descriptor {} is",
                      choice.descriptor.fd);
  const auto interface = parse_interface(choice.name);
  if (!interface) return interface.error();
  return open_interface(kernel, *interface, choice.descriptor);
}

}  // namespace iovane::backends
