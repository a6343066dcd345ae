#include "cli/units.hpp"

#include <fmt/format.h>

#include <array>
#include <cmath>
#include <string_view>

namespace iovane::cli {
namespace {

/// Three significant digits, trailing zeros of a fraction removed.
std::string three_digits(double value) {
  std::string text = fmt::format("{:.{}f}", value, value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2);
  if (text.find('.') != std::string::npos) {
    while (text.back() == '0') text.pop_back();
    if (text.back() == '.') text.pop_back();
  }
  return text;
}

template <std::size_t Count>
std::string scaled(double value, double step, const std::array<std::string_view, Count>& units) {
  std::size_t unit = 0;
  // 999.5 would be printed as 1000 of the smaller unit.
  while (unit + 1 < Count && value >= step * 0.9995) {
    value /= step;
    ++unit;
  }
  return fmt::format("{} {}", three_digits(value), units[unit]);
}

}  // namespace

std::string format_count(std::uint64_t count) {
  std::string digits = fmt::format("{}", count);
  for (std::size_t at = digits.size(); at > 3;) {
    at -= 3;
    digits.insert(at, 1, ',');
  }
  return digits;
}

std::string format_bytes(Bytes bytes) {
  static constexpr std::array<std::string_view, 7> units{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  return scaled(static_cast<double>(bytes.value), 1024, units);
}

std::string format_duration(std::uint64_t nanoseconds) {
  static constexpr std::array<std::string_view, 4> units{"ns", "us", "ms", "s"};
  return scaled(static_cast<double>(nanoseconds), 1000, units);
}

std::string format_rate(std::uint64_t events, std::uint64_t nanoseconds) {
  if (nanoseconds == 0) return "-";
  static constexpr std::array<std::string_view, 4> units{"/s", "k/s", "M/s", "G/s"};
  return scaled(static_cast<double>(events) * 1e9 / static_cast<double>(nanoseconds), 1000, units);
}

std::string format_ratio(double numerator, double denominator) {
  return denominator == 0 ? "-" : fmt::format("{:.2f}", numerator / denominator);
}

}  // namespace iovane::cli
