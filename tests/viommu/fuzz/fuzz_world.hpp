// What every fuzz target of the front ends stands on: a little guest RAM, a strict host, and the check that both sides
// agree, whatever the guest wrote.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>

#include "guest_ram.hpp"
#include "viommu/recording_target.hpp"
#include "viommu/shadow_domain.hpp"

namespace iovane::viommu {

/// Reads structured values from a fuzzer's bytes; zeros when they are used up.
class Tape {
 public:
  explicit Tape(std::span<const std::uint8_t> bytes) : bytes_{bytes} {}
  bool empty() const { return bytes_.empty(); }
  template <typename T>
  T take() {
    T value{};
    const std::size_t n = std::min(sizeof value, bytes_.size());
    std::memcpy(&value, bytes_.data(), n);
    bytes_ = bytes_.subspan(n);
    return value;
  }
  std::span<const std::uint8_t> take_bytes(std::size_t n) {
    n = std::min(n, bytes_.size());
    const auto out = bytes_.first(n);
    bytes_ = bytes_.subspan(n);
    return out;
  }
  /// An address: most of them in or near what exists, some anywhere.
  std::uint64_t address() {
    const auto kind = take<std::uint8_t>();
    const auto low = take<std::uint16_t>();
    switch (kind & 7) {
      case 0: return take<std::uint64_t>();
      case 1: return ~std::uint64_t{0} - low;
      case 2: return std::uint64_t{low} << 21;
      case 3: return 0xfee0'0000 + low;
      default: return std::uint64_t{low & 0xffU} << 12 | ((kind & 8) != 0 ? low >> 8 : 0);
    }
  }

 private:
  std::span<const std::uint8_t> bytes_;
};

[[noreturn]] inline void fuzz_failed(const char* what) {
  std::fprintf(stderr, "fuzz: %s\n", what);
  std::abort();
}

/// What a domain says is told to the host is exactly what the host holds.
inline void check_mirrored(const ShadowDomain& domain, const RecordingTarget& host) {
  std::uint64_t bytes = 0;
  std::uint64_t at = 0;
  for (auto leaf = domain.index().next(0, iova_max.value); leaf; leaf = domain.index().next(at, iova_max.value)) {
    if ((leaf->word & LeafWord::backed) != 0) {
      const auto* held = host.find(leaf->range.start.value);
      if (held == nullptr || held->range.last < leaf->range.last) fuzz_failed("the host lacks a mapping");
      if (held->access != LeafWord::access(leaf->word)) fuzz_failed("the host has other rights");
      bytes += leaf->range.span() + 1;
    }
    if (leaf->range.last == iova_max) break;
    at = leaf->range.last.value + 1;
  }
  for (const auto& [start, held] : host.held()) bytes -= held.range.span() + 1;
  if (bytes != 0) fuzz_failed("the host holds more than the guest");
}

}  // namespace iovane::viommu
