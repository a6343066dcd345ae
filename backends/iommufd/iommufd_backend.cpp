#include "backends/iommufd/iommufd_backend.hpp"

#include <cerrno>

#include "backends/iommufd/ioas_calls.hpp"
#include "backends/iommufd/iommufd_space.hpp"
#include "backends/sysfs_inventory.hpp"
#include "base/error_text.hpp"

namespace iovane::backends {
namespace iommufd {
namespace {

class IommufdBackend final : public Backend {
 public:
  IommufdBackend(Kernel& kernel, KernelFd fd, bool exclusive) : shared_{kernel, std::move(fd), exclusive} {}

  Interface interface() const noexcept override { return Interface::iommufd; }

  Result<std::unique_ptr<BackendSpace>> create_space(const SpaceOptions& options) override {
    const auto ioas = ioas_alloc(shared_.kernel(), shared_.fd());
    if (!ioas) return ioas.error();
    // From here on the space owns the IOAS.
    auto space = std::make_unique<IommufdSpace>(shared_, *ioas, options);
    if (!options.large_iopte) {
      if (const auto off = ioas_disable_large_ioptes(shared_.kernel(), shared_.fd(), *ioas); !off) return off.error();
    }
    return std::unique_ptr<BackendSpace>{std::move(space)};
  }

  Result<AttachedDevice> move_device(BackendSpace& from, DeviceId device, BackendSpace& to) override {
    auto* const source = dynamic_cast<IommufdSpace*>(&from);
    auto* const target = dynamic_cast<IommufdSpace*>(&to);
    if (source == nullptr || target == nullptr || source->shared() != &shared_ || target->shared() != &shared_)
      return base::fail(Errc::invalid_argument, Stage::attach, 0,
                        "a device can only move between two spaces of the same /dev/iommu descriptor");
    return target->take_over(*source, device);
  }

  std::vector<IovaRange> reserved_by(const DeviceSource& source) override {
    return reserved_of(shared_.kernel(), source.pci_address);
  }

 private:
  SharedDescriptor shared_;
};

}  // namespace
}  // namespace iommufd

Result<std::unique_ptr<Backend>> open_iommufd(Kernel& kernel, const DescriptorSource& source) {
  auto fd = open_descriptor(kernel, "/dev/iommu", source);
  if (!fd) return fd.error();
  const auto probe = iommufd::ioas_alloc(kernel, fd->get());
  if (!probe && probe.error().os_errno == ENOTTY)
    return base::fail(Errc::unsupported, Stage::open, ENOTTY, "descriptor {} is not an iommufd", fd->get());
  if (!probe) return probe.error();
  iommufd::destroy(kernel, fd->get(), *probe);
  return std::unique_ptr<Backend>{std::make_unique<iommufd::IommufdBackend>(kernel, std::move(*fd), source.fd < 0)};
}

}  // namespace iovane::backends
