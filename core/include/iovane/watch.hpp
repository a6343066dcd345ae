// Watch: a descriptor that the engine's worker waits for.
#pragma once

#include <memory>

namespace iovane {

namespace engine {
class DescriptorTask;
}

/// Ends with the object: when the destructor returns, the handler does not run and will not. Not to be destroyed by the
/// handler itself, which ends the watch by returning false. Move-only.
class Watch {
 public:
  Watch() noexcept;
  Watch(Watch&&) noexcept;
  Watch& operator=(Watch&&) noexcept;
  ~Watch();
  explicit operator bool() const noexcept { return static_cast<bool>(task_); }

 private:
  friend class AddressSpace;
  explicit Watch(std::unique_ptr<engine::DescriptorTask> task) noexcept;
  std::unique_ptr<engine::DescriptorTask> task_;
};

}  // namespace iovane
