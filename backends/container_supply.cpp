#include "backends/container_supply.hpp"

#include "backends/uapi/vfio.hpp"
#include "base/error_text.hpp"

namespace iovane::backends {

Result<ContainerSupply> ContainerSupply::open(Kernel& kernel, const char* path, const DescriptorSource& source) {
  auto container = open_descriptor(kernel, path, source);
  if (!container) return container.error();
  const long version = kernel.ioctl_value(container->get(), uapi::vfio::get_api_version, 0);
  if (version != uapi::vfio::api_version)
    return base::fail(Errc::unsupported, Stage::open, version < 0 ? static_cast<int>(-version) : 0,
                      "descriptor {} does not speak VFIO's container interface version {} (answer {})",
                      container->get(), uapi::vfio::api_version, version);
  return ContainerSupply{kernel, path, *std::move(container), source.fd >= 0};
}

Result<KernelFd> ContainerSupply::next() {
  if (first_) return std::move(first_);
  if (handed_in_)
    return base::fail(Errc::limit_reached, Stage::open, 0,
                      "the container that was handed in is one address space; hand in another for the next");
  return open_descriptor(*kernel_, path_, {});
}

Error cannot_move_between_containers() noexcept {
  return base::fail(Errc::unsupported, Stage::attach, 0,
                    "a group cannot move between containers while it is in use; detach the device and attach it again");
}

}  // namespace iovane::backends
