#include "backends/type1/type1_backend.hpp"

#include <cerrno>

#include "backends/container_supply.hpp"
#include "backends/iommufd/ioas_calls.hpp"
#include "backends/kernel_error.hpp"
#include "backends/sysfs_inventory.hpp"
#include "backends/type1/type1_space.hpp"
#include "backends/uapi/iommufd.hpp"
#include "backends/uapi/vfio.hpp"
#include "base/error_text.hpp"

namespace iovane::backends {
namespace type1 {
namespace {

namespace uapi = backends::uapi::vfio;

constexpr bool is_compat(Interface interface) noexcept {
  return interface == Interface::compat_v1 || interface == Interface::compat_v2;
}
constexpr bool is_version_1(Interface interface) noexcept {
  return interface == Interface::type1_v1 || interface == Interface::compat_v1;
}

class Type1Backend final : public Backend {
 public:
  Type1Backend(Kernel& kernel, Interface interface, ContainerSupply containers)
      : kernel_{kernel}, interface_{interface}, containers_{std::move(containers)} {}

  Interface interface() const noexcept override { return interface_; }

  Result<std::unique_ptr<BackendSpace>> create_space(const SpaceOptions& options) override {
    if (options.page_faults)
      return base::fail(Errc::unsupported, Stage::open, 0, "{} does not deliver I/O page faults; only iommufd does",
                        to_string(interface_));
    auto container = containers_.next();
    if (!container) return container.error();
    std::uint32_t ioas = 0;
    if (is_compat(interface_)) {
      const auto made = make_compat_ioas(container->get(), options);
      if (!made) return made.error();
      ioas = *made;
    }
    return std::unique_ptr<BackendSpace>{
        std::make_unique<Type1Space>(kernel_, std::move(*container), interface_, ioas, options)};
  }

  Result<AttachedDevice> move_device(BackendSpace&, DeviceId, BackendSpace&) override {
    return cannot_move_between_containers();
  }

  std::vector<IovaRange> reserved_by(const DeviceSource& source) override {
    return reserved_of(kernel_, source.pci_address);
  }

 private:
  /// On /dev/iommu the container calls act on the descriptor's compatibility IOAS; making it here instead of with the
  /// first group means that maps are accepted before a device is there. Whatever fails, closing the descriptor undoes.
  Result<std::uint32_t> make_compat_ioas(int fd, const SpaceOptions& options) {
    const auto ioas = iommufd::ioas_alloc(kernel_, fd);
    if (!ioas) return ioas.error();
    const auto ready = prepare_compat_ioas(fd, *ioas, options);
    if (ready) return *ioas;
    iommufd::destroy(kernel_, fd, *ioas);
    return ready.error();
  }

  Result<void> prepare_compat_ioas(int fd, std::uint32_t ioas, const SpaceOptions& options) {
    backends::uapi::iommufd::VfioIoas use{.ioas_id = ioas, .op = backends::uapi::iommufd::vfio_ioas_set};
    if (const int why = call(kernel_, fd, use); why != 0) return explain_call(Stage::open, "VFIO_IOAS(SET)", why);
    const unsigned long type = is_version_1(interface_) ? uapi::type1_iommu : uapi::type1_v2_iommu;
    if (const int why = errno_of(kernel_.ioctl_value(fd, uapi::set_iommu, type)); why != 0)
      return explain_call(Stage::open, "VFIO_SET_IOMMU", why);
    if (!options.large_iopte && !is_version_1(interface_)) return iommufd::ioas_disable_large_ioptes(kernel_, fd, ioas);
    return {};
  }

  Kernel& kernel_;
  Interface interface_;
  ContainerSupply containers_;
};

}  // namespace
}  // namespace type1

Result<std::unique_ptr<Backend>> open_type1(Kernel& kernel, Interface interface, const DescriptorSource& source) {
  const bool compat = type1::is_compat(interface);
  if (!compat && interface != Interface::type1_v1 && interface != Interface::type1_v2)
    return base::fail(Errc::invalid_argument, Stage::open, 0, "{} is not a type1 interface", to_string(interface));
  auto containers = ContainerSupply::open(kernel, compat ? "/dev/iommu" : "/dev/vfio/vfio", source);
  if (!containers) return containers.error();
  const unsigned long type = type1::is_version_1(interface) ? uapi::vfio::type1_iommu : uapi::vfio::type1_v2_iommu;
  if (kernel.ioctl_value(containers->fd(), uapi::vfio::check_extension, type) != 1)
    return base::fail(Errc::unsupported, Stage::open, 0, "the container has no {} IOMMU driver; load vfio_iommu_type1",
                      to_string(interface));
  return std::unique_ptr<Backend>{std::make_unique<type1::Type1Backend>(kernel, interface, *std::move(containers))};
}

}  // namespace iovane::backends
