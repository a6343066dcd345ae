// Why VT-d refuses a DMA: the fault reason codes of the Intel VT-d specification (revision 4.x, "Fault Reason
// Encodings"; legacy mode below 0x30, scalable mode from 0x30), as far as DMA translation can raise them.
#pragma once

#include <cstdint>
#include <string_view>

namespace iovane::viommu {

enum class VtdFault : std::uint8_t {
  none = 0,
  // Legacy mode.
  root_not_present = 0x01,
  context_not_present = 0x02,
  context_invalid = 0x03,  ///< address width or translation type that is reserved or not supported
  address_beyond_width = 0x04,
  write_denied = 0x05,
  read_denied = 0x06,
  paging_entry_access = 0x07,  ///< the entry cannot be read
  root_access = 0x08,
  context_access = 0x09,
  root_reserved = 0x0a,
  context_reserved = 0x0b,
  paging_entry_reserved = 0x0c,
  interrupt_address = 0x0e,  ///< the translation leads into 0xfeexxxxx
  // Scalable mode.
  sm_root_address = 0x30,      ///< the root table address register itself
  sm_translation_mode = 0x31,  ///< a request with PASID, and the unit is in legacy mode
  sm_root_access = 0x38,
  sm_root_not_present = 0x39,
  sm_root_reserved = 0x3a,
  sm_context_access = 0x40,
  sm_context_not_present = 0x41,
  sm_context_reserved = 0x42,
  sm_context_invalid = 0x43,
  sm_pasid_disabled = 0x45,  ///< a request with PASID, and the context does not enable them
  sm_pasid_too_large = 0x46,
  sm_rid_pasid = 0x48,  ///< the context's PASID for requests without one is out of the directory
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
  user_denied = 0x81,  ///< U/S is clear somewhere on the way
  sm_address_beyond_width = 0x83,
  sm_write_denied = 0x85,
  sm_read_denied = 0x86,
  sm_interrupt_address = 0x87,
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
    case VtdFault::sm_root_access:
    case VtdFault::sm_root_not_present:
    case VtdFault::sm_root_reserved:
    case VtdFault::sm_context_access: return false;
    default: return true;
  }
}

}  // namespace iovane::viommu
