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
#include "iovane/types.hpp"

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

/// A leaf of a guest's tables.
struct Leaf {
  std::uint64_t iova = 0;
  unsigned shift = 12;
  std::uint64_t gpa = 0;
  Access access = Access::none;
  bool operator==(const Leaf&) const = default;
};

inline std::ostream& operator<<(std::ostream& out, const Leaf& leaf) {
  return out << std::hex << leaf.iova << '/' << std::dec << leaf.shift << " -> " << std::hex << leaf.gpa << " access "
             << static_cast<int>(leaf.access);
}

/// What the guest kernel's debugfs printed for one device: each line an address and the entries on the way to its leaf.
inline std::map<std::string, std::vector<Leaf>> kernel_listing(const VtdSnapshot& snapshot, bool first_level) {
  std::map<std::string, std::vector<Leaf>> out;
  std::string device;
  for_each_line(snapshot.text, [&](std::string_view line) {
    if (line.substr(0, 7) == "Device ") {
      device = line.substr(7, 12);
    } else if (line.substr(0, 5) == "FILE ") {
      device.clear();
    } else if (!device.empty() && line.substr(0, 2) == "0x") {
      std::istringstream fields{std::string{line}};
      std::string field;
      std::vector<std::uint64_t> numbers;
      while (fields >> field)
        if (field != "|") numbers.push_back(std::strtoull(field.c_str(), nullptr, 16));
      // frame, PML5E, PML4E, PDPE [, PDE [, PTE]]
      ASSERT_GE(numbers.size(), 4U) << line;
      const auto level = static_cast<unsigned>(7 - numbers.size());
      const std::uint64_t entry = numbers.back();
      const unsigned shift = 12 + 9 * (level - 1);
      const std::uint64_t gpa = entry & 0x000f'ffff'ffff'f000 & ~((std::uint64_t{1} << shift) - 1);
      const auto access =
          first_level ? ((entry & 2) != 0 ? Access::read_write : Access::read) : static_cast<Access>(entry & 3);
      out[device].push_back({numbers.front() << 12, shift, gpa, access});
    }
  });
  return out;
}

/// The source of requests from "0000:00:01.0".
inline std::uint16_t source_of(const std::string& device) {
  return static_cast<std::uint16_t>(std::stoul(device.substr(5, 2), nullptr, 16) << 8 |
                                    std::stoul(device.substr(8, 2), nullptr, 16) << 3 |
                                    std::stoul(device.substr(11, 1), nullptr, 16));
}

}  // namespace iovane::viommu
