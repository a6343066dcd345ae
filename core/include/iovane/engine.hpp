// Engine: the process's way into its IOMMU interfaces.
#pragma once

#include <memory>
#include <string>

#include "iovane/address_space.hpp"
#include "iovane/config.hpp"
#include "iovane/result.hpp"

namespace iovane {

namespace engine {
class EngineCore;
}

/// Opens a backend and makes address spaces. Any thread; control plane. Address spaces may outlive it.
class Engine {
 public:
  Engine() noexcept = default;
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;
  ~Engine();

  /// Chooses and opens a backend. Errors say what is missing on this host and what would help.
  static Result<Engine> open(const EngineConfig& config = {});

  /// The backend in use, as in EngineConfig::backend, never "auto".
  const std::string& backend() const noexcept;
  /// Why that one: a sentence for people.
  const std::string& reason() const noexcept;

  Result<AddressSpace> create_address_space(const AddressSpaceConfig& config = {});

 private:
  friend class EngineAccess;
  explicit Engine(std::shared_ptr<engine::EngineCore> core) noexcept;
  std::shared_ptr<engine::EngineCore> core_;
};

}  // namespace iovane
