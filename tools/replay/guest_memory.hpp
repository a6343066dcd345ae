// The memory that stands for a guest's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "iovane/result.hpp"
#include "iovane/types.hpp"

namespace iovane::replay {

/// Anonymous memory, populated at once so that page faults are nobody's latency, in which every granule begins with
/// its own offset: who reads a granule through a device knows where it came from. Move-only.
class GuestMemory {
 public:
  /// Errors: out_of_memory.
  static Result<GuestMemory> create(Bytes size);
  GuestMemory(GuestMemory&& o) noexcept;
  GuestMemory& operator=(GuestMemory&& o) noexcept;
  ~GuestMemory();

  std::byte* data() const noexcept { return data_; }
  Bytes size() const noexcept { return size_; }
  /// What a granule at `offset` begins with.
  static constexpr std::uint64_t stamp(std::uint64_t offset) noexcept { return offset ^ 0x696f'7661'6e65'0000; }

 private:
  GuestMemory(std::byte* data, Bytes size) noexcept : data_{data}, size_{size} {}
  std::byte* data_ = nullptr;
  Bytes size_{};
};

}  // namespace iovane::replay
