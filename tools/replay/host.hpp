// The host that a replay runs on: a kernel, real or software, whose calls are counted, and one of its interfaces.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "backends/backend.hpp"
#include "backends/kernel_decorators.hpp"
#include "backends/model/model_kernel.hpp"
#include "backends/probe.hpp"
#include "iovane/result.hpp"
#include "iovane/types.hpp"

namespace iovane::replay {

class Host {
 public:
  /// `backend`: as in EngineConfig::backend. `device`: a PCI address, or empty for the first one that can be attached.
  /// `measure`: whether a measurement may tell what `auto` picks, and which maps iommufd shares pins for.
  /// Errors (invalid_argument, no_device, permission, ...) say what this host lacks and what would help.
  static Result<std::unique_ptr<Host>> open(const std::string& backend, const std::string& device,
                                            backends::ProbeOptions::Measure measure = {});

  /// The name of what is used, never "auto"; why that one; and what it stands on ("Linux 6.12.1", "model").
  const std::string& backend() const noexcept { return backend_; }
  const std::string& reason() const noexcept { return reason_; }
  const std::string& kernel_name() const noexcept { return kernel_name_; }
  /// As measured: the shortest map of registered memory that is cheaper as a copy. 0: all, or not measured.
  Bytes copy_from() const noexcept { return copy_from_; }
  /// PCI address of the device to attach.
  const std::string& device() const noexcept { return device_; }

  /// A backend on this host, its calls going through `through` (the host's kernel(), or a decorator of it), which
  /// outlives it.
  Result<std::unique_ptr<backends::Backend>> open_backend(backends::Kernel& through);
  backends::CountingKernel& kernel() noexcept { return *counted_; }

  /// Whether one unmap call may remove several mappings (all interfaces but type1's first version).
  bool spans_unmaps() const noexcept { return !interface_.ends_with("-v1"); }

  /// Memory pinned now, as the kernel accounts it; nothing when it does not account it (CAP_IPC_LOCK on iommufd).
  std::optional<Bytes> pinned();
  /// What the attached device reads at an address; nothing when it faults. Only where can_read_as_device().
  std::optional<std::uint64_t> read_as_device(Iova address);
  bool can_read_as_device() const noexcept { return model_ != nullptr; }
  /// After everything was closed: io_error with a list when descriptors, mappings or pins are left.
  Result<void> check_nothing_left();

 private:
  Host() = default;
  Result<void> choose(const std::string& backend, backends::ProbeOptions::Measure measure);
  Result<void> choose_device(const std::string& wanted);

  std::unique_ptr<backends::Kernel> kernel_;
  backends::model::ModelKernel* model_ = nullptr;  // kernel_, when that is the software IOMMU
  std::unique_ptr<backends::CountingKernel> counted_;
  std::string backend_;
  std::string interface_;  // what open_backend() takes
  std::string reason_;
  std::string kernel_name_;
  std::string device_;
  Bytes copy_from_{};
  Bytes pinned_before_{};  // of this process, by others than us
};

}  // namespace iovane::replay
