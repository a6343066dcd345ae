// A guest domain's mappings as bytes, for live migration: versioned, checksummed, believed only after checking.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "iovane/result.hpp"
#include "viommu/shadow_domain.hpp"

namespace iovane::viommu {

// Layout, little endian: u64 magic, u32 version, u32 granule shift, u32 address bits, u32 reserved (0), u64 count,
// count times {u64 first, u64 last, u64 gpa, u64 access}, u64 CRC-64/ECMA-182 of everything before it.
inline constexpr std::uint64_t snapshot_magic = 0x3057'4448'5356'4f49;  // "IOVSHDW0"
inline constexpr std::uint32_t snapshot_version = 1;

/// CRC-64/ECMA-182, with which a snapshot ends.
std::uint64_t snapshot_checksum(std::span<const std::byte> bytes) noexcept;

/// What the guest has mapped. Precondition: the domain is idle.
Result<std::vector<std::byte>> save_domain(const ShadowDomain& domain);

/// Maps what a snapshot says into an empty domain (of the same granule and width) and commits; its targets hold it when
/// this returns. Errors: bad_format (damaged, another version, ranges that overlap or do not fit), invalid_argument
/// (the domain is not empty), and the hosts' own; the domain is empty then.
Result<void> restore_domain(std::span<const std::byte> bytes, const GuestMemory::View& view, ShadowDomain& domain);

}  // namespace iovane::viommu
