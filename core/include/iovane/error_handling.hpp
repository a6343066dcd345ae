// Enhanced Error Handling (EEH): POWER stops a device that misbehaves, and its owner decides how it comes back.
//
// The platform freezes a partitionable endpoint (PE) on an error: its DMA is dropped and reads of its registers return
// ones. Maps and unmaps made meanwhile change the tables as always; the device sees them once it runs again. Recovery
// is either unfreezing (registers first, to look; then DMA) or a reset (assert, deactivate) and configure().
#pragma once

#include <functional>
#include <memory>
#include <utility>

#include "iovane/result.hpp"
#include "iovane/spapr_types.hpp"

namespace iovane {

namespace engine {
class SpaceCore;
}

/// The error handling of one address space, from AddressSpace::error_handling(): each call acts on every group in it.
/// One thread at a time; batches run meanwhile, and closing the address space waits for the call. May outlive the
/// address space: then every call answers Errc::closed.
/// Each call's errors: no_device (no PE, or no device opened from the group), unsupported (the kernel offers none),
/// io_error.
class ErrorHandling {
 public:
  Result<EehState> state() const;
  /// Compares the state with the one that this object saw last (`normal` at first) and reports a change to the listener
  /// and the caller. The kernel has no event of its own: whoever reads all ones from a register asks, or a timer.
  Result<EehEvent> check();
  /// Called by check(), on its caller's thread and without a lock: it may map, unmap and recover.
  void set_listener(std::function<void(const EehEvent&)> listener) { listener_ = std::move(listener); }

  /// Asks the platform to freeze on errors; VFIO switches it on with the device's first open.
  Result<void> enable() const;
  /// Linux answers 0 and leaves it on.
  Result<void> disable() const;
  /// Reads of registers work again.
  Result<void> unfreeze_io() const;
  /// DMA works again: what is mapped now is what the device reaches.
  Result<void> unfreeze_dma() const;
  /// Asserts the reset; the PE stays in it until deactivate_reset().
  Result<void> assert_reset(EehReset kind) const;
  Result<void> deactivate_reset() const;
  /// Restores bridges and the PE's configuration after a reset; memory decoding and bus mastering stay the driver's.
  Result<void> configure() const;
  /// assert_reset(), deactivate_reset() and configure(), in order.
  Result<void> reset(EehReset kind) const;
  Result<void> inject(const EehInjection& error) const;

 private:
  friend class AddressSpace;
  explicit ErrorHandling(std::shared_ptr<engine::SpaceCore> core) noexcept : core_{std::move(core)} {}
  std::shared_ptr<engine::SpaceCore> core_;
  EehState seen_ = EehState::normal;
  std::function<void(const EehEvent&)> listener_;
};

}  // namespace iovane
