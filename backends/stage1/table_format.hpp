// How a first-stage page table is written: the entries of one architecture, as data.
//
// Three architectures, one shape: tables of 512 entries of 8 bytes, 4 KiB granule, 3 to 5 levels, bit 0 "valid". Level
// 0 holds pages of 4 KiB, level 1 blocks of 2 MiB, level 2 blocks of 1 GiB; above are tables only. Sources: Arm
// Architecture Reference Manual (VMSAv8-64 descriptors), Intel VT-d specification (first-stage paging entries), AMD I/O
// Virtualization Technology specification (guest page tables, the processor's own format).
//
// Every entry is written with its accessed and dirty state set, so hardware never has a reason to write to a table.
// Arm's contiguous hint: sixteen neighbouring leaves, aligned as one of their common size, may be kept by a walker as
// one translation; all sixteen must then lead to neighbouring memory with the same rights, and all carry the hint.
// Software's share of an entry (ignored by all three): bit 55 of a leaf says that its memory was pinned for this
// mapping alone; an entry without bit 0 is whatever software likes: 0 is empty, `draining` names a table that was taken
// out but may still be in a walker's cache, `cutting` the table that takes a block's place once the block is in no
// cache, `parked` is a leaf that comes back without its hint.
#pragma once

#include <cstddef>
#include <cstdint>

#include "iovane/types.hpp"

namespace iovane::backends::stage1 {

inline constexpr std::uint64_t page_bytes = 4096;
inline constexpr std::size_t entries_per_table = 512;
inline constexpr unsigned levels_max = 5;
inline constexpr std::size_t group_entries = 16;  ///< under one contiguous hint

constexpr unsigned shift_of(unsigned level) noexcept { return 12 + 9 * level; }
constexpr std::uint64_t bytes_of(unsigned level) noexcept { return std::uint64_t{1} << shift_of(level); }
constexpr std::size_t index_of(std::uint64_t iova, unsigned level) noexcept {
  return (iova >> shift_of(level)) & (entries_per_table - 1);
}

enum class Architecture : std::uint8_t { smmuv3, vtd, amd };
const char* to_string(Architecture architecture) noexcept;

/// What a valid entry of a level is.
enum class EntryKind : std::uint8_t { empty, draining, cutting, parked, table, leaf };

struct TableFormat {
  Architecture architecture = Architecture::smmuv3;
  std::uint64_t address_mask = 0;    ///< of a 4 KiB-aligned address in an entry
  std::uint64_t table_bits = 0;      ///< beside the address of the next table
  std::uint64_t page_bits = 0;       ///< beside the address, level 0
  std::uint64_t block_bits = 0;      ///< beside the address, levels 1 and 2
  std::uint64_t writable_bits = 0;   ///< added where the device may write
  std::uint64_t read_only_bits = 0;  ///< added where it may not
  std::uint64_t kind_bit = 0;        ///< above level 0, tells tables from leaves
  bool kind_bit_is_leaf = false;     ///< what that bit, when set, means
  std::uint64_t hint_bit = 0;        ///< of a leaf in a group; 0: the architecture has no such hint

  static constexpr std::uint64_t valid_bit = 1;
  static constexpr std::uint64_t own_pin_bit = std::uint64_t{1} << 55;
  static constexpr std::uint64_t draining_bit = std::uint64_t{1} << 56;
  static constexpr std::uint64_t cutting_bit = std::uint64_t{1} << 57;
  static constexpr std::uint64_t parked_bit = std::uint64_t{1} << 58;  ///< of an entry that is none of the two above

  constexpr std::uint64_t table(std::uint64_t address) const noexcept { return address | table_bits; }
  /// `mark`: own_pin_bit or 0. No format can say "write only": that is read and write.
  constexpr std::uint64_t leaf(unsigned level, std::uint64_t address, Access access,
                               std::uint64_t mark) const noexcept {
    return address | (level == 0 ? page_bits : block_bits) | (may_write(access) ? writable_bits : read_only_bits) |
           mark;
  }
  /// 17 bits of the page's generation stand where neither address nor the bits above do: the same page in the same
  /// place a second time is another entry.
  static constexpr std::uint64_t tag(std::uint32_t generation) noexcept {
    return ((generation & 0x7ffU) << 1) | (std::uint64_t{(generation >> 11) & 0x3fU} << 58);
  }
  static constexpr std::uint64_t draining(std::uint64_t address, std::uint32_t generation = 0) noexcept {
    return address | draining_bit | tag(generation);
  }
  static constexpr std::uint64_t cutting(std::uint64_t address, std::uint32_t generation = 0) noexcept {
    return address | cutting_bit | tag(generation);
  }

