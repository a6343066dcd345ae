// The machine under test: which kernel the suite talks to, and which devices can bear witness.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backends/backend.hpp"
#include "backends/kernel.hpp"
#include "conformance/witness.hpp"

namespace iovane::test {

class Machine {
 public:
  virtual ~Machine() = default;
  virtual backends::Kernel& kernel() = 0;
  /// PCI addresses of witnesses that can be attached, in different groups where there are several.
  virtual std::vector<std::string> devices() = 0;
  virtual std::unique_ptr<Witness> witness(backends::BackendSpace& space, const backends::AttachedDevice& device) = 0;
  /// Before the process exchanges the pages behind `memory`: a kernel's pins keep the old ones by themselves.
  virtual void pages_leave(std::span<std::byte> /*memory*/) {}
  /// Stops the device, registers and DMA, as its bridge does on an error (EEH); false where that cannot be had.
  virtual bool freeze(backends::BackendSpace& space, const backends::AttachedDevice& device) = 0;
  /// QEMU's bridge keeps the state of a frozen device and lets its DMA pass.
  virtual bool frozen_device_is_stopped() const = 0;
};

struct MachineOptions {
  /// The software IOMMU is made for it. A real machine has what it has.
  backends::Interface interface = backends::Interface::iommufd;
  /// RLIMIT_MEMLOCK, enforced (CAP_IPC_LOCK goes while the machine lives); nothing: as it is, or unlimited.
  std::optional<Bytes> memlock;
};

/// With IOVANE_LAB=1 in the environment the running kernel, otherwise the software IOMMU. A machine per test. Null
/// when the machine cannot be had that way.
std::unique_ptr<Machine> make_machine(const MachineOptions& options = {});

/// Whether that machine can have the interface at all: POWER has sPAPR and nothing else, other hosts everything else.
bool machine_can_have(backends::Interface interface);

}  // namespace iovane::test
