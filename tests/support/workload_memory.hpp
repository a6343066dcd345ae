// Memory whose pages tell themselves apart, requests that map it into a small window, and the question whether an
// address space's index and a device see the same there: for tests that break something in the middle of a workload.
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "backends/model/simulated_device.hpp"
#include "iovane/address_space.hpp"

namespace iovane::test {

class WorkloadMemory {
 protected:
  static constexpr std::uint64_t page = 4096;
  static constexpr std::uint64_t base_iova = 0x1000'0000;
  static constexpr std::size_t window_pages = 48;
  static constexpr std::size_t memory_pages = 32;

  WorkloadMemory() : memory_((memory_pages + 1) * page) {
    const auto start = reinterpret_cast<std::uintptr_t>(memory_.data());
    pages_ = reinterpret_cast<std::byte*>((start + page - 1) & ~(page - 1));
    for (std::size_t p = 0; p < memory_pages; ++p)
      for (std::size_t i = 0; i < page; ++i) pages_[p * page + i] = static_cast<std::byte>(p + 1);
  }

  static IovaRange at(std::uint64_t first, std::uint64_t count = 1) {
    return *IovaRange::from_length(Iova{base_iova + first * page}, Bytes{count * page});
  }
  MemoryPiece memory(std::size_t first, std::size_t count = 1) const {
    return MemoryPiece::at(pages_ + first * page, Bytes{count * page});
  }
  MapRequest request(std::uint64_t where, MemoryPiece piece) const {
    MapRequest map;
    map.memory = piece;
    map.placement = Placement::fixed(at(where).start);
    return map;
  }

  /// The device, which is attached to the space, reaches exactly what its index says. Where the kernel failed to unmap
  /// something, either way.
  static void expect_agreement(const AddressSpace& space, backends::model::SimulatedDevice& device) {
    for (std::uint64_t p = 0; p < window_pages; ++p) {
      const auto info = space.find(at(p).start);
      if (info && info->quarantined) continue;
      std::array<std::byte, 1> seen{};
      const auto read = device.dma_read(at(p).start, seen);
      EXPECT_EQ(info.has_value(), read.ok()) << "page " << p << ": index and kernel";
      if (info && !info->memory.memory && read.ok() && info->range.length().value == page) {
        EXPECT_EQ(seen[0], *reinterpret_cast<const std::byte*>(static_cast<std::uintptr_t>(info->memory.offset)));
      }
    }
  }
  /// All of the window can be mapped and unmapped.
  void expect_usable(AddressSpace& space, backends::model::SimulatedDevice& device) {
    for (std::uint64_t p = 0; p < window_pages; ++p) {
      const Completion again = space.map(request(p, memory(p % memory_pages)));
      EXPECT_TRUE(again.ok()) << "page " << p << ": " << again.error.message();
    }
    expect_agreement(space, device);
    EXPECT_EQ(space.unmap(UnmapRequest::of(at(0, window_pages))).bytes.value, window_pages * page);
  }

  std::vector<std::byte> memory_;
  std::byte* pages_ = nullptr;
};

}  // namespace iovane::test
