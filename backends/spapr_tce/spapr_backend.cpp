#include "backends/spapr_tce/spapr_backend.hpp"

#include "backends/spapr_tce/registered_memory.hpp"
#include "backends/spapr_tce/spapr_space.hpp"
#include "backends/uapi/vfio.hpp"
#include "base/error_text.hpp"

namespace iovane::backends {
namespace spapr {
namespace {

constexpr const char* container_path = "/dev/vfio/vfio";

class SpaprBackend final : public Backend {
 public:
  SpaprBackend(Kernel& kernel, Interface interface, KernelFd container, bool handed_in)
      : kernel_{kernel}, interface_{interface}, first_{std::move(container)}, handed_in_{handed_in} {}

  Interface interface() const noexcept override { return interface_; }

  Result<std::unique_ptr<BackendSpace>> create_space(const SpaceOptions& options) override {
    if (options.dirty_tracking)
      return base::fail(Errc::unsupported, Stage::open, 0, "sPAPR containers do not record what devices write");
    auto container = next_container();
    if (!container) return container.error();
    return std::unique_ptr<BackendSpace>{
        std::make_unique<SpaprSpace>(kernel_, std::move(*container), interface_, memory_, options)};
  }

  Result<AttachedDevice> move_device(BackendSpace&, DeviceId, BackendSpace&) override {
    return base::fail(
        Errc::unsupported, Stage::attach, 0,
        "a group cannot move between containers while it is in use; detach the device and attach it again");
  }

 private:
  /// The descriptor that opening checked serves the first space; later ones get their own.
  Result<KernelFd> next_container() {
    if (first_) return std::move(first_);
    if (handed_in_)
      return base::fail(Errc::limit_reached, Stage::open, 0,
                        "the container that was handed in is one address space; hand in another for the next");
    return open_descriptor(kernel_, container_path, {});
  }

  Kernel& kernel_;
  Interface interface_;
  KernelFd first_;
  bool handed_in_;
  ProcessMemory memory_;
};

}  // namespace
}  // namespace spapr

Result<std::unique_ptr<Backend>> open_spapr(Kernel& kernel, Interface interface, const DescriptorSource& source) {
  if (interface != Interface::spapr_v1 && interface != Interface::spapr_v2)
    return base::fail(Errc::invalid_argument, Stage::open, 0, "{} is not a sPAPR interface", to_string(interface));
  auto container = open_descriptor(kernel, spapr::container_path, source);
  if (!container) return container.error();
  const long version = kernel.ioctl_value(container->get(), uapi::vfio::get_api_version, 0);
  if (version != uapi::vfio::api_version)
    return base::fail(Errc::unsupported, Stage::open, version < 0 ? static_cast<int>(-version) : 0,
                      "descriptor {} does not speak VFIO's container interface version {} (answer {})",
                      container->get(), uapi::vfio::api_version, version);
  const unsigned long type =
      interface == Interface::spapr_v1 ? uapi::vfio::spapr_tce_iommu : uapi::vfio::spapr_tce_v2_iommu;
  if (kernel.ioctl_value(container->get(), uapi::vfio::check_extension, type) != 1)
    return base::fail(Errc::unsupported, Stage::open, 0,
                      "the container has no {} IOMMU driver; on POWER, load vfio_iommu_spapr_tce (elsewhere there is "
                      "none)",
                      to_string(interface));
  return std::unique_ptr<Backend>{
      std::make_unique<spapr::SpaprBackend>(kernel, interface, std::move(*container), source.fd >= 0)};
}

}  // namespace iovane::backends
