// The engine as a replay target.
#pragma once

#include <cstddef>
#include <memory>

#include "iovane/engine.hpp"
#include "replay/guest_memory.hpp"
#include "replay/host.hpp"
#include "replay/target.hpp"

namespace iovane::replay {

/// One address space with one device, the guest's memory registered once, one queue: what a VMM would set up.
struct EngineOptions {
  UnmapMode unmap = UnmapMode::strict;
  bool publish_stats = false;  ///< for 'iovane top'
};

class EngineTarget final : public ReplayTarget {
 public:
  /// `host` and `memory` outlive it; batches have at most `batch_max` operations.
  static Result<std::unique_ptr<EngineTarget>> open(Host& host, const GuestMemory& memory, std::size_t batch_max,
                                                    const EngineOptions& options = {});

  bool batches() const noexcept override { return true; }
  void run(std::span<const Operation> batch, std::span<Verdict> verdicts) noexcept override;
  void settle() noexcept override;
  Result<Bytes> unmap_all() noexcept override { return space_.unmap_all(); }
  bool visit_index(const Visit& visit) const override;

 private:
  EngineTarget() = default;

  // In this order: each needs those above it.
  Engine engine_;
  AddressSpace space_;
  Memory memory_;
  Queue queue_;
};

}  // namespace iovane::replay
