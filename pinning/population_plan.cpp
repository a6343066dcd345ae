#include "pinning/population_plan.hpp"

#include <algorithm>

namespace iovane::pinning {

std::uint64_t population_unit(Bytes length, Bytes os_page, Bytes border, unsigned workers) noexcept {
  constexpr std::uint64_t huge = std::uint64_t{2} << 20;
  const std::uint64_t least = std::min(std::max(os_page.value, huge), std::max(border.value, os_page.value));
  const std::uint64_t pieces_wanted = std::uint64_t{4} * std::max(workers, 1U);
  std::uint64_t unit = std::max(border.value, least);
  while (unit > least && length.value / unit < pieces_wanted) unit /= 2;
  return unit;
}

std::vector<MemoryRange> cut_for_population(const MemoryRange& range, Bytes os_page, Bytes border, unsigned workers) {
  std::vector<MemoryRange> pieces;
  const std::uint64_t unit = population_unit(range.length(), os_page, border, workers);
  pieces.reserve(range.length().value / unit + 2);
  for (std::uint64_t key = range.start;;) {
    const std::uint64_t piece_last = std::min(range.last, key | (unit - 1));
    pieces.push_back({key, piece_last});
    if (piece_last == range.last) return pieces;
    key = piece_last + 1;
  }
}

}  // namespace iovane::pinning
