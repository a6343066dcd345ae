// The chain of capabilities that VFIO's info calls put behind their structure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "backends/uapi/vfio.hpp"
#include "iovane/types.hpp"

namespace iovane::backends::model {

class CapabilityChain {
 public:
  /// `structure` begins with an InfoCapHeader, whose `next` is filled in here; `tail` follows it.
  template <typename Structure>
  void add(const Structure& structure, std::span<const uapi::vfio::Type1IovaRange> tail = {}) {
    while (bytes_.size() % 8 != 0) bytes_.push_back(std::byte{0});
    const std::size_t at = bytes_.size();
    bytes_.resize(at + sizeof structure + tail.size_bytes());
    std::memcpy(bytes_.data() + at, &structure, sizeof structure);
    if (!tail.empty()) std::memcpy(bytes_.data() + at + sizeof structure, tail.data(), tail.size_bytes());
    starts_.push_back(at);
  }
  void add_iova_ranges(std::span<const IovaRange> ranges) {
    std::vector<uapi::vfio::Type1IovaRange> list;
    for (const IovaRange& range : ranges) list.push_back({range.start.value, range.last.value});
    add(uapi::vfio::Type1CapIovaRange{.header = {uapi::vfio::type1_cap_iova_range, 1, 0},
                                      .nr_iovas = static_cast<std::uint32_t>(list.size())},
        list);
  }
  std::size_t size() const noexcept { return bytes_.size(); }
  /// Writes the chain to `to`, which lies `offset` bytes behind the start of the info structure.
  void write(std::byte* to, std::uint32_t offset) noexcept {
    for (std::size_t i = 0; i < starts_.size(); ++i) {
      const std::uint32_t next = i + 1 < starts_.size() ? offset + static_cast<std::uint32_t>(starts_[i + 1]) : 0;
      std::memcpy(bytes_.data() + starts_[i] + offsetof(uapi::vfio::InfoCapHeader, next), &next, sizeof next);
    }
    std::memcpy(to, bytes_.data(), bytes_.size());
  }

 private:
  std::vector<std::byte> bytes_;
  std::vector<std::size_t> starts_;
};

}  // namespace iovane::backends::model
