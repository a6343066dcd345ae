// I/O page faults: a device asked for a page that is not mapped, and waits for an answer.
#pragma once

#include <cstdint>
#include <optional>

#include "iovane/types.hpp"

namespace iovane::backends {

struct PageFault {
  std::uint32_t device = 0;  ///< DeviceId::value in its space; 0: the device has left meanwhile
  Iova address{};            ///< of the page
  Bytes length{};            ///< as far as the device said; 0: one page
  Access access = Access::none;
  bool execute = false;
  bool privileged = false;
  std::optional<std::uint32_t> pasid;
  std::uint32_t group = 0;   ///< the device's name for requests that belong together
  bool last = true;          ///< of its group
  std::uint32_t cookie = 0;  ///< for the answer, one for the group
};

}  // namespace iovane::backends
