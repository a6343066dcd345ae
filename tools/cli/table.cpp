#include "cli/table.hpp"

#include <algorithm>

namespace iovane::cli {
namespace {

std::size_t width_of(std::string_view text) noexcept {
  return static_cast<std::size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0U) != 0x80U; }));
}

}  // namespace

void Table::add(std::vector<std::string> cells) {
  cells.resize(columns_.size());
  rows_.push_back(std::move(cells));
}

std::string Table::text() const {
  std::vector<std::size_t> widths;
  for (std::size_t c = 0; c < columns_.size(); ++c) {
    std::size_t width = width_of(columns_[c].title);
    for (const auto& row : rows_) width = std::max(width, width_of(row[c]));
    widths.push_back(width);
  }
  std::string out;
  const auto put = [&](const auto& cell_of) {
    std::string line;
    for (std::size_t c = 0; c < columns_.size(); ++c) {
      const std::string_view cell = cell_of(c);
      const std::string padding(widths[c] - width_of(cell), ' ');
      if (c != 0) line += "  ";
      if (columns_[c].align == Align::right) line += padding;
      line += cell;
      if (columns_[c].align == Align::left) line += padding;
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out += line + '\n';
  };
  put([&](std::size_t c) -> std::string_view { return columns_[c].title; });
  out.append(
      [&] {
        std::size_t total = 2 * (widths.empty() ? 0 : widths.size() - 1);
        for (const std::size_t width : widths) total += width;
        return total;
      }(),
      '-');
  out += '\n';
  for (const auto& row : rows_) put([&](std::size_t c) -> std::string_view { return row[c]; });
  return out;
}

}  // namespace iovane::cli