  constexpr std::uint64_t address(std::uint64_t entry) const noexcept { return entry & address_mask; }
  constexpr EntryKind kind(std::uint64_t entry, unsigned level) const noexcept {
    if (entry == 0) return EntryKind::empty;
    if ((entry & valid_bit) == 0) {
      if ((entry & cutting_bit) != 0) return EntryKind::cutting;
      return (entry & draining_bit) != 0 ? EntryKind::draining : EntryKind::parked;
    }
    if (level == 0 || ((entry & kind_bit) != 0) == kind_bit_is_leaf) return EntryKind::leaf;
    return EntryKind::table;
  }
  constexpr bool is_hinted(std::uint64_t entry) const noexcept {
    return (entry & hint_bit) != 0 && (entry & valid_bit) != 0;
  }
  constexpr std::uint64_t parked(std::uint64_t hinted) const noexcept {
    return (hinted & ~(hint_bit | valid_bit)) | parked_bit;
  }
  static constexpr std::uint64_t unparked(std::uint64_t parked) noexcept { return (parked & ~parked_bit) | valid_bit; }
  /// The entry that takes the place of 1/512 of a leaf one level above `level`, `offset` bytes into it.
  constexpr std::uint64_t part_of(std::uint64_t leaf_above, unsigned level, std::uint64_t offset) const noexcept {
    const std::uint64_t mark = leaf_above & own_pin_bit;
    return leaf(level, address(leaf_above) + offset, is_writable(leaf_above) ? Access::read_write : Access::read, mark);
  }
  constexpr bool is_writable(std::uint64_t entry) const noexcept {
    return (entry & writable_bits) == writable_bits && (entry & read_only_bits) == 0;
  }
};

/// VMSAv8-64, stage 1, as an SMMUv3 with a 64-bit context descriptor walks it: attribute index 0, inner shareable,
/// accessible at EL0 (devices without PASID are), not global, never executable.
constexpr TableFormat smmuv3_format() noexcept {
  constexpr std::uint64_t access_flag = 1U << 10, not_global = 1U << 11, inner_shareable = 3U << 8, el0 = 1U << 6;
  constexpr std::uint64_t never_execute = std::uint64_t{3} << 53;
  constexpr std::uint64_t attributes = access_flag | not_global | inner_shareable | el0 | never_execute;
  return {.architecture = Architecture::smmuv3,
          .address_mask = 0x0000'ffff'ffff'f000,
          .table_bits = 3,
          .page_bits = 3 | attributes,
          .block_bits = 1 | attributes,
          .writable_bits = 0,
          .read_only_bits = 1U << 7,
          .kind_bit = 2,
          .kind_bit_is_leaf = false,
          .hint_bit = std::uint64_t{1} << 52};
}

/// The x86 format that VT-d's first stage and AMD's guest tables share.
constexpr TableFormat x86_format(Architecture architecture) noexcept {
  constexpr std::uint64_t present = 1, writable = 2, user = 4, accessed = 1U << 5, dirty = 1U << 6, large = 1U << 7;
  return {.architecture = architecture,
          .address_mask = 0x000f'ffff'ffff'f000,
          .table_bits = present | writable | user | accessed,
          .page_bits = present | user | accessed | dirty,
          .block_bits = present | user | accessed | dirty | large,
          .writable_bits = writable,
          .read_only_bits = 0,
          .kind_bit = large,
          .kind_bit_is_leaf = true,
          .hint_bit = 0};
}
constexpr TableFormat vtd_format() noexcept { return x86_format(Architecture::vtd); }
constexpr TableFormat amd_format() noexcept { return x86_format(Architecture::amd); }

/// The highest address that `levels` levels translate.
constexpr Iova last_address(unsigned levels) noexcept { return Iova{bytes_of(levels) - 1}; }

}  // namespace iovane::backends::stage1
