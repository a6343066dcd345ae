// Fault records: a device accessed what its address space has no answer to. Nobody waits; the transfer has failed.
#pragma once

#include <cstdint>
#include <optional>

#include "iovane/types.hpp"

namespace iovane {

struct FaultRecord {
  enum class Reason : std::uint8_t {
    not_mapped,     ///< nothing is mapped at the address
    no_permission,  ///< mapped, but not for this access
    address_size,   ///< an entry or the address has more bits than the IOMMU translates
    access_flag,    ///< the entry's accessed state was not set: tables that somebody else wrote
    configuration,  ///< the IOMMU has nothing valid that says how to translate for the device
    lost,           ///< `lost` records could not be kept, of this or another device of the same IOMMU
  };
  std::uint32_t device_id = 0;  ///< as in DeviceInfo; 0 with Reason::lost
  Iova address{};               ///< as far as the IOMMU tells; 0 with Reason::configuration and Reason::lost
  Access access = Access::none;
  Reason reason = Reason::not_mapped;
  bool execute = false;
  bool privileged = false;
  std::uint32_t lost = 0;
  std::optional<std::uint32_t> pasid;
};

}  // namespace iovane
