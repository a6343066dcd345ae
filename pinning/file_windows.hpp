// Where files live in the key space.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <optional>

#include "base/unique_fd.hpp"
#include "iovane/result.hpp"
#include "pinning/memory_range.hpp"

namespace iovane::pinning {

/// Registered files (memfd, hugetlbfs, dma-buf), other memory that a provider knows by a name, and the windows of keys
/// that stand for their offsets. Any thread.
class FileWindows {
 public:
  static constexpr std::uint64_t unit_bytes = std::uint64_t{1} << 39;
  static constexpr std::size_t units_max = 4096;

  /// Takes a duplicate of `fd` and a window for its first `length` bytes. Returns the window's keys: offset 0 is
  /// `start`. Errors: invalid_argument (length 0 or not granular), limit_reached (units_max units of 512 GiB are all
  /// there is), and what duplicating says.
  Result<MemoryRange> add(int fd, Bytes length) noexcept;
  /// The same for what the provider calls `memory`, which is not 0.
  Result<MemoryRange> add_named(std::uint64_t memory, Bytes length) noexcept;
  /// Gives the window back. Precondition: nothing of it is in the index or being pinned. False when there is none.
  bool remove(const MemoryRange& window) noexcept;

  struct Place {
    int fd = -1;
    std::uint64_t offset = 0;
    std::uint64_t window_last = 0;
    std::uint64_t memory = 0;
  };
  /// The file (or named memory) behind a key; the descriptor stays valid until remove().
  std::optional<Place> find(std::uint64_t key) const noexcept;

 private:
  Result<MemoryRange> take(base::UniqueFd fd, std::uint64_t memory, Bytes length) noexcept;
  struct Window {
    base::UniqueFd fd;
    std::uint64_t memory = 0;
    std::uint64_t length = 0;      // 0: a free unit, or the continuation of a window
    std::uint32_t first_unit = 0;  // of the window that this unit belongs to
    bool used = false;
  };
  mutable std::mutex lock_;  // on misses and registrations only
  std::array<Window, units_max> units_{};
};

}  // namespace iovane::pinning
