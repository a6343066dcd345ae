// From an errno without context to the nearest Errc.
#pragma once

#include "iovane/result.hpp"

namespace iovane::base {

/// The general translation. Callers that know what was asked (a map, an unmap) refine it first: EINVAL of a map can
/// be a reserved range, ENOMEM the memlock limit.
Errc errc_from_errno(int os_errno) noexcept;

}  // namespace iovane::base
