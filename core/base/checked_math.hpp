// Arithmetic that says when it does not fit, and alignment.
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>
#include <optional>

namespace iovane::base {

template <std::unsigned_integral T>
constexpr std::optional<T> checked_add(T a, T b) noexcept {
  T sum{};
  if (__builtin_add_overflow(a, b, &sum)) return std::nullopt;
  return sum;
}

template <std::unsigned_integral T>
constexpr std::optional<T> checked_multiply(T a, T b) noexcept {
  T product{};
  if (__builtin_mul_overflow(a, b, &product)) return std::nullopt;
  return product;
}

constexpr bool is_power_of_two(std::uint64_t n) noexcept { return std::has_single_bit(n); }

/// `alignment` is a power of two in the three below.
constexpr bool is_aligned(std::uint64_t n, std::uint64_t alignment) noexcept { return (n & (alignment - 1)) == 0; }
constexpr std::uint64_t align_down(std::uint64_t n, std::uint64_t alignment) noexcept { return n & ~(alignment - 1); }
/// Nothing when the next multiple passes 2^64-1.
constexpr std::optional<std::uint64_t> align_up(std::uint64_t n, std::uint64_t alignment) noexcept {
  const auto sum = checked_add(n, alignment - 1);
  if (!sum) return std::nullopt;
  return align_down(*sum, alignment);
}

}  // namespace iovane::base
