// VT-d invalidation descriptors (specification 4.x, section 6.5.2 "Queued Invalidation Interface"), as a guest queues
// them: a pure decoder.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

namespace iovane::viommu {

/// A descriptor as it lies in the queue; 128-bit ones leave the upper half zero.
using VtdRawDescriptor = std::array<std::uint64_t, 4>;

struct VtdDescriptor {
  enum class Kind : std::uint8_t {
    context_cache = 1,
    iotlb = 2,
    device_iotlb = 3,
    interrupt_cache = 4,
    wait = 5,
    pasid_iotlb = 6,
    pasid_cache = 7,
    pasid_device_iotlb = 8,
  };
  /// How much is invalidated; which ones exist depends on the kind.
  enum class Scope : std::uint8_t {
    global,
    domain,  ///< context cache, IOTLB, PASID cache: everything of `domain`
    device,  ///< context cache: `source` under `function_mask`
    pasid,   ///< PASID-based IOTLB and PASID cache: `domain` and `pasid`
    page,    ///< IOTLB and PASID-based IOTLB: `address` and the 2^address_mask pages around it
  };

  Kind kind = Kind::wait;
  Scope scope = Scope::global;
  std::uint16_t domain = 0;
  std::uint16_t source = 0;        ///< bus << 8 | device << 3 | function
  std::uint8_t function_mask = 0;  ///< 0 to 3: that many low function bits, from bit 2 down, are ignored
  std::uint32_t pasid = 0;
  std::uint64_t address = 0;  ///< as given, low twelve bits cleared
  std::uint8_t address_mask = 0;
  bool leaf_only = false;     ///< IH: no table above the leaves changed
  bool write_status = false;  ///< wait: store `status_data` at `status_address`
  bool interrupt = false;     ///< wait: raise the completion event
  bool fence = false;         ///< wait: nothing after it before it
  std::uint64_t status_address = 0;
  std::uint32_t status_data = 0;

  /// The addresses of Scope::page, closed.
  std::uint64_t first_address() const noexcept { return address & ~page_bits(); }
  std::uint64_t last_address() const noexcept { return address | page_bits(); }

 private:
  std::uint64_t page_bits() const noexcept {
    return address_mask >= 52 ? ~std::uint64_t{0} : (std::uint64_t{1} << (12 + address_mask)) - 1;
  }
};

/// The wait descriptor is every second one of a guest's queue, so there is a short way to see that a descriptor is one,
/// and well formed. False: decode_descriptor() says what it is.
inline bool is_wait(const VtdRawDescriptor& raw) noexcept {
  constexpr std::uint64_t type_and_reserved = 0xe0f | 0xffff'f180;
  return (raw[0] & type_and_reserved) == static_cast<std::uint64_t>(VtdDescriptor::Kind::wait) && (raw[1] & 3) == 0 &&
         (raw[2] | raw[3]) == 0;
}
inline void decode_wait(const VtdRawDescriptor& raw, VtdDescriptor& out) noexcept {
  out.kind = VtdDescriptor::Kind::wait;
  out.interrupt = (raw[0] >> 4 & 1) != 0;
  out.write_status = (raw[0] >> 5 & 1) != 0;
  out.fence = (raw[0] >> 6 & 1) != 0;
  out.status_data = static_cast<std::uint32_t>(raw[0] >> 32);
  out.status_address = raw[1];
}

/// The low word of a wait descriptor that says the same.
inline std::uint64_t encode_wait_flags(const VtdDescriptor& d) noexcept {
  return static_cast<std::uint64_t>(VtdDescriptor::Kind::wait) | std::uint64_t{d.interrupt} << 4 |
         std::uint64_t{d.write_status} << 5 | std::uint64_t{d.fence} << 6 | std::uint64_t{d.status_data} << 32;
}

/// What the unit offers, as far as descriptors depend on it.
struct VtdDescriptorRules {
  unsigned address_mask_max = 18;  ///< CAP.MAMV
  bool scalable = false;           ///< ECAP.SMTS: PASID descriptors exist
  bool device_iotlb = true;        ///< ECAP.DT
};

/// The other common one, an IOTLB invalidation of pages of one domain. False: as above.
inline bool is_page_invalidation(const VtdRawDescriptor& raw, const VtdDescriptorRules& rules) noexcept {
  constexpr std::uint64_t type_scope_and_reserved = 0xe3f | 0xffff'ffff'0000'f100;
  constexpr std::uint64_t pages_of_iotlb = static_cast<std::uint64_t>(VtdDescriptor::Kind::iotlb) | 3U << 4;
  return (raw[0] & type_scope_and_reserved) == pages_of_iotlb && (raw[1] & 0xf80) == 0 &&
         (raw[1] & 63) <= rules.address_mask_max && (raw[2] | raw[3]) == 0;
}
/// The most common of those: one page, of this domain.
inline bool is_invalidation_of_one_page(const VtdRawDescriptor& raw, std::uint16_t domain) noexcept {
  constexpr std::uint64_t all_but_hints = 0xe3f | 0xffff'ffff'ffff'f100;
  const std::uint64_t wanted =
      static_cast<std::uint64_t>(VtdDescriptor::Kind::iotlb) | 3U << 4 | std::uint64_t{domain} << 16;
  return (raw[0] & all_but_hints) == wanted && (raw[1] & 0xfbf) == 0 && (raw[2] | raw[3]) == 0;
}
inline void decode_page_invalidation(const VtdRawDescriptor& raw, VtdDescriptor& out) noexcept {
  out.kind = VtdDescriptor::Kind::iotlb;
  out.scope = VtdDescriptor::Scope::page;
  out.domain = static_cast<std::uint16_t>(raw[0] >> 16);
  out.address = raw[1] & ~std::uint64_t{0xfff};
  out.address_mask = static_cast<std::uint8_t>(raw[1] & 63);
  out.leaf_only = (raw[1] >> 6 & 1) != 0;
}

/// Nothing when the unit must raise an invalidation queue error: unknown type, reserved bit, bad granularity or mask.
std::optional<VtdDescriptor> decode_descriptor(const VtdRawDescriptor& raw, const VtdDescriptorRules& rules) noexcept;

}  // namespace iovane::viommu
