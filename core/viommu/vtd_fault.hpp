// Why VT-d refuses a DMA: the fault reason codes of the Intel VT-d specification (section 7.1.3, "Fault Conditions and
// Remapping Hardware Behavior for Various Requests"; legacy mode below 0x30, scalable mode from 0x30), as far as
// untranslated requests can raise them on a unit without nested translation, page-table flags and host permissions.
#pragma once

#include <cstdint>
#include <string_view>

namespace iovane::viommu {

enum class VtdFault : std::uint8_t {
  none = 0,
  // Legacy mode.
  root_not_present = 0x01,
  context_not_present = 0x02,
  context_invalid = 0x03,  ///< address width or translation type not supported, or a first table that cannot be read
  address_beyond_width = 0x04,
  write_denied = 0x05,
  read_denied = 0x06,
  paging_entry_access = 0x07,  ///< an entry below the first table cannot be read
  root_access = 0x08,
  context_access = 0x09,
  root_reserved = 0x0a,
  context_reserved = 0x0b,
  paging_entry_reserved = 0x0c,
  interrupt_address = 0x0e,  ///< the translation leads into 0xfeexxxxx
  // Scalable mode.
  sm_root_address = 0x30,      ///< the root table address register itself
  sm_translation_mode = 0x31,  ///< a request with PASID, and the unit is in legacy mode
  abort_mode = 0x33,           ///< the root table address register asks for every request to be aborted
  sm_root_access = 0x38,
  sm_root_not_present = 0x39,
  sm_root_reserved = 0x3a,
  sm_context_access = 0x40,
  sm_context_not_present = 0x41,
  sm_context_reserved = 0x42,
  sm_context_invalid = 0x43,  ///< RID_PASID is out of the directory, or page requests are on and the device TLB is not
  sm_pasid_disabled = 0x45,   ///< a request with PASID, and the context does not enable them
  sm_pasid_too_large = 0x46,
  sm_pasid_is_rid_pasid = 0x48,  ///< a request with the PASID that stands for those without one
  pasid_directory_access = 0x50,
  pasid_directory_not_present = 0x51,
  pasid_directory_reserved = 0x52,
  pasid_entry_access = 0x58,
  pasid_entry_not_present = 0x59,
  pasid_entry_reserved = 0x5a,
  pasid_entry_invalid = 0x5b,  ///< translation type or width that is reserved or not supported
  first_entry_access = 0x70,
  first_not_present = 0x71,
  first_reserved = 0x72,
  first_table_access = 0x73,  ///< the first table itself cannot be read
  second_entry_access = 0x78,
  second_not_present = 0x79,
  second_reserved = 0x7a,
  second_table_access = 0x7b,
  non_canonical = 0x80,
  user_denied = 0x81,                     ///< U/S is clear somewhere on the way
  sm_host_address_beyond_width = 0x83,    ///< pass-through
  sm_second_address_beyond_width = 0x84,  ///< second-level tables
  sm_write_denied = 0x85,
  sm_read_denied = 0x86,
  sm_interrupt_address = 0x87,
  sm_pasid_unsupported = 0x89,  ///< larger than ECAP.PSS allows
};

/// The name as spelled above; never null.
std::string_view to_string(VtdFault fault) noexcept;

/// True for faults that a set FPD bit (fault processing disable) on the way keeps from being recorded.
constexpr bool is_qualified(VtdFault fault) noexcept {
  switch (fault) {
    case VtdFault::root_not_present:
    case VtdFault::root_access:
    case VtdFault::context_access:
    case VtdFault::root_reserved:
    case VtdFault::sm_root_address:
    case VtdFault::sm_translation_mode:
    case VtdFault::abort_mode:
    case VtdFault::sm_root_access:
    case VtdFault::sm_root_not_present:
    case VtdFault::sm_root_reserved:
    case VtdFault::sm_context_access:
    case VtdFault::pasid_directory_access:
    case VtdFault::pasid_entry_access: return false;
    default: return true;
  }
}

}  // namespace iovane::viommu
