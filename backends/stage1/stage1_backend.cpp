#include "backends/stage1/stage1_backend.hpp"

#include <unistd.h>

#include <cerrno>
#include <utility>

#include "backends/iommufd/ioas_calls.hpp"
#include "backends/stage1/stage1_space.hpp"
#include "base/error_text.hpp"

namespace iovane::backends {
namespace stage1 {
namespace {

class Stage1Backend final : public Backend {
 public:
  Stage1Backend(Kernel& kernel, KernelFd fd, bool exclusive, std::vector<IovaRange> avoid)
      : shared_{kernel, std::move(fd), exclusive, std::move(avoid)} {}

  Interface interface() const noexcept override { return Interface::stage1; }

  Result<std::unique_ptr<BackendSpace>> create_space(const SpaceOptions& options) override {
    if (options.dirty_tracking)
      return make_error(Errc::unsupported, Stage::open,
                        "stage-1 mode does not track dirty pages: only the kernel could, by intermediate address");
    if (options.page_faults)
      return make_error(Errc::unsupported, Stage::open, "stage-1 mode does not make devices wait for pages");
    auto space = std::make_unique<Stage1Space>(shared_, options);
    if (const auto opened = space->open_early(); !opened) return opened.error();
    return std::unique_ptr<BackendSpace>{std::move(space)};
  }

  Result<AttachedDevice> move_device(BackendSpace& from, DeviceId device, BackendSpace& to) override {
    auto* const source = dynamic_cast<Stage1Space*>(&from);
    auto* const target = dynamic_cast<Stage1Space*>(&to);
    if (source == nullptr || target == nullptr || source->shared() != &shared_ || target->shared() != &shared_)
      return make_error(Errc::invalid_argument, Stage::attach,
                        "a device can only move between two spaces of the same /dev/iommu descriptor");
    return target->take_over(*source, device);
  }

 private:
  SharedNesting shared_;
};

}  // namespace
}  // namespace stage1

Result<std::unique_ptr<Backend>> open_stage1(Kernel& kernel, const DescriptorSource& source) {
  if (::sysconf(_SC_PAGESIZE) != static_cast<long>(stage1::page_bytes))
    return base::fail(Errc::unsupported, Stage::open, 0,
                      "stage-1 mode writes tables with a 4 KiB granule, and this system's pages have {} bytes",
                      ::sysconf(_SC_PAGESIZE));
  auto fd = open_descriptor(kernel, "/dev/iommu", source);
  if (!fd) return fd.error();
  const auto probe = iommufd::ioas_alloc(kernel, fd->get());
  if (!probe && probe.error().os_errno == ENOTTY)
    return base::fail(Errc::unsupported, Stage::open, ENOTTY, "descriptor {} is not an iommufd", fd->get());
  if (!probe) return probe.error();
  iommufd::destroy(kernel, fd->get(), *probe);
  // Attaching puts the devices' reserved regions into the parent too: nothing of ours may lie there.
  std::vector<IovaRange> avoid;
  if (const auto inventory = kernel.pci_devices())
    for (const PciDevice& device : *inventory)
      avoid.insert(avoid.end(), device.reserved.begin(), device.reserved.end());
  return std::unique_ptr<Backend>{
      std::make_unique<stage1::Stage1Backend>(kernel, std::move(*fd), source.fd < 0, std::move(avoid))};
}

}  // namespace iovane::backends
