// The move of an attached device from one address space to another of the same descriptor, for all kinds of them.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "backends/iommufd/iommufd_space.hpp"
#include "base/error_text.hpp"

namespace iovane::backends::iommufd {

/// Takes `id` out of `from` and appends it to `to`; `connect(device)` makes the kernel do the same, and nothing can
/// fail after it. Both lists are unchanged on failure. The result is where the device is now. With the two lists the
/// same, nothing happens. `bound(device)` is its BoundDevice.
template <typename Device, typename Bound, typename Connect>
Result<Device*> take_over(std::vector<Device>& from, std::vector<Device>& to, DeviceId id, Bound&& bound,
                          Connect&& connect) {
  const auto at = std::find_if(from.begin(), from.end(), [&](const Device& d) { return bound(d).id == id; });
  if (at == from.end())
    return base::fail(Errc::not_found, Stage::attach, 0, "device {} is not attached to the space it should leave",
                      id.value);
  if (&from == &to) return &*at;
  to.reserve(to.size() + 1);  // before the kernel acts
  if (const Result<void> connected = connect(*at); !connected) return connected.error();
  to.push_back(std::move(*at));
  from.erase(at);
  return &to.back();
}

}  // namespace iovane::backends::iommufd
