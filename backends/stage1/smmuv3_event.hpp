// Event records of an SMMUv3, as its driver hands them to the owner of a vIOMMU.
//
// Source: Arm System Memory Management Unit Architecture Specification, version 3 (IHI 0070), 7.3. Linux passes on
// C_BAD_STE, F_STREAM_DISABLED, C_BAD_SUBSTREAMID, C_BAD_CD, F_TRANSLATION, F_ADDR_SIZE, F_ACCESS and F_PERMISSION of
// the first stage, with the stream's virtual number; what the second stage refuses is the kernel's own business.
#pragma once

#include <cstdint>
#include <optional>

#include "iovane/fault_record.hpp"

namespace iovane::backends::stage1::smmuv3 {

inline constexpr std::uint64_t event_bad_stream_entry = 0x04, event_stream_disabled = 0x06, event_bad_substream = 0x08,
                               event_bad_context = 0x0a, event_translation = 0x10, event_address_size = 0x11,
                               event_access = 0x12, event_permission = 0x13;

/// The record with the virtual stream number as `device_id`. Nothing for an event that is not one of the above.
constexpr std::optional<FaultRecord> decode_event(const std::uint64_t (&words)[4]) noexcept {
  FaultRecord out;
  out.device_id = static_cast<std::uint32_t>(words[0] >> 32);
  if ((words[0] >> 11 & 1) != 0) out.pasid = static_cast<std::uint32_t>(words[0] >> 12 & 0xf'ffff);
  switch (words[0] & 0xff) {
    case event_bad_stream_entry:
    case event_stream_disabled:
    case event_bad_substream:
    case event_bad_context: out.reason = FaultRecord::Reason::configuration; return out;
    case event_translation: out.reason = FaultRecord::Reason::not_mapped; break;
    case event_address_size: out.reason = FaultRecord::Reason::address_size; break;
    case event_access: out.reason = FaultRecord::Reason::access_flag; break;
    case event_permission: out.reason = FaultRecord::Reason::no_permission; break;
    default: return std::nullopt;
  }
  out.privileged = (words[1] >> 33 & 1) != 0;
  out.execute = (words[1] >> 34 & 1) != 0;
  out.access = (words[1] >> 35 & 1) != 0 ? Access::read : Access::write;
  out.address = Iova{words[2]};
  return out;
}

}  // namespace iovane::backends::stage1::smmuv3
