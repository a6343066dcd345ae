// Plain text tables.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace iovane::cli {

/// Columns as wide as their widest cell, a rule under the header, two spaces between. Width is counted in code
/// points, so cells should hold characters of one column each. Where that is wider than `width_max`, the last column is
/// folded between words.
class Table {
 public:
  enum class Align : unsigned char { left, right };
  struct Column {
    std::string title;
    Align align = Align::left;
  };

  explicit Table(std::vector<Column> columns) : columns_{std::move(columns)} {}
  /// Missing cells are empty; more cells than columns are dropped.
  void add(std::vector<std::string> cells);
  std::string text(std::size_t width_max = 120) const;

 private:
  std::vector<Column> columns_;
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace iovane::cli
