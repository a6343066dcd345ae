// I/O page faults: a device asks for a page that is not mapped, and waits for an answer.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "iovane/types.hpp"

namespace iovane {

struct PageFaultEvent {
  std::uint32_t device_id = 0;  ///< as in DeviceInfo; 0: the device has left meanwhile
  Iova address{};               ///< of the page
  Bytes length{};               ///< as far as the device said; 0: one page
  Access access = Access::none;
  bool execute = false;
  bool privileged = false;
  std::optional<std::uint32_t> pasid;
  std::uint32_t group = 0;   ///< the device's name for requests that belong together
  bool last = true;          ///< of its group
  std::uint32_t cookie = 0;  ///< what the answer goes to; requests of a group share it, and one answer serves them all
};

enum class PageFaultAnswer : std::uint8_t {
  retry,  ///< the page is mapped now
  fail,   ///< it will not be: the device sees an error
};

/// Decides about one page fault: maps the page, then says `retry`. Nothing: AddressSpace::answer_page_fault() will be
/// called later. Requests of one cookie are asked about one by one and answered together, with `retry` when all said
/// so. One that throws says `fail`.
using PageFaultHandler = std::function<std::optional<PageFaultAnswer>(const PageFaultEvent&)>;

}  // namespace iovane
