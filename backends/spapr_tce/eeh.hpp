// The calls of Enhanced Error Handling on a container; core/include/iovane/error_handling.hpp says what it is.
#pragma once

#include <cstdint>
#include <functional>

#include "backends/kernel.hpp"
#include "iovane/result.hpp"
#include "iovane/spapr_types.hpp"

namespace iovane::backends {

/// The error handling of one container: each call acts on every group in it. Control plane, one thread at a time.
/// Each call's errors: no_device (no PE, or no device opened from the group), unsupported, io_error.
class SpaprEeh {
 public:
  /// `kernel` and `container` outlive it.
  SpaprEeh(Kernel& kernel, int container) noexcept : kernel_{kernel}, container_{container} {}

  /// Asks the platform to freeze on errors; VFIO switches it on with the device's first open.
  Result<void> enable();
  /// Linux answers 0 and leaves it on.
  Result<void> disable();
  Result<EehState> state();
  /// Reads of registers work again.
  Result<void> unfreeze_io();
  /// DMA works again: what is mapped now is what the device reaches.
  Result<void> unfreeze_dma();
  /// Asserts the reset; the PE stays in it until deactivate().
  Result<void> assert_reset(EehReset kind);
  Result<void> deactivate_reset();
  /// Restores bridges and the PE's configuration after a reset; memory decoding and bus mastering stay the driver's.
  Result<void> configure();
  /// assert_reset, deactivate_reset and configure, in order.
  Result<void> reset(EehReset kind);
  Result<void> inject(const EehInjection& error);

  /// Compares the state with the one seen last and reports a change to the listener and the caller; the kernel has no
  /// event of its own, so whoever reads all ones, or a timer, asks. `normal` before the first call.
  Result<EehEvent> check();
  void set_listener(std::function<void(const EehEvent&)> listener) { listener_ = std::move(listener); }
  /// The state that check() or state() saw last; no system call. A map made while it is not `normal` takes effect in
  /// the table at once and for the device when it runs again.
  EehState last_seen() const noexcept { return seen_; }

 private:
  Result<long> operate(std::uint32_t op, const char* name, const EehInjection* error = nullptr);
  Result<void> command(std::uint32_t op, const char* name);

  Kernel& kernel_;
  int container_;
  EehState seen_ = EehState::normal;
  std::function<void(const EehEvent&)> listener_;
};

}  // namespace iovane::backends
