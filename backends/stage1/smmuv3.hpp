// What an SMMUv3 needs to know about a first stage beside its tables: context descriptor, stream table entry, commands.
//
// Source: Arm System Memory Management Unit Architecture Specification, version 3 (IHI 0070): 5.2 stream table entry,
// 5.4 context descriptor, 4.4 TLB invalidation. All words little endian, as is every host that has
// one.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "iovane/types.hpp"

namespace iovane::backends::stage1::smmuv3 {

/// IDR registers as GET_HW_INFO passes them on.
struct Features {
  bool usable = false;              ///< AArch64 tables with a 4 KiB granule, and a first stage
  bool range_invalidation = false;  ///< IDR3.RIL
  std::uint32_t output_size = 0;    ///< IDR5.OAS: code of the output address size
};
constexpr Features features_of(const std::uint32_t (&idr)[6]) noexcept {
  const bool first_stage = (idr[0] & 2) != 0;
  const bool aarch64 = (idr[0] >> 2 & 2) != 0;
  const bool granule_4k = (idr[5] >> 4 & 1) != 0;
  return {.usable = first_stage && aarch64 && granule_4k,
          .range_invalidation = (idr[3] >> 10 & 1) != 0,
          .output_size = idr[5] & 7};
}
/// Eight words. Faults abort the transaction and are recorded. `address_bits`: 39 or 48.
constexpr std::array<std::uint64_t, 8> context_descriptor(std::uint64_t root, unsigned address_bits, std::uint16_t asid,
                                                          std::uint32_t output_size) noexcept {
  constexpr std::uint64_t write_back_inner = 1U << 8, write_back_outer = 1U << 10, inner_shareable = 3U << 12;
  constexpr std::uint64_t no_second_half = 1U << 30, valid = std::uint64_t{1} << 31, aarch64 = std::uint64_t{1} << 41;
  constexpr std::uint64_t record = std::uint64_t{1} << 45, abort = std::uint64_t{1} << 46;
  constexpr std::uint64_t own_asids = std::uint64_t{1} << 47;  // broadcast invalidations of CPUs do not concern us
  const std::uint64_t size = output_size < 5 ? output_size : 5;
  std::array<std::uint64_t, 8> words{};
  words[0] = (64 - address_bits) | write_back_inner | write_back_outer | inner_shareable | no_second_half | valid |
             size << 32 | aarch64 | record | abort | own_asids | std::uint64_t{asid} << 48;
  words[1] = root;
  words[3] = 0xff;  // memory attribute 0: normal, write-back, allocating
  return words;
}

/// The two words of a stream table entry that HWPT_ALLOC takes: first stage translates, one context descriptor.
constexpr std::array<std::uint64_t, 2> stream_table_entry(std::uint64_t context) noexcept {
  constexpr std::uint64_t valid = 1, first_stage = 5U << 1;
  constexpr std::uint64_t write_back_inner = 1U << 2, write_back_outer = 1U << 4, inner_shareable = 3U << 6;
  return {valid | first_stage | context, write_back_inner | write_back_outer | inner_shareable};
}

struct Command {
  std::uint64_t words[2];
};

inline constexpr std::uint64_t op_tlbi_nh_all = 0x10, op_tlbi_nh_asid = 0x11, op_tlbi_nh_va = 0x12;

constexpr Command tlbi_asid(std::uint16_t asid) noexcept { return {{op_tlbi_nh_asid | std::uint64_t{asid} << 48, 0}}; }
/// One page; `leaf`: what walkers know of tables stays.
constexpr Command tlbi_page(std::uint16_t asid, std::uint64_t iova, bool leaf) noexcept {
  return {{op_tlbi_nh_va | std::uint64_t{asid} << 48, (iova & ~std::uint64_t{0xfff}) | (leaf ? 1U : 0U)}};
}
/// (number + 1) << scale pages of 4 KiB, with range invalidation. Not for a single page: that encoding is reserved.
constexpr Command tlbi_range(std::uint16_t asid, std::uint64_t iova, unsigned number, unsigned scale,
                             bool leaf) noexcept {
  constexpr std::uint64_t granule_4k = 1U << 10;
  return {{op_tlbi_nh_va | std::uint64_t{number} << 12 | std::uint64_t{scale} << 20 | std::uint64_t{asid} << 48,
           (iova & ~std::uint64_t{0xfff}) | granule_4k | (leaf ? 1U : 0U)}};
}

/// Writes the commands that invalidate `range`, at most `room`; their number, or 0 when they do not fit.
constexpr std::size_t commands_for(IovaRange range, std::uint16_t asid, bool range_invalidation, bool leaf,
                                   Command* out, std::size_t room) noexcept {
  std::uint64_t pages = (range.span() >> 12) + 1;
  std::uint64_t iova = range.start.value;
  if (!range_invalidation) {
    if (pages > room) return 0;
    for (std::uint64_t i = 0; i < pages; ++i) out[i] = tlbi_page(asid, iova + (i << 12), leaf);
    return pages;
  }
  // The number of pages in base 32, shifted: one command per non-zero digit.
  std::size_t count = 0;
  while (pages != 0) {
    if (count == room) return 0;
    unsigned scale = static_cast<unsigned>(__builtin_ctzll(pages));
    if (scale > 31) scale = 31;
    const std::uint64_t digit = pages >> scale & 31;
    out[count++] = digit == 1 && scale == 0 ? tlbi_page(asid, iova, leaf)
                                            : tlbi_range(asid, iova, static_cast<unsigned>(digit - 1), scale, leaf);
    pages -= digit << scale;
    iova += digit << scale << 12;
  }
  return count;
}

/// What a command invalidates, for whoever has to carry it out.
struct Decoded {
  bool known = false;
  bool everything = false;  ///< of the ASID, or of all when `any_asid`
  bool any_asid = false;
  bool leaf = false;
  std::uint16_t asid = 0;
  IovaRange range{};
};
constexpr Decoded decode(const Command& command) noexcept {
  Decoded out;
  out.asid = static_cast<std::uint16_t>(command.words[0] >> 48);
  switch (command.words[0] & 0xff) {
    case op_tlbi_nh_all: out.known = out.everything = out.any_asid = true; break;
    case op_tlbi_nh_asid: out.known = out.everything = true; break;
    case op_tlbi_nh_va: {
      const bool ranged = (command.words[1] >> 10 & 3) != 0;
      const std::uint64_t number = command.words[0] >> 12 & 31, scale = command.words[0] >> 20 & 31;
      const std::uint64_t pages = ranged ? (number + 1) << scale : 1;
      const std::uint64_t start = command.words[1] & ~std::uint64_t{0xfff};
      out.known = !ranged || pages != 1;
      out.leaf = (command.words[1] & 1) != 0;
      out.range = {Iova{start}, Iova{start + (pages << 12) - 1}};
      break;
    }
    default: break;
  }
  return out;
}

}  // namespace iovane::backends::stage1::smmuv3
