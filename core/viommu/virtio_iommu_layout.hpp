// The virtio-iommu device's words and layouts (Virtual I/O Device specification 1.3, section 5.13). Little endian.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace iovane::viommu::virtio {

enum class RequestType : std::uint8_t { attach = 1, detach = 2, map = 3, unmap = 4, probe = 5 };

enum class Status : std::uint8_t {
  ok = 0,
  io_error = 1,
  unsupported = 2,
  device_error = 3,
  invalid = 4,
  range = 5,
  not_found = 6,
  fault = 7,
  no_memory = 8,
};

inline constexpr std::uint64_t feature_input_range = 1U << 0;
inline constexpr std::uint64_t feature_domain_range = 1U << 1;
inline constexpr std::uint64_t feature_map_unmap = 1U << 2;
inline constexpr std::uint64_t feature_bypass = 1U << 3;
inline constexpr std::uint64_t feature_probe = 1U << 4;
inline constexpr std::uint64_t feature_mmio = 1U << 5;
inline constexpr std::uint64_t feature_bypass_config = 1U << 6;

inline constexpr std::uint32_t attach_bypass = 1U << 0;
inline constexpr std::uint32_t map_read = 1U << 0;
inline constexpr std::uint32_t map_write = 1U << 1;
inline constexpr std::uint32_t map_mmio = 1U << 2;

// Device-readable bytes of each request, head included; the tail is four device-writable bytes.
inline constexpr std::size_t head_bytes = 4;
inline constexpr std::size_t tail_bytes = 4;
inline constexpr std::size_t attach_bytes = 20;  // domain 4, endpoint 8, flags 12, reserved 16
inline constexpr std::size_t detach_bytes = 20;  // domain 4, endpoint 8, reserved 12
inline constexpr std::size_t map_bytes = 36;     // domain 4, virt_start 8, virt_end 16, phys_start 24, flags 32
inline constexpr std::size_t unmap_bytes = 28;   // domain 4, virt_start 8, virt_end 16, reserved 24
inline constexpr std::size_t probe_bytes = 72;   // endpoint 4, reserved 8

inline constexpr std::uint16_t property_reserved_memory = 1;
inline constexpr std::size_t property_reserved_memory_bytes = 24;  // head 4, subtype 4, start 8, end 16
inline constexpr std::size_t config_bytes = 40;
inline constexpr std::size_t fault_bytes = 24;

enum class FaultReason : std::uint8_t { unknown = 0, domain = 1, mapping = 2 };
inline constexpr std::uint32_t fault_read = 1U << 0;
inline constexpr std::uint32_t fault_write = 1U << 1;
inline constexpr std::uint32_t fault_address = 1U << 8;

template <typename T, std::size_t N>
T get(const std::array<std::byte, N>& bytes, std::size_t at) noexcept {
  T value{};
  __builtin_memcpy(&value, bytes.data() + at, sizeof value);
  if constexpr (std::endian::native == std::endian::big)
    value = sizeof value == 8 ? static_cast<T>(__builtin_bswap64(value)) : static_cast<T>(__builtin_bswap32(value));
  return value;
}

template <typename T>
void put(std::byte* at, T value) noexcept {
  for (std::size_t i = 0; i < sizeof value; ++i) at[i] = static_cast<std::byte>(value >> (8 * i));
}

}  // namespace iovane::viommu::virtio
