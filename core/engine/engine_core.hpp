// EngineCore: the open backend and the kernel under it.
#pragma once

#include <memory>
#include <string>

#include "backends/backend.hpp"
#include "backends/kernel.hpp"
#include "engine/node_resources.hpp"
#include "engine/pin_domain.hpp"
#include "engine/stats_page.hpp"
#include "iovane/config.hpp"
#include "iovane/engine.hpp"
#include "iovane/result.hpp"

namespace iovane {

/// For tools, benchmarks and tests: an engine over a backend of their choice, for instance one on a decorated kernel or
/// on a software IOMMU whose devices they want to drive. Not installed.
class EngineAccess {
 public:
  /// What the backend stands on must outlive every address space. `name` is what Engine::backend() says.
  static Engine open(std::unique_ptr<backends::Backend> backend, std::string name, WorkerConfig workers = {},
                     std::unique_ptr<engine::StatsPage> stats_page = {}, Bytes copy_from = {});
};

namespace engine {

class EngineCore {
 public:
  EngineCore(std::unique_ptr<backends::Kernel> owned_kernel, std::unique_ptr<backends::Backend> backend,
             std::string name, std::string reason, WorkerConfig workers = {}, Bytes copy_from = {})
      : kernel_{std::move(owned_kernel)},
        backend_{std::move(backend)},
        name_{std::move(name)},
        reason_{std::move(reason)},
        copy_from_{copy_from},
        nodes_{std::move(workers)} {}

  backends::Backend& backend() noexcept { return *backend_; }
  const std::string& backend_name() const noexcept { return name_; }
  const std::string& reason() const noexcept { return reason_; }
  NodeResources& nodes() noexcept { return nodes_; }
  /// As backends::SpaceOptions::copy_from, from the measurement.
  Bytes copy_from() const noexcept { return copy_from_; }
  /// Before the first address space is made.
  void publish(std::unique_ptr<StatsPage> page) noexcept { stats_page_ = std::move(page); }
  /// Null: the counters are nobody else's business.
  StatsPage* stats_page() noexcept { return stats_page_.get(); }
  PinDomain& pins() noexcept { return pins_; }

 private:
  std::unique_ptr<backends::Kernel> kernel_;  // null when the caller's; closed after the backend
  std::unique_ptr<backends::Backend> backend_;
  std::string name_;
  std::string reason_;
  Bytes copy_from_{};
  std::unique_ptr<StatsPage> stats_page_;
  PinDomain pins_;
  NodeResources nodes_;  // its workers end first
};

}  // namespace engine
}  // namespace iovane
