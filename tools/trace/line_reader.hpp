// Lines of a file, plain or compressed with zstd.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "iovane/result.hpp"

namespace iovane::trace {

/// Reads a file line by line in bounded memory; compression is recognised by its first bytes. One thread.
class LineReader {
 public:
  static Result<LineReader> open(const std::string& path);
  LineReader(LineReader&&) noexcept;
  LineReader& operator=(LineReader&&) noexcept;
  ~LineReader();

  /// The next line without its newline, valid until the next call; nothing at the end of the file. Errors (reading,
  /// damaged compression, a line longer than line_bytes_max) name the file and the line.
  Result<std::optional<std::string_view>> next();
  /// Number of the line that next() returned last, from 1.
  std::uint64_t line_number() const noexcept;
  /// Bytes of the file consumed so far, and its size, for progress.
  std::uint64_t bytes_read() const noexcept;
  std::uint64_t bytes_total() const noexcept;

 private:
  struct State;
  explicit LineReader(std::unique_ptr<State> state) noexcept;
  std::unique_ptr<State> state_;
};

}  // namespace iovane::trace
