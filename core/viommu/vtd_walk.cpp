#include "viommu/vtd_walk.hpp"

#include <array>

namespace iovane::viommu {
namespace {

constexpr std::uint64_t frame_bits = 0x000f'ffff'ffff'f000;  // 51:12
// DMA to 0xfeexxxxx is an interrupt request, whatever the tables say (specification, section 3.14).
constexpr std::uint64_t interrupt_first = 0xfee0'0000;
constexpr std::uint64_t interrupt_last = 0xfeef'ffff;

constexpr bool is_interrupt_address(std::uint64_t address) noexcept {
  return address >= interrupt_first && address <= interrupt_last;
}

constexpr std::uint64_t below(unsigned width) noexcept {
  return width >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << width) - 1;
}

}  // namespace

VtdEntryRules::VtdEntryRules(const VtdPageTable& table, const VtdCapabilities& capabilities) noexcept
    : first_{table.stage == VtdPageTable::Stage::first},
      scalable_{table.scalable},
      superpage_2m_{first_ || capabilities.superpage_2m},
      superpage_1g_{capabilities.superpage_1g},
      address_mask_{frame_bits & below(capabilities.host_address_width)},
      reserved_any_{frame_bits & ~below(capabilities.host_address_width)} {
  reserved_leaf_ = reserved_any_;
  if (!first_ && !capabilities.snoop_control) reserved_any_ |= 1U << 11, reserved_leaf_ |= 1U << 11;
  if (!first_ && !capabilities.device_iotlb) reserved_leaf_ |= std::uint64_t{1} << 62;  // TM
}

VtdEntryRules::Verdict VtdEntryRules::judge(std::uint64_t entry, unsigned level, Access inherited) const noexcept {
  Verdict out;
  const bool present = first_ ? (entry & 1) != 0 : (entry & 3) != 0;
  if (!present) {
    out.fault = not_present();
    return out;
  }
  const bool large = level > 1 && (entry & page_size_bit) != 0;
  const bool leaf = level == 1 || large;
  const std::uint64_t span = (std::uint64_t{1} << (12 + 9 * (level - 1))) - 1;
  std::uint64_t reserved = leaf ? reserved_leaf_ : reserved_any_;
  if (large) {
    reserved |=
        span & ~(first_ ? std::uint64_t{0x1fff} : std::uint64_t{0xfff});  // bit 12 is PAT in first-level superpages
    const bool known = (level == 2 && superpage_2m_) || (level == 3 && superpage_1g_);
    if (!known) reserved |= page_size_bit;
  }
  if ((entry & reserved) != 0) {
    out.fault = bad_entry();
    return out;
  }
  if (first_ && (entry & 4) == 0) {
    out.fault = VtdFault::user_denied;
    return out;
  }
  const std::uint64_t own = first_ ? 1 | (entry & 2) : entry & 3;
  out.access = static_cast<Access>(own & static_cast<std::uint64_t>(inherited));
  out.kind = leaf ? Verdict::Kind::leaf : Verdict::Kind::table;
  out.address = entry & address_mask_ & ~(leaf ? span : std::uint64_t{0xfff});
  return out;
}

VtdFault VtdEntryRules::not_present() const noexcept {
  if (first_) return VtdFault::first_not_present;
  return scalable_ ? VtdFault::second_not_present : VtdFault::none;  // legacy: read or write denied, see denied()
}

VtdFault VtdEntryRules::bad_entry() const noexcept {
  if (first_) return VtdFault::first_reserved;
  return scalable_ ? VtdFault::second_reserved : VtdFault::paging_entry_reserved;
}

VtdFault VtdEntryRules::entry_access(bool top) const noexcept {
  if (first_) return top ? VtdFault::first_table_access : VtdFault::first_entry_access;
  if (!scalable_) return top ? VtdFault::context_invalid : VtdFault::paging_entry_access;
  return top ? VtdFault::second_table_access : VtdFault::second_entry_access;
}

VtdFault VtdEntryRules::denied(bool write) const noexcept {
  if (scalable_) return write ? VtdFault::sm_write_denied : VtdFault::sm_read_denied;
  return write ? VtdFault::write_denied : VtdFault::read_denied;
}

VtdInputRanges input_ranges(const VtdPageTable& table, const VtdCapabilities& capabilities) noexcept {
  const unsigned width = 12 + 9 * unsigned{table.levels};
  if (table.stage == VtdPageTable::Stage::second)
    return {{Iova{0}, Iova{below(std::min(width, capabilities.guest_address_width))}}, std::nullopt};
  // First level: addresses are canonical, the top half of the table translates the top of the address space.
  return {{Iova{0}, Iova{below(width - 1)}}, IovaRange{Iova{~below(width - 1)}, iova_max}};
}

