// MemoryLease: the right to use cached memory for DMA.
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>

#include "iovane/types.hpp"

namespace iovane {

namespace engine {
struct CountedLease;
}

/// While it lives, its IOVA leads devices to the memory it was acquired for. Move-only.
///
/// From AddressSpace::acquire() it belongs to the thread that took it: move it within that thread, release it there. A
/// thread may hold 13 of them for two plain stores each; further ones cost a lock. From acquire_portable() it may be
/// moved to and released by any thread. Releasing never enters the kernel: the mapping stays for the next acquire().
class MemoryLease {
 public:
  MemoryLease() noexcept = default;
  MemoryLease(MemoryLease&& o) noexcept
      : guard_{std::exchange(o.guard_, nullptr)},
        counted_{std::exchange(o.counted_, nullptr)},
        iova_{o.iova_},
        length_{o.length_} {}
  MemoryLease& operator=(MemoryLease&& o) noexcept {
    if (this != &o) {
      release();
      guard_ = std::exchange(o.guard_, nullptr);
      counted_ = std::exchange(o.counted_, nullptr);
      iova_ = o.iova_;
      length_ = o.length_;
    }
    return *this;
  }
  MemoryLease(const MemoryLease&) = delete;
  MemoryLease& operator=(const MemoryLease&) = delete;
  ~MemoryLease() { release(); }

  /// Where a device finds the first byte that was asked for.
  Iova iova() const noexcept { return iova_; }
  /// How much of what was asked for can be reached there. Less than asked where the rest lies in another mapping.
  Bytes length() const noexcept { return length_; }
  explicit operator bool() const noexcept { return guard_ != nullptr || counted_ != nullptr; }

  void release() noexcept {
    if (guard_ != nullptr) [[likely]] {
      // R.guard - release, pairs with A.guard in pinning/lease_guards.hpp: our last use comes before the unmap.
      std::exchange(guard_, nullptr)->store(0, std::memory_order_release);
    } else if (counted_ != nullptr) {
      release_counted();
    }
  }

 private:
  friend class AddressSpace;
  void release_counted() noexcept;

  std::atomic<std::uint64_t>* guard_ = nullptr;
  engine::CountedLease* counted_ = nullptr;
  Iova iova_{};
  Bytes length_{};
};

}  // namespace iovane
