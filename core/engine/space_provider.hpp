// SpaceProvider: a map cache's pins are mappings of an address space.
//
// On type1 and iommufd a mapping is the pin. Registered memory on iommufd is pinned once in the backend's staging IOAS
// and a mapping of it is an IOAS_COPY, so it charges nothing more. Pins are single maps at IOVAs that the engine
// chooses; unpins go as one batch through the planner, which merges neighbours into one kernel call.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>

#include "backends/backend.hpp"
#include "engine/queue_core.hpp"
#include "pinning/provider.hpp"

namespace iovane::engine {

class SpaceCore;

class SpaceProvider final : public pinning::PinProvider {
 public:
  /// `space` owns it, by way of SpaceCache. Throws std::bad_alloc.
  SpaceProvider(SpaceCore& space, Iova ceiling);

  const pinning::ProviderTraits& traits() const noexcept override { return traits_; }
  void pin(std::span<const pinning::PinRequest> requests, std::span<pinning::PinOutcome> outcomes) noexcept override;
  void unpin(std::span<const pinning::UnpinRequest> requests, std::span<Error> outcomes) noexcept override;
  Bytes memlock_charge(const pinning::PinRequest& request) const noexcept override;
  void memory_changed(const pinning::MemoryRange& range) noexcept override;

  /// The address space is closing: mappings go with its kernel objects, so unpins succeed from now on and pins are
  /// refused. Lets go of the queue, and with it of the space.
  void close() noexcept;

 private:
  SpaceCore& space_;
  pinning::ProviderTraits traits_;
  Iova ceiling_;
  bool registered_memory_is_pinned_;
  std::mutex backend_lock_;  // held for a moment, never where something is allocated or freed
  backends::BackendSpace* backend_;
  std::mutex queue_lock_;  // a queue has one user at a time; the lane behind it has one anyway
  std::unique_ptr<QueueCore> queue_;
};

}  // namespace iovane::engine
