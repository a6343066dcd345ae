#include "viommu/vtd_tables.hpp"

#include <array>
#include <bit>

namespace iovane::viommu {
namespace {

constexpr std::uint64_t present = 1;
constexpr std::uint64_t table_mask = ~std::uint64_t{0xfff};

std::uint64_t above(unsigned width) noexcept { return width >= 64 ? 0 : ~((std::uint64_t{1} << width) - 1); }

VtdBinding blocked(VtdFault fault, bool disabled = false) noexcept {
  VtdBinding out;
  out.fault = fault;
  out.faults_disabled = disabled && is_qualified(fault);
  return out;
}

template <std::size_t N>
bool read_words(const GuestMemory::View& view, std::uint64_t gpa, std::array<std::uint64_t, N>& out) noexcept {
  // Entries are aligned to their size, so they lie in one guest page: one look-up, each word once.
  const std::uint64_t* page = view.table(gpa & table_mask);
  if (page == nullptr) return false;
  for (std::size_t i = 0; i < N; ++i) out[i] = GuestMemory::View::load(page + (gpa & 0xfff) / 8 + i);
  if constexpr (std::endian::native == std::endian::big)
    for (auto& word : out) word = __builtin_bswap64(word);
  return true;
}

// The AW encoding of context and PASID entries: 1, 2, 3 for 3, 4, 5 levels.
bool second_levels(const VtdCapabilities& capabilities, std::uint64_t width_code, VtdPageTable& table) noexcept {
  table.stage = VtdPageTable::Stage::second;
  table.levels = static_cast<std::uint8_t>(width_code + 2);
  return width_code >= 1 && width_code <= 3 && (capabilities.second_levels_mask >> table.levels & 1U) != 0;
}

VtdBinding resolve_legacy(const GuestMemory::View& view, const VtdCapabilities& capabilities, std::uint64_t root_table,
                          std::uint16_t source) noexcept {
  const std::uint64_t beyond = above(capabilities.host_address_width);
  std::array<std::uint64_t, 2> root{};
  if (!read_words(view, root_table + (source >> 8U) * 16U, root)) return blocked(VtdFault::root_access);
  if ((root[0] & present) == 0) return blocked(VtdFault::root_not_present);
  if ((root[0] & (0xffe | beyond)) != 0 || root[1] != 0) return blocked(VtdFault::root_reserved);

  std::array<std::uint64_t, 2> context{};
  if (!read_words(view, (root[0] & table_mask) + (source & 0xffU) * 16U, context))
    return blocked(VtdFault::context_access);
  const bool disabled = (context[0] & 2) != 0;
  if ((context[0] & present) == 0) return blocked(VtdFault::context_not_present, disabled);
  if ((context[0] & (0xff0 | beyond)) != 0 || (context[1] & 0xffff'ffff'ff00'0080) != 0)
    return blocked(VtdFault::context_reserved, disabled);

  VtdBinding out;
  out.faults_disabled = disabled;
  out.domain = static_cast<std::uint16_t>(context[1] >> 8);
  const std::uint64_t type = context[0] >> 2 & 3;
  const bool width_ok = second_levels(capabilities, context[1] & 7, out.table);
  if (!width_ok || type == 3 || (type == 2 && !capabilities.pass_through) || (type == 1 && !capabilities.device_iotlb))
    return blocked(VtdFault::context_invalid, disabled);
  if (type == 2) {
    out.table = {};
    out.kind = VtdBinding::Kind::pass_through;
    return out;
  }
  out.kind = VtdBinding::Kind::paging;
  out.table.root = context[0] & table_mask;
  return out;
}

// What a scalable-mode context entry may not say, low two words, beside addresses beyond the host's width. Host
// permission tables, PASIDs of translated requests and RID_PRIV are not offered.
std::array<std::uint64_t, 2> reserved_of_context(const VtdCapabilities& capabilities) noexcept {
  std::uint64_t low = 0x1e0;
  if (!capabilities.page_requests) low |= 1U << 4;
  if (!capabilities.pasid) low |= 1U << 3;
  if (!capabilities.device_iotlb) low |= 1U << 2;
  constexpr std::uint64_t rid_pasid = 0xf'ffff;
  return {low, capabilities.rid_pasid ? ~rid_pasid : ~std::uint64_t{0}};
}

// The same of a PASID table entry, all words, with the addresses.
std::array<std::uint64_t, 8> reserved_of_pasid_entry(const VtdCapabilities& capabilities) noexcept {
  const std::uint64_t beyond = above(capabilities.host_address_width);
  constexpr std::uint64_t all = ~std::uint64_t{0};
  std::array<std::uint64_t, 8> out{0xe20 | beyond, 0xf87f'0000, 0xf82 | beyond, all, all, all, all, all};
  // Not AW, though the specification says so: Linux sets it for first-level tables, whatever the unit offers.
  if (!capabilities.second_level) out[0] |= table_mask;
  if (!capabilities.walk_snoop) out[1] |= 1U << 23;
  if (!capabilities.snoop_control) out[1] |= 1U << 24;
  if (!capabilities.memory_types) out[1] |= all << 32 | 3U << 25;
  if (!capabilities.supervisor_requests) out[2] |= 1;
  if (!capabilities.first_level) out[2] |= table_mask | 7U << 2;
  return out;
}

VtdBinding resolve_scalable(const GuestMemory::View& view, const VtdCapabilities& capabilities,
                            std::uint64_t root_table, std::uint16_t source,
                            std::optional<std::uint32_t> pasid) noexcept {
  const std::uint64_t beyond = above(capabilities.host_address_width);
  std::array<std::uint64_t, 2> root{};
  if (!read_words(view, root_table + (source >> 8U) * 16U, root)) return blocked(VtdFault::sm_root_access);
  const std::uint64_t half = root[(source & 0x80U) != 0 ? 1 : 0];  // each half of the bus has its own context table
  if ((half & present) == 0) return blocked(VtdFault::sm_root_not_present);
  if ((half & (0xffe | beyond)) != 0) return blocked(VtdFault::sm_root_reserved);

  std::array<std::uint64_t, 4> context{};
  if (!read_words(view, (half & table_mask) + (source & 0x7fU) * 32U, context))
    return blocked(VtdFault::sm_context_access);
  bool disabled = (context[0] & 2) != 0;
  if ((context[0] & present) == 0) return blocked(VtdFault::sm_context_not_present, disabled);
  const auto reserved = reserved_of_context(capabilities);
  if ((context[0] & (reserved[0] | beyond)) != 0 || (context[1] & reserved[1]) != 0 || (context[2] | context[3]) != 0)
    return blocked(VtdFault::sm_context_reserved, disabled);
  const auto rid_pasid = static_cast<std::uint32_t>(context[1] & 0xf'ffff);
  const std::uint64_t directory_entries = std::uint64_t{1} << ((context[0] >> 9 & 7) + 7);
  const bool page_requests_without_tlb = (context[0] & (1U << 4 | 1U << 2)) == 1U << 4;
  if (page_requests_without_tlb || rid_pasid >> 6 >= directory_entries)
    return blocked(VtdFault::sm_context_invalid, disabled);

  if (pasid) {
    if ((context[0] & 8) == 0) return blocked(VtdFault::sm_pasid_disabled, disabled);
    if (*pasid >> capabilities.pasid_bits != 0) return blocked(VtdFault::sm_pasid_unsupported, disabled);
    if (*pasid >> 6 >= directory_entries) return blocked(VtdFault::sm_pasid_too_large, disabled);
    if (*pasid == rid_pasid) return blocked(VtdFault::sm_pasid_is_rid_pasid, disabled);
  }
  const std::uint32_t index = pasid.value_or(rid_pasid);

  std::array<std::uint64_t, 1> directory{};
  if (!read_words(view, (context[0] & table_mask) + (index >> 6) * 8U, directory))
    return blocked(VtdFault::pasid_directory_access, disabled);
  disabled = disabled || (directory[0] & 2) != 0;
  if ((directory[0] & present) == 0) return blocked(VtdFault::pasid_directory_not_present, disabled);
  if ((directory[0] & (0xffc | beyond)) != 0) return blocked(VtdFault::pasid_directory_reserved, disabled);

  std::array<std::uint64_t, 8> entry{};
  if (!read_words(view, (directory[0] & table_mask) + (index & 63U) * 64U, entry))
    return blocked(VtdFault::pasid_entry_access, disabled);
  disabled = disabled || (entry[0] & 2) != 0;
  if ((entry[0] & present) == 0) return blocked(VtdFault::pasid_entry_not_present, disabled);

  const auto reserved_in_entry = reserved_of_pasid_entry(capabilities);
  for (std::size_t i = 0; i < entry.size(); ++i)
    if ((entry[i] & reserved_in_entry[i]) != 0) return blocked(VtdFault::pasid_entry_reserved, disabled);

  VtdBinding out;
  out.faults_disabled = disabled;
  out.pasid = index;
  out.domain = static_cast<std::uint16_t>(entry[1]);
  out.kind = VtdBinding::Kind::paging;
  bool valid = false;
  switch (entry[0] >> 6 & 7) {
    case 1:  // first level: bits 3:2 of the third word choose 4 or 5 levels
      out.table = {VtdPageTable::Stage::first, static_cast<std::uint8_t>(4 + (entry[2] >> 2 & 3)), true,
                   entry[2] & table_mask};
      valid =
          capabilities.first_level && (out.table.levels == 4 || (out.table.levels == 5 && capabilities.first_5_level));
      break;
    case 2:
      valid = capabilities.second_level && second_levels(capabilities, entry[0] >> 2 & 7, out.table);
      out.table.scalable = true;
      out.table.root = entry[0] & table_mask;
      break;
    case 4:
      valid = capabilities.pass_through;
      out.kind = VtdBinding::Kind::pass_through;
      break;
    default: break;  // nested translation (3) is not offered: ECAP.NEST is clear
  }
  if (!valid) return blocked(VtdFault::pasid_entry_invalid, disabled);
  return out;
}

}  // namespace

VtdCapabilities VtdCapabilities::from_registers(std::uint64_t cap, std::uint64_t ecap,
                                                unsigned host_address_width) noexcept {
  const auto bit = [](std::uint64_t reg, unsigned n) { return (reg >> n & 1) != 0; };
  VtdCapabilities out;
  out.host_address_width = host_address_width;
  out.guest_address_width = static_cast<unsigned>(cap >> 16 & 63) + 1;
  out.second_levels_mask = static_cast<unsigned>(cap >> 8 & 31) << 2;  // SAGAW bit n stands for n + 2 levels
  out.first_5_level = bit(cap, 60);
  out.superpage_2m = bit(cap, 34);
  out.superpage_1g = bit(cap, 35);
  out.pass_through = bit(ecap, 6);
  out.device_iotlb = bit(ecap, 2);
  out.snoop_control = bit(ecap, 7);
  out.scalable = bit(ecap, 43);
  out.first_level = bit(ecap, 47);
  out.second_level = !out.scalable || bit(ecap, 46);
  out.abort_mode = bit(ecap, 52);
  out.pasid = bit(ecap, 40);
  out.pasid_bits = static_cast<unsigned>(ecap >> 35 & 31) + 1;
  out.rid_pasid = bit(ecap, 49);
  out.page_requests = bit(ecap, 29);
  out.supervisor_requests = bit(ecap, 31);
  out.walk_snoop = bit(ecap, 48);
  out.memory_types = bit(ecap, 25);
  return out;
}

VtdBinding resolve_binding(const GuestMemory::View& view, const VtdCapabilities& capabilities, std::uint64_t rtaddr,
                           std::uint16_t source, std::optional<std::uint32_t> pasid) noexcept {
  const std::uint64_t mode = rtaddr >> 10 & 3;
  const std::uint64_t root_table = rtaddr & table_mask;
  if (mode == 3 && capabilities.abort_mode) return blocked(VtdFault::abort_mode);
  if (mode > 1 || (mode == 1 && !capabilities.scalable) || (root_table & above(capabilities.host_address_width)) != 0)
    return blocked(VtdFault::sm_root_address);
  if (mode == 1) return resolve_scalable(view, capabilities, root_table, source, pasid);
  if (pasid) return blocked(VtdFault::sm_translation_mode);
  return resolve_legacy(view, capabilities, root_table, source);
}

}  // namespace iovane::viommu
