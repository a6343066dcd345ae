#include "replay/host.hpp"

#include <array>
#include <cstddef>
#include <cstring>
#include <span>
#include <string_view>
#include <utility>

#include "backends/open.hpp"
#include "backends/probe.hpp"
#include "backends/system_kernel.hpp"
#include "base/error_text.hpp"

namespace iovane::replay {
namespace {

constexpr std::string_view backend_names =
    "auto, stage1, iommufd, type1, type1-v1, compat, compat-v1, and the software IOMMU: model, model:stage1, "
    "model:type1, model:type1-v1, model:compat, model:compat-v1";

Bytes accounted(const backends::MemlockUse& use) noexcept { return {use.locked.value + use.pinned.value}; }

Result<std::unique_ptr<backends::model::ModelKernel>> make_model(bool nests) {
  backends::model::ModelOptions options;
  if (nests) options.iommus.front().nesting = backends::model::Nesting::smmuv3;
  options.memory_check = backends::model::MemoryCheck::none;  // the guest memory is there, populated
  return backends::model::ModelKernel::create(options);
}

}  // namespace

Result<std::unique_ptr<Host>> Host::open(const std::string& backend, const std::string& device,
                                         backends::ProbeOptions::Measure measure) {
  std::unique_ptr<Host> host{new Host};
  if (const auto chosen = host->choose(backend, measure); !chosen) return chosen.error();
  host->counted_ = std::make_unique<backends::CountingKernel>(*host->kernel_);
  host->kernel_name_ = host->kernel_->description();
  host->pinned_before_ = accounted(host->kernel_->memlock());
  // First whether the interface is there at all: a missing device would hide a missing module.
  if (const auto opened = host->open_backend(host->kernel()); !opened) return opened.error();
  if (const auto chosen = host->choose_device(device); !chosen) return chosen.error();
  return host;
}

Result<void> Host::choose(const std::string& backend, backends::ProbeOptions::Measure measure) {
  const bool model = backend == "model" || backend.starts_with("model:");
  interface_ = backend == "model" ? "iommufd" : model ? backend.substr(sizeof "model:" - 1) : backend;
  if (interface_ != "auto" || model) {
    if (!backends::parse_interface(interface_))
      return base::fail(Errc::invalid_argument, Stage::open, 0, "there is no backend '{}'; there are: {}", backend,
                        backend_names);
    reason_ = "asked for by name";
  }
  if (!model) kernel_ = std::make_unique<backends::SystemKernel>();
  backend_ = backend;
  if (backend == "auto" || backend == "iommufd") {
    backends::ProbeOptions options;
    options.attach_devices = false;
    options.ask_nesting = backend == "auto";
    options.measure = measure;
    const auto report = backends::probe_host(*kernel_, options);
    if (!report) return report.error();
    if (report->measurement) copy_from_ = report->measurement->copy_from();
    if (backend != "auto") return {};
    reason_ = report->why;
    if (report->choice) {
      backend_ = interface_ = backends::to_string(*report->choice);
      return {};
    }
    backend_ = "model";
    interface_ = "iommufd";
    kernel_.reset();
  }
  if (!kernel_) {
    auto created = make_model(interface_ == "stage1");
    if (!created) return created.error();
    model_ = created->get();
    kernel_ = *std::move(created);
  }
  return {};
}

Result<void> Host::choose_device(const std::string& wanted) {
  const auto report = backends::probe_host(*kernel_, {.attach_devices = false});
  if (!report) return report.error();
  std::string refused;
  for (const backends::DeviceReport& device : report->devices) {
    if (!wanted.empty() && device.pci.address != wanted) continue;
    if (device.attachable) {
      device_ = device.pci.address;
      return {};
    }
    if (refused.empty()) refused = fmt::format("{}: {}; {}", device.pci.address, device.reason, device.cure);
  }
  if (!refused.empty()) return base::fail(Errc::no_device, Stage::attach, 0, "no device to attach: {}", refused);
  if (!wanted.empty())
    return base::fail(Errc::no_device, Stage::attach, 0,
                      "there is no PCI device {} behind an IOMMU; 'iovane probe' lists those that can be attached",
                      wanted);
  return base::fail(Errc::no_device, Stage::attach, 0,
                    "no PCI device is behind an IOMMU here, and {} maps only for one; use --backend model, or bind a "
                    "device to vfio-pci ('iovane probe' lists candidates)",
                    backend_);
}

Result<std::unique_ptr<backends::Backend>> Host::open_backend(backends::Kernel& through) {
  return backends::open_backend(through, {.name = interface_});
}

std::optional<Bytes> Host::pinned() {
  if (model_ != nullptr) return model_->usage().pinned;
  const backends::MemlockUse use = kernel_->memlock();
  const Bytes now = accounted(use);
  if (now <= pinned_before_) return use.exempt ? std::nullopt : std::optional{Bytes{0}};
  return Bytes{now.value - pinned_before_.value};
}

std::optional<std::uint64_t> Host::read_as_device(Iova address) {
  std::array<std::byte, sizeof(std::uint64_t)> bytes{};
  backends::model::SimulatedDevice* const device = model_->device(device_);
  if (device == nullptr || !device->dma_read(address, bytes).ok()) return std::nullopt;
  std::uint64_t value = 0;
  std::memcpy(&value, bytes.data(), sizeof value);
  return value;
}

Result<void> Host::check_nothing_left() {
  std::string left;
  if (const auto open = counted_->open_descriptors(); open != 0) left += fmt::format(" {} descriptors", open);
  if (model_ != nullptr) {
    const backends::model::ModelUsage usage = model_->usage();
    if (usage != backends::model::ModelUsage{})
      left += fmt::format(" {} objects, {} mappings, {} bytes pinned, {} and {} bytes charged", usage.objects,
                          usage.mappings, usage.pinned.value, usage.charged_user.value, usage.charged_process.value);
  } else if (const auto now = pinned(); now && now->value != 0) {
    left += fmt::format(" {} bytes of memlock", now->value);
  }
  if (left.empty()) return {};
  return base::fail(Errc::io_error, Stage::release, 0, "after everything was closed there are left:{}", left);
}

}  // namespace iovane::replay