VtdTranslation translate_address(const GuestMemory::View& view, const VtdPageTable& table,
                                 const VtdCapabilities& capabilities, std::uint64_t iova, bool write) noexcept {
  const VtdEntryRules rules{table, capabilities};
  const auto ranges = input_ranges(table, capabilities);
  VtdTranslation out;
  if (!ranges.low.contains(Iova{iova}) && !(ranges.high && ranges.high->contains(Iova{iova}))) {
    out.fault = rules.first()      ? VtdFault::non_canonical
                : rules.scalable() ? VtdFault::sm_second_address_beyond_width
                                   : VtdFault::address_beyond_width;
    return out;
  }
  std::uint64_t at = table.root;
  Access inherited = Access::read_write;
  for (unsigned level = table.levels;; --level) {
    const unsigned low = 12 + 9 * (level - 1);
    const auto entry = view.read_le64(at + (iova >> low & 511U) * 8);
    if (!entry) {
      out.fault = rules.entry_access(level == table.levels);
      return out;
    }
    const auto verdict = rules.judge(*entry, level, inherited);
    if (verdict.kind == VtdEntryRules::Verdict::Kind::hole) {
      out.fault = verdict.fault == VtdFault::none ? rules.denied(write) : verdict.fault;
      return out;
    }
    inherited = verdict.access;
    at = verdict.address;
    if (verdict.kind == VtdEntryRules::Verdict::Kind::leaf) {
      out.page_shift = static_cast<std::uint8_t>(low);
      break;
    }
  }
  out.access = inherited;
  out.gpa = at + (iova & ((std::uint64_t{1} << out.page_shift) - 1));
  if (inherited == Access::none && rules.scalable()) {
    out.fault = rules.not_present();  // no level forbids both, all of them together do
  } else if (write ? !may_write(inherited) : !may_read(inherited)) {
    out.fault = rules.denied(write);
  } else if (is_interrupt_address(out.gpa)) {
    out.fault = rules.scalable() ? VtdFault::sm_interrupt_address : VtdFault::interrupt_address;
  }
  return out;
}

VtdFault pass_through_fault(const VtdCapabilities& capabilities, bool scalable, std::uint64_t address) noexcept {
  if (address > below(capabilities.host_address_width))
    return scalable ? VtdFault::sm_host_address_beyond_width : VtdFault::address_beyond_width;
  if (is_interrupt_address(address)) return scalable ? VtdFault::sm_interrupt_address : VtdFault::interrupt_address;
  return VtdFault::none;
}

std::string_view to_string(VtdFault fault) noexcept {
  switch (fault) {
    case VtdFault::none: return "none";
    case VtdFault::root_not_present: return "root_not_present";
    case VtdFault::context_not_present: return "context_not_present";
    case VtdFault::context_invalid: return "context_invalid";
    case VtdFault::address_beyond_width: return "address_beyond_width";
    case VtdFault::write_denied: return "write_denied";
    case VtdFault::read_denied: return "read_denied";
    case VtdFault::paging_entry_access: return "paging_entry_access";
    case VtdFault::root_access: return "root_access";
    case VtdFault::context_access: return "context_access";
    case VtdFault::root_reserved: return "root_reserved";
    case VtdFault::context_reserved: return "context_reserved";
    case VtdFault::paging_entry_reserved: return "paging_entry_reserved";
    case VtdFault::interrupt_address: return "interrupt_address";
    case VtdFault::sm_root_address: return "sm_root_address";
    case VtdFault::sm_translation_mode: return "sm_translation_mode";
    case VtdFault::abort_mode: return "abort_mode";
    case VtdFault::sm_root_access: return "sm_root_access";
    case VtdFault::sm_root_not_present: return "sm_root_not_present";
    case VtdFault::sm_root_reserved: return "sm_root_reserved";
    case VtdFault::sm_context_access: return "sm_context_access";
    case VtdFault::sm_context_not_present: return "sm_context_not_present";
    case VtdFault::sm_context_reserved: return "sm_context_reserved";
    case VtdFault::sm_context_invalid: return "sm_context_invalid";
    case VtdFault::sm_pasid_disabled: return "sm_pasid_disabled";
    case VtdFault::sm_pasid_too_large: return "sm_pasid_too_large";
    case VtdFault::sm_pasid_is_rid_pasid: return "sm_pasid_is_rid_pasid";
    case VtdFault::pasid_directory_access: return "pasid_directory_access";
    case VtdFault::pasid_directory_not_present: return "pasid_directory_not_present";
    case VtdFault::pasid_directory_reserved: return "pasid_directory_reserved";
    case VtdFault::pasid_entry_access: return "pasid_entry_access";
    case VtdFault::pasid_entry_not_present: return "pasid_entry_not_present";
    case VtdFault::pasid_entry_reserved: return "pasid_entry_reserved";
    case VtdFault::pasid_entry_invalid: return "pasid_entry_invalid";
    case VtdFault::first_entry_access: return "first_entry_access";
    case VtdFault::first_not_present: return "first_not_present";
    case VtdFault::first_reserved: return "first_reserved";
    case VtdFault::first_table_access: return "first_table_access";
    case VtdFault::second_entry_access: return "second_entry_access";
    case VtdFault::second_not_present: return "second_not_present";
    case VtdFault::second_reserved: return "second_reserved";
    case VtdFault::second_table_access: return "second_table_access";
    case VtdFault::non_canonical: return "non_canonical";
    case VtdFault::user_denied: return "user_denied";
    case VtdFault::sm_host_address_beyond_width: return "sm_host_address_beyond_width";
    case VtdFault::sm_second_address_beyond_width: return "sm_second_address_beyond_width";
    case VtdFault::sm_write_denied: return "sm_write_denied";
    case VtdFault::sm_read_denied: return "sm_read_denied";
    case VtdFault::sm_interrupt_address: return "sm_interrupt_address";
    case VtdFault::sm_pasid_unsupported: return "sm_pasid_unsupported";
  }
  return "unknown";
}

}  // namespace iovane::viommu
