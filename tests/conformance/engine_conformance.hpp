// The interface under test beneath an engine: an address space with the first device, and a witness of what it reaches.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "conformance/conformance.hpp"
#include "conformance/tapped_backend.hpp"
#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"

namespace iovane::test {

class EngineConformance : public Conformance {
 protected:
  /// In the place of what was open before.
  void open_space(Kernel& kernel, const AddressSpaceConfig& config = {}) {
    close_space();
    backend_.reset();
    auto backend = open_backend(kernel, {.name = std::string{to_string(GetParam())}, .descriptor = {}});
    ASSERT_TRUE(backend) << backend.error().message();
    engine_ = EngineAccess::open(std::make_unique<TappedBackend>(*std::move(backend), inner_), "under test");
    auto space = engine_.create_address_space(config);
    ASSERT_TRUE(space) << space.error().message();
    address_space_ = *std::move(space);
    const auto device = address_space_.attach({.pci_address = machine_->devices().front()});
    ASSERT_TRUE(device) << device.error().message();
    attached_.id = DeviceId{device->id};
    attached_.name = device->name;
    attached_.device_fd = device->device_fd;
    restart_device();
  }
  /// Also after a reset, which takes memory decoding and bus mastering away.
  void restart_device() {
    witness_ = machine_->witness(*inner_, attached_);
    ASSERT_NE(witness_, nullptr);
  }
  void close_space() {
    witness_.reset();
    address_space_ = AddressSpace{};
    engine_ = Engine{};
  }

  Engine engine_;
  AddressSpace address_space_;
  BackendSpace* inner_ = nullptr;
  AttachedDevice attached_;
};

}  // namespace iovane::test
