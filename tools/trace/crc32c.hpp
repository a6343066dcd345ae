// CRC-32C (Castagnoli, RFC 3720 appendix B.4), the checksum of the trace format.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace iovane::trace {

namespace detail {
constexpr std::array<std::uint32_t, 256> make_crc32c_table() noexcept {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1U) != 0 ? 0x82f63b78U : 0U);
    table[byte] = crc;
  }
  return table;
}
inline constexpr auto crc32c_table = make_crc32c_table();
}  // namespace detail

/// Of the whole span; "123456789" gives 0xe3069283. A byte at a time: traces are a few hundred kilobytes.
constexpr std::uint32_t crc32c(std::span<const std::uint8_t> bytes) noexcept {
  std::uint32_t crc = ~0U;
  for (const std::uint8_t byte : bytes) crc = (crc >> 8) ^ detail::crc32c_table[(crc ^ byte) & 0xffU];
  return ~crc;
}

}  // namespace iovane::trace
