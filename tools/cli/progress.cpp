#include "cli/progress.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace iovane::cli {
namespace {

constexpr std::size_t bar_width = 24;
constexpr std::size_t what_width = 40;
constexpr auto redraw_interval = std::chrono::milliseconds{100};

}  // namespace

std::string progress_line(const std::string& what, std::uint64_t done, std::uint64_t total,
                          std::chrono::milliseconds elapsed) {
  const double share = total == 0 ? 0.0 : std::min(1.0, static_cast<double>(done) / static_cast<double>(total));
  const auto filled = static_cast<std::size_t>(share * bar_width);
  std::string line = fmt::format("{:.{}}  [{}{}] {:3.0f}%", what, what_width, std::string(filled, '#'),
                                 std::string(bar_width - filled, '.'), share * 100);
  // An estimate from the first instants would jump about.
  if (share > 0.02 && share < 1.0 && elapsed > std::chrono::seconds{1}) {
    const auto left = static_cast<std::uint64_t>(static_cast<double>(elapsed.count()) * (1 - share) / share / 1000);
    line += fmt::format("  {}:{:02} left", left / 60, left % 60);
  }
  return line;
}

Progress::Progress(std::string what)
    : what_{std::move(what)}, on_terminal_{::isatty(STDERR_FILENO) == 1}, begun_{std::chrono::steady_clock::now()} {}

Progress::~Progress() {
  if (shown_) fmt::print(stderr, "\r\033[K");
}

void Progress::update(std::uint64_t done, std::uint64_t total) {
  if (!on_terminal_) return;
  const auto now = std::chrono::steady_clock::now();
  if (shown_ && now - drawn_ < redraw_interval) return;
  const auto elapsed = std::chrono::duration_cast<std::chrono::milliseconds>(now - begun_);
  fmt::print(stderr, "\r\033[K{}", progress_line(what_, done, total, elapsed));
  std::fflush(stderr);
  drawn_ = now;
  shown_ = true;
}

}  // namespace iovane::cli
