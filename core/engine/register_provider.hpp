// RegisterProvider: pins that are registrations of memory with an address space, and nothing more.
//
// For backends whose register_memory() pins (Capability::explicit_pin): on sPAPR it is REGISTER_MEMORY, on iommufd the
// staging IOAS. Maps of such memory then pin nothing. Ranges may overlap: the backend holds each piece once, with a
// count, and lets it go with the last pin and the last TCE that need it.
#pragma once

#include <mutex>

#include "backends/backend.hpp"
#include "pinning/provider.hpp"

namespace iovane::engine {

/// A pin's handle is {process address, RegionId}: what BackendOp::region takes. Any thread; registering is control
/// plane of the space and serialised here, so the space's owner must not register, attach or detach at the same time.
class RegisterProvider final : public pinning::PinProvider {
 public:
  /// `space` outlives it.
  explicit RegisterProvider(backends::BackendSpace& space) noexcept;

  /// False: register_memory() of this space only remembers, and a cache over it would promise what is not so.
  bool pins() const noexcept { return has(space_.facts().capabilities, backends::Capability::explicit_pin); }

  const pinning::ProviderTraits& traits() const noexcept override { return traits_; }
  void pin(std::span<const pinning::PinRequest> requests, std::span<pinning::PinOutcome> outcomes) noexcept override;
  void unpin(std::span<const pinning::UnpinRequest> requests, std::span<Error> outcomes) noexcept override;
  void memory_changed(const pinning::MemoryRange& range) noexcept override {
    space_.memory_changed(range.start, range.last);
  }

  static backends::RegionId region_of(const pinning::PinHandle& handle) noexcept {
    return {static_cast<std::uint32_t>(handle.token)};
  }

 private:
  backends::BackendSpace& space_;
  pinning::ProviderTraits traits_;
  std::mutex control_;
};

}  // namespace iovane::engine
