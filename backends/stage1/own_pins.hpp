// Memory that was not registered: pinned for one mapping, and let go with it.
//
// A map of unregistered memory maps exactly its range into the nesting parent, an unmap of the last of it takes it out
// again: two system calls, as on iommufd. Nothing is kept for reuse, because nobody says when such memory changes
// behind its address. Leaves of such mappings carry TableFormat::own_pin_bit.
//
// Any thread. A mutex: both sides are about to make a system call.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>

#include "backends/iommufd/staging.hpp"

namespace iovane::backends::stage1 {

class OwnPins {
 public:
  struct Pin {
    std::uint64_t last = 0;
    std::uint64_t live = 0;  ///< bytes that are still mapped
  };
  /// Pins without a mapping, waiting for the invalidation. By intermediate address.
  using Dying = std::map<std::uint64_t, Pin>;

  explicit OwnPins(iommufd::Staging& parent) noexcept : parent_{parent} {}

  /// Pins `length` bytes at `address`. The intermediate range, or the errno of the kernel's refusal in the error.
  Result<IovaRange> take(std::uint64_t address, Bytes length, bool writable) noexcept;
  /// `bytes` at the intermediate `address` are no longer mapped; a pin of which that was the last moves to `dying`.
  void unmapped(std::uint64_t address, std::uint64_t bytes, Dying& dying) noexcept;
  /// Nobody reaches these any more.
  void let_go(Dying& dying) noexcept;
  /// Their invalidation failed: they stay until let_go_held().
  void hold(Dying& dying) noexcept;
  void let_go_held() noexcept;
  /// Everything, mapped or not.
  void let_go_all() noexcept;

 private:
  iommufd::Staging& parent_;
  std::mutex mutex_;
  Dying pins_;
  Dying held_;
};

}  // namespace iovane::backends::stage1
