// Recorded real-guest data, kept compressed in tests/data/viommu.
#pragma once

#include <gtest/gtest.h>
#include <zstd.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "guest_ram.hpp"

namespace iovane::viommu {

/// A compressed file's content; empty (and a test failure) when it cannot be read.
inline std::string read_recorded(const std::string& name) {
  std::ifstream file{std::string{IOVANE_TEST_DATA} + "/viommu/" + name + ".zst", std::ios::binary};
  const std::string packed{std::istreambuf_iterator<char>{file}, {}};
  std::string out;
  ZSTD_DCtx* context = ZSTD_createDCtx();
  ZSTD_inBuffer in{packed.data(), packed.size(), 0};
  std::vector<char> piece(1U << 17);
  std::size_t code = 1;
  while (in.pos < in.size) {
    ZSTD_outBuffer to{piece.data(), piece.size(), 0};
    code = ZSTD_decompressStream(context, &to, &in);
    if (ZSTD_isError(code) != 0) break;
    out.append(piece.data(), to.pos);
  }
  ZSTD_freeDCtx(context);
  EXPECT_EQ(code, 0U) << name << " is missing or damaged";
  return code == 0 ? out : std::string{};
}

/// Calls `line(text)` for each line.
template <typename F>
void for_each_line(std::string_view text, F&& line) {
  while (!text.empty()) {
    const auto stop = text.find('\n');
    line(text.substr(0, stop));
    if (stop == std::string_view::npos) return;
    text.remove_prefix(stop + 1);
  }
}

/// The number behind `key` ("high 0x12" or "size=4096"), base by its prefix.
inline std::uint64_t number_after(std::string_view text, std::string_view key) {
  const auto at = text.find(key);
  EXPECT_NE(at, std::string_view::npos) << key << " in: " << text;
  if (at == std::string_view::npos) return 0;
  return std::strtoull(std::string{text.substr(at + key.size(), 24)}.c_str(), nullptr, 0);
}

/// A guest's VT-d structures as they lay in its memory, and what its kernel said about them.
struct VtdSnapshot {
  explicit VtdSnapshot(const std::string& name) {
    const std::string pages = read_recorded(name + ".pages");
    for (std::size_t at = 0; at + 4104 <= pages.size(); at += 4104) {
      std::uint64_t gpa = 0;
      std::memcpy(&gpa, pages.data() + at, 8);
      std::memcpy(ram.at(gpa), pages.data() + at + 8, 4096);
      ++page_count;
    }
    text = read_recorded(name + ".txt");
    EXPECT_TRUE(memory.add(ram.config()));
  }
  std::uint64_t reg(std::string_view name) const {
    std::uint64_t value = 0;
    for_each_line(text, [&](std::string_view line) {
      if (line.substr(0, name.size()) == name && line.size() > name.size() && line[name.size()] == ' ') {
        const auto at = line.rfind("0x");
        value = std::strtoull(std::string{line.substr(at)}.c_str(), nullptr, 16);
      }
    });
    return value;
  }
  GuestRam ram{1ULL << 31};  // more than the guest had; only its tables are there
  GuestMemory memory;
  std::string text;
  std::size_t page_count = 0;
};

}  // namespace iovane::viommu
