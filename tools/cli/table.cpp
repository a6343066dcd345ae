#include "cli/table.hpp"

#include <algorithm>

namespace iovane::cli {
namespace {

std::size_t width_of(std::string_view text) noexcept {
  return static_cast<std::size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0U) != 0x80U; }));
}

/// Lines of at most `width` code points; a longer word has a line of its own.
std::vector<std::string> fold(std::string_view text, std::size_t width) {
  std::vector<std::string> lines{""};
  while (!text.empty()) {
    const std::string_view word = text.substr(0, text.find(' '));
    text.remove_prefix(std::min(text.size(), word.size() + 1));
    if (!lines.back().empty() && width_of(lines.back()) + 1 + width_of(word) > width) lines.emplace_back();
    if (!lines.back().empty()) lines.back() += ' ';
    lines.back() += word;
  }
  return lines;
}

}  // namespace

void Table::add(std::vector<std::string> cells) {
  cells.resize(columns_.size());
  rows_.push_back(std::move(cells));
}

std::string Table::text(std::size_t width_max) const {
  constexpr std::size_t gap = 2, folded_min = 20;
  if (columns_.empty()) return {};
  std::vector<std::size_t> widths;
  for (std::size_t c = 0; c < columns_.size(); ++c) {
    std::size_t width = width_of(columns_[c].title);
    for (const auto& row : rows_) width = std::max(width, width_of(row[c]));
    widths.push_back(width);
  }
  std::size_t before_last = gap * (columns_.size() - 1);
  for (std::size_t c = 0; c + 1 < widths.size(); ++c) before_last += widths[c];
  const std::size_t room = width_max > before_last + folded_min ? width_max - before_last : folded_min;
  widths.back() = std::min(widths.back(), room);

  std::string out;
  const auto put = [&](const auto& cell_of) {
    std::string line;
    for (std::size_t c = 0; c < columns_.size(); ++c) {
      const std::string_view cell = cell_of(c);
      const std::string padding(widths[c] - std::min(widths[c], width_of(cell)), ' ');
      if (c != 0) line.append(gap, ' ');
      if (columns_[c].align == Align::right) line += padding;
      line += cell;
      if (columns_[c].align == Align::left) line += padding;
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out += line + '\n';
  };
  put([&](std::size_t c) -> std::string_view { return columns_[c].title; });
  out.append(before_last + widths.back(), '-');
  out += '\n';
  for (const auto& row : rows_) {
    const std::vector<std::string> last = fold(row.back(), widths.back());
    for (std::size_t line = 0; line < last.size(); ++line)
      put([&](std::size_t c) -> std::string_view {
        if (c + 1 == columns_.size()) return last[line];
        return line == 0 ? std::string_view{row[c]} : std::string_view{};
      });
  }
  return out;
}

}  // namespace iovane::cli
