#include "engine/register_provider.hpp"

#include <unistd.h>

#include "base/error_text.hpp"

namespace iovane::engine {

RegisterProvider::RegisterProvider(backends::BackendSpace& space) noexcept
    : space_{space},
      traits_{.name = "registered",
              .granule = Bytes{static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE))},
              .parallel = false,
              .files = has(space.facts().capabilities, backends::Capability::file_memory)} {}

void RegisterProvider::pin(std::span<const pinning::PinRequest> requests,
                           std::span<pinning::PinOutcome> outcomes) noexcept {
  const std::lock_guard held{control_};
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const pinning::PinRequest& request = requests[i];
    outcomes[i] = {};
    if (!pins()) {
      outcomes[i].error = base::fail(Errc::unsupported, Stage::pin, 0, "{} does not pin what is registered with it",
                                     to_string(space_.facts().interface));
      continue;
    }
    try {
      const bool file = request.fd >= 0;
      const auto region =
          space_.register_memory({.address = file ? nullptr : reinterpret_cast<void*>(request.range.start),
                                  .length = request.range.length(),
                                  .fd = request.fd,
                                  .fd_offset = request.offset});
      if (region) {
        outcomes[i].handle = {file ? 0 : request.range.start, region->value};
      } else {
        outcomes[i].error = region.error();
      }
    } catch (...) {
      outcomes[i].error = make_error(Errc::out_of_memory, Stage::pin, "no memory to remember a registration");
    }
  }
}

void RegisterProvider::unpin(std::span<const pinning::UnpinRequest> requests, std::span<Error> outcomes) noexcept {
  const std::lock_guard held{control_};
  for (std::size_t i = 0; i < requests.size(); ++i)
    outcomes[i] = space_.unregister_memory(region_of(requests[i].handle)).error();
}

}  // namespace iovane::engine
