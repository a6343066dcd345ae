#include "backends/spapr_tce/spapr_backend.hpp"

#include "backends/container_supply.hpp"
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
  SpaprBackend(Kernel& kernel, Interface interface, ContainerSupply containers)
      : kernel_{kernel}, interface_{interface}, containers_{std::move(containers)} {}

  Interface interface() const noexcept override { return interface_; }

  Result<std::unique_ptr<BackendSpace>> create_space(const SpaceOptions& options) override {
    if (options.dirty_tracking)
      return base::fail(Errc::unsupported, Stage::open, 0, "sPAPR containers do not record what devices write");
    auto container = containers_.next();
    if (!container) return container.error();
    return std::unique_ptr<BackendSpace>{
        std::make_unique<SpaprSpace>(kernel_, std::move(*container), interface_, memory_, options)};
  }

  Result<AttachedDevice> move_device(BackendSpace&, DeviceId, BackendSpace&) override {
    return cannot_move_between_containers();
  }

 private:
  Kernel& kernel_;
  Interface interface_;
  ContainerSupply containers_;
  ProcessMemory memory_;
};

}  // namespace
}  // namespace spapr

Result<std::unique_ptr<Backend>> open_spapr(Kernel& kernel, Interface interface, const DescriptorSource& source) {
  if (interface != Interface::spapr_v1 && interface != Interface::spapr_v2)
    return base::fail(Errc::invalid_argument, Stage::open, 0, "{} is not a sPAPR interface", to_string(interface));
  auto containers = ContainerSupply::open(kernel, spapr::container_path, source);
  if (!containers) return containers.error();
  const unsigned long type =
      interface == Interface::spapr_v1 ? uapi::vfio::spapr_tce_iommu : uapi::vfio::spapr_tce_v2_iommu;
  if (kernel.ioctl_value(containers->fd(), uapi::vfio::check_extension, type) != 1)
    return base::fail(Errc::unsupported, Stage::open, 0,
                      "the container has no {} IOMMU driver; on POWER, load vfio_iommu_spapr_tce (elsewhere there is "
                      "none)",
                      to_string(interface));
  return std::unique_ptr<Backend>{std::make_unique<spapr::SpaprBackend>(kernel, interface, *std::move(containers))};
}

}  // namespace iovane::backends
