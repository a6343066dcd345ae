#include "viommu/vtd_descriptor.hpp"

namespace iovane::viommu {
namespace {

constexpr std::uint64_t bits(std::uint64_t v, unsigned high, unsigned low) noexcept {
  return (v >> low) & ((std::uint64_t{2} << (high - low)) - 1);
}

// Reserved bits of each kind, low and high word; the type field (3:0 and 11:9) is decoded, not reserved.
struct Reserved {
  std::uint64_t low;
  std::uint64_t high;
};
constexpr Reserved context_reserved{0xfffc'0000'0000'f1c0, ~std::uint64_t{0}};
constexpr Reserved iotlb_reserved{0xffff'ffff'0000'f100, 0xf80};
constexpr Reserved device_iotlb_reserved{0x000f'0000'ffe0'01f0, 0xffe};
constexpr Reserved interrupt_reserved{0xffff'0000'07ff'f1e0, ~std::uint64_t{0}};
constexpr Reserved pasid_iotlb_reserved{0xfff0'0000'0000'f1c0, 0xf80};
constexpr Reserved pasid_cache_reserved{0xfff0'0000'0000'f1c0, ~std::uint64_t{0}};

}  // namespace

std::optional<VtdDescriptor> decode_descriptor(const VtdRawDescriptor& raw, const VtdDescriptorRules& rules) noexcept {
  using Kind = VtdDescriptor::Kind;
  using Scope = VtdDescriptor::Scope;
  const std::uint64_t low = raw[0];
  const std::uint64_t high = raw[1];
  if ((raw[2] | raw[3]) != 0) return std::nullopt;
  const auto clean = [&](const Reserved& r) { return (low & r.low) == 0 && (high & r.high) == 0; };

  VtdDescriptor out;
  const std::uint64_t type = bits(low, 3, 0) | bits(low, 11, 9) << 4;
  const std::uint64_t granularity = bits(low, 5, 4);
  out.kind = static_cast<Kind>(type);
  switch (type) {
    case static_cast<std::uint64_t>(Kind::context_cache): {
      if (!clean(context_reserved) || granularity == 0) return std::nullopt;
      constexpr std::array scopes{Scope::global, Scope::global, Scope::domain, Scope::device};
      out.scope = scopes[granularity];
      out.domain = static_cast<std::uint16_t>(bits(low, 31, 16));
      out.source = static_cast<std::uint16_t>(bits(low, 47, 32));
      out.function_mask = static_cast<std::uint8_t>(bits(low, 49, 48));
      return out;
    }
    case static_cast<std::uint64_t>(Kind::iotlb): {
      if (!clean(iotlb_reserved) || granularity == 0) return std::nullopt;
      constexpr std::array scopes{Scope::global, Scope::global, Scope::domain, Scope::page};
      out.scope = scopes[granularity];
      out.domain = static_cast<std::uint16_t>(bits(low, 31, 16));
      break;
    }
    case static_cast<std::uint64_t>(Kind::device_iotlb):
      if (!rules.device_iotlb || !clean(device_iotlb_reserved)) return std::nullopt;
      out.scope = Scope::device;
      out.source = static_cast<std::uint16_t>(bits(low, 47, 32));
      out.address = high & ~std::uint64_t{0xfff};
      return out;
    case static_cast<std::uint64_t>(Kind::interrupt_cache):
      if (!clean(interrupt_reserved)) return std::nullopt;
      return out;
    case static_cast<std::uint64_t>(Kind::wait):
      if (!is_wait(raw)) return std::nullopt;
      decode_wait(raw, out);
      return out;
    case static_cast<std::uint64_t>(Kind::pasid_iotlb):
      if (!rules.scalable || !clean(pasid_iotlb_reserved) || granularity < 2) return std::nullopt;
      out.scope = granularity == 2 ? Scope::pasid : Scope::page;
      out.domain = static_cast<std::uint16_t>(bits(low, 31, 16));
      out.pasid = static_cast<std::uint32_t>(bits(low, 51, 32));
      break;
    case static_cast<std::uint64_t>(Kind::pasid_cache): {
      if (!rules.scalable || !clean(pasid_cache_reserved) || granularity == 2) return std::nullopt;
      constexpr std::array scopes{Scope::domain, Scope::pasid, Scope::global, Scope::global};
      out.scope = scopes[granularity];
      out.domain = static_cast<std::uint16_t>(bits(low, 31, 16));
      out.pasid = static_cast<std::uint32_t>(bits(low, 51, 32));
      return out;
    }
    case static_cast<std::uint64_t>(Kind::pasid_device_iotlb):
      if (!rules.scalable || !rules.device_iotlb) return std::nullopt;
      out.scope = Scope::device;
      out.address = high & ~std::uint64_t{0xfff};
      return out;
    default: return std::nullopt;
  }
  // Both IOTLB kinds: the address fields count only for the page scope.
  if (out.scope == Scope::page) {
    out.address = high & ~std::uint64_t{0xfff};
    out.address_mask = static_cast<std::uint8_t>(bits(high, 5, 0));
    out.leaf_only = bits(high, 6, 6) != 0;
    if (out.address_mask > rules.address_mask_max) return std::nullopt;
  }
  return out;
}

}  // namespace iovane::viommu
