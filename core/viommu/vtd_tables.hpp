// From a device to its page table: VT-d's root, context and PASID structures (specification 4.x, sections 3.4 and 9).
#pragma once

#include <cstdint>
#include <optional>

#include "iovane/types.hpp"
#include "viommu/guest_memory.hpp"
#include "viommu/vtd_fault.hpp"

namespace iovane::viommu {

/// What the unit tells its guest (CAP and ECAP), as far as tables depend on it.
struct VtdCapabilities {
  unsigned host_address_width = 39;       ///< guest physical addresses have this many bits; above: reserved
  unsigned guest_address_width = 39;      ///< CAP.MGAW: DMA addresses of second-level tables
  unsigned second_levels_mask = 1U << 3;  ///< CAP.SAGAW: bit n: n-level second-level tables (3 to 5)
  bool first_5_level = false;             ///< CAP.FL5LP
  bool superpage_2m = true;               ///< CAP.SLLPS bit 0; first-level tables always have 2 MiB
  bool superpage_1g = true;               ///< CAP.SLLPS bit 1, CAP.FL1GP
  bool pass_through = true;               ///< ECAP.PT
  bool device_iotlb = true;               ///< ECAP.DT
  bool snoop_control = false;             ///< ECAP.SC: the SNP bit of second-level entries is not reserved
  bool scalable = false;                  ///< ECAP.SMTS
  bool first_level = false;               ///< ECAP.FLTS
  bool second_level = true;               ///< ECAP.SLTS (scalable mode)
  bool abort_mode = false;                ///< ECAP.ADMS
  bool pasid = true;                      ///< ECAP.PASID: requests may have one (scalable mode)
  unsigned pasid_bits = 20;               ///< ECAP.PSS + 1
  bool rid_pasid = true;                  ///< ECAP.RPS: the context says which PASID stands for requests without one
  bool page_requests = false;             ///< ECAP.PRS: PRE in the context is not reserved
  bool supervisor_requests = false;       ///< ECAP.SRS: SRE in the PASID entry is not reserved
  bool walk_snoop = false;                ///< ECAP.SMPWCS: nor is PWSNP
  bool memory_types = false;              ///< ECAP.MTS: nor are CD, EMTE and PAT

  /// As the unit's CAP and ECAP registers say it (specification 4.x, sections 11.4.2 and 11.4.3). The host address
  /// width comes from the ACPI DMAR table.
  static VtdCapabilities from_registers(std::uint64_t cap, std::uint64_t ecap, unsigned host_address_width) noexcept;
};

/// A page table and how to read it.
struct VtdPageTable {
  enum class Stage : std::uint8_t { second, first };
  Stage stage = Stage::second;
  std::uint8_t levels = 3;  ///< 3 to 5
  bool scalable = false;    ///< which of the two sets of fault reasons applies
  std::uint64_t root = 0;   ///< guest physical address of the top table

  constexpr bool operator==(const VtdPageTable&) const noexcept = default;
};

/// What a device's (or one of its PASIDs') requests are subject to.
struct VtdBinding {
  enum class Kind : std::uint8_t { blocked, pass_through, paging };
  Kind kind = Kind::blocked;
  VtdFault fault = VtdFault::none;  ///< blocked: why
  bool faults_disabled = false;     ///< FPD: do not record it
  std::uint16_t domain = 0;
  std::uint32_t pasid = 0;  ///< the PASID looked up, RID_PASID for requests without one
  VtdPageTable table{};

  constexpr bool operator==(const VtdBinding&) const noexcept = default;
};

/// RTADDR as written by the guest: bits 63:12 the table, 11:10 the mode (0 legacy, 1 scalable, 3 abort).
VtdBinding resolve_binding(const GuestMemory::View& view, const VtdCapabilities& capabilities, std::uint64_t rtaddr,
                           std::uint16_t source, std::optional<std::uint32_t> pasid) noexcept;

}  // namespace iovane::viommu
