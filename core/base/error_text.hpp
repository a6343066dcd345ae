// Formats an error's text without allocating: fail(code, stage, errno, "window {:#x} ...", ...).
#pragma once

#include <fmt/format.h>

#include <array>
#include <string_view>
#include <utility>

#include "iovane/result.hpp"

namespace iovane::base {

/// An Error whose detail is formatted as fmt::format does, cut after error_detail_bytes_max bytes.
/// Any thread; does not allocate.
template <typename... Args>
Error fail(Errc code, Stage stage, int os_errno, fmt::format_string<Args...> format, Args&&... args) noexcept {
  std::array<char, error_detail_bytes_max> text;
  const auto end = fmt::format_to_n(text.data(), text.size(), format, std::forward<Args>(args)...);
  return make_error(code, stage, os_errno,
                    std::string_view{text.data(), static_cast<std::size_t>(end.out - text.data())});
}

}  // namespace iovane::base
