// One line on a terminal that says how far something has come.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace iovane::cli {

/// Rewrites one line of standard error, ten times a second at most; prints nothing when that is no terminal. The
/// destructor removes the line. One thread.
class Progress {
 public:
  /// `what` is cut to 40 characters.
  explicit Progress(std::string what);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void update(std::uint64_t done, std::uint64_t total);

 private:
  std::string what_;
  bool on_terminal_;
  bool shown_ = false;
  std::chrono::steady_clock::time_point begun_;
  std::chrono::steady_clock::time_point drawn_;
};

/// The line itself, without control characters: "import mixed  [#####.....]  50%  0:03 left".
std::string progress_line(const std::string& what, std::uint64_t done, std::uint64_t total,
                          std::chrono::milliseconds elapsed);

}  // namespace iovane::cli
