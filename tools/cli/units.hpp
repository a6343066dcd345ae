// Numbers for people: at most four significant digits, and always a unit.
#pragma once

#include <cstdint>
#include <string>

#include "iovane/types.hpp"

namespace iovane::cli {

/// "150,000"
std::string format_count(std::uint64_t count);
/// "4 KiB", "1.5 GiB", "100 B"
std::string format_bytes(Bytes bytes);
/// "850 ns", "12.3 us", "4.56 ms", "2.1 s"
std::string format_duration(std::uint64_t nanoseconds);
/// Events per second: "1.25 M/s", "830 k/s", "12 /s"
std::string format_rate(std::uint64_t events, std::uint64_t nanoseconds);
/// "0.56", "1.00", "-" when there is nothing to divide by
std::string format_ratio(double numerator, double denominator);

}  // namespace iovane::cli
