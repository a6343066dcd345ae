// Saved state as bytes: little endian, framed by a magic number, a version and a checksum. Inside core/viommu.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "viommu/domain_snapshot.hpp"

namespace iovane::viommu {

inline constexpr std::uint64_t virtio_iommu_state_magic = 0x3055'4d4f'4956'4f49;  // "IOVIOMU0"
inline constexpr std::uint64_t papr_state_magic = 0x3045'4354'5650'4f49;          // "IOPVTCE0"
inline constexpr std::uint32_t state_version = 1;

class StateWriter {
 public:
  StateWriter(std::uint64_t magic, std::uint32_t version) {
    put(magic);
    put(version);
  }
  template <typename T>
  void put(T value) {
    for (std::size_t i = 0; i < sizeof value; ++i) bytes_.push_back(static_cast<std::byte>(value >> (8 * i)));
  }
  void put_bytes(std::span<const std::byte> bytes) {
    put(std::uint64_t{bytes.size()});
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
  }
  std::size_t size() const noexcept { return bytes_.size(); }
  /// Overwrites what was put at `at`.
  void patch(std::size_t at, std::uint64_t value) noexcept {
    for (std::size_t i = 0; i < sizeof value; ++i) bytes_[at + i] = static_cast<std::byte>(value >> (8 * i));
  }
  /// With the checksum at its end.
  std::vector<std::byte> finish() {
    put(snapshot_checksum(bytes_));
    return std::move(bytes_);
  }

 private:
  std::vector<std::byte> bytes_;
};

/// Every take() may find that the bytes are used up; then it gives 0 and ok() is false from then on.
class StateReader {
 public:
  /// Nothing when the bytes are not that, whole and undamaged.
  static std::optional<StateReader> open(std::span<const std::byte> bytes, std::uint64_t magic,
                                         std::uint32_t version) noexcept {
    constexpr std::size_t checksum_bytes = 8;
    if (bytes.size() < checksum_bytes) return std::nullopt;
    StateReader reader{bytes.first(bytes.size() - checksum_bytes)};
    StateReader checksum{bytes.last(checksum_bytes)};
    if (checksum.take<std::uint64_t>() != snapshot_checksum(reader.left_)) return std::nullopt;
    if (reader.take<std::uint64_t>() != magic || reader.take<std::uint32_t>() != version || !reader.ok())
      return std::nullopt;
    return reader;
  }
  template <typename T>
  T take() noexcept {
    if (left_.size() < sizeof(T)) {
      ok_ = false;
      left_ = {};
      return 0;
    }
    T value = 0;
    for (std::size_t i = 0; i < sizeof value; ++i) value |= static_cast<T>(static_cast<T>(left_[i]) << (8 * i));
    left_ = left_.subspan(sizeof value);
    return value;
  }
  std::span<const std::byte> take_bytes() noexcept {
    const auto n = take<std::uint64_t>();
    if (n > left_.size()) {
      ok_ = false;
      left_ = {};
      return {};
    }
    const auto out = left_.first(n);
    left_ = left_.subspan(n);
    return out;
  }
  bool ok() const noexcept { return ok_; }
  bool ended() const noexcept { return ok_ && left_.empty(); }

 private:
  explicit StateReader(std::span<const std::byte> bytes) noexcept : left_{bytes} {}
  std::span<const std::byte> left_;
  bool ok_ = true;
};

}  // namespace iovane::viommu
