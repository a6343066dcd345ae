#include "engine/space_provider.hpp"

#include <array>
#include <chrono>

#include "engine/space_core.hpp"
#include "pinning/pin_index.hpp"

namespace iovane::engine {
namespace {

constexpr Bytes border_bytes{std::uint64_t{1} << 30};
constexpr std::uint32_t queue_depth = pinning::PinIndex::batch_max;

}  // namespace

SpaceProvider::SpaceProvider(SpaceCore& space, Iova ceiling)
    : space_{space},
      traits_{.name = space.facts().backend,
              .granule = std::max(space.facts().granule, Bytes{pinning::granule_bytes}),
              .border = border_bytes,
              // The space's lane runs one batch at a time.
              .parallel = false},
      ceiling_{ceiling},
      registered_memory_is_pinned_{space.facts().register_pins},
      backend_{space.backend()},
      queue_{std::make_unique<QueueCore>(space.shared_from_this(), QueueConfig{.depth = queue_depth}, nullptr)} {}

void SpaceProvider::pin(std::span<const pinning::PinRequest> requests,
                        std::span<pinning::PinOutcome> outcomes) noexcept {
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const pinning::PinRequest& wanted = requests[i];
    MapRequest map;
    map.memory = wanted.memory != 0
                     ? MemoryPiece::within(MemoryId{wanted.memory}, Bytes{wanted.offset}, wanted.range.length())
                     : MemoryPiece{{}, wanted.range.start, wanted.range.length()};
    map.access = wanted.access;
    map.placement = Placement::anywhere({}, ceiling_);
    const Completion done = space_.run_now(Operation{map});
    outcomes[i] = {{done.iova.value, done.mapping.value}, done.error};
  }
}

void SpaceProvider::unpin(std::span<const pinning::UnpinRequest> requests, std::span<Error> outcomes) noexcept {
  const std::lock_guard held{queue_lock_};
  for (std::size_t done = 0; done < requests.size();) {
    std::size_t staged = 0;
    while (queue_ && done + staged < requests.size() &&
           queue_->stage(Operation{UnmapRequest::of(MappingId{requests[done + staged].handle.token}, done + staged)}))
      ++staged;
    if (staged == 0) {
      outcomes[done++] = {};  // closed: the mapping went with the kernel's object
      continue;
    }
    queue_->submit();
    std::array<Completion, queue_depth> completions;
    for (std::size_t left = staged; left != 0;) {
      const std::size_t count = queue_->wait({completions.data(), left}, left, std::chrono::nanoseconds{-1});
      for (std::size_t i = 0; i < count; ++i) {
        const Error& error = completions[i].error;
        // stale_handle: unmap_all() or another owner of the range was faster; what counts is that it is gone.
        const bool gone = error.ok() || error.code == Errc::stale_handle || error.code == Errc::closed;
        outcomes[completions[i].user_data] = gone ? Error{} : error;
      }
      left -= count;
    }
    done += staged;
  }
  // In a relaxed address space those unmaps were only queued, and a pin that is reported gone must be. Nothing to do in
  // a strict one, or when the space has closed.
  if (const auto flushed = space_.flush(); !flushed && flushed.error().code != Errc::closed)
    for (Error& outcome : outcomes)
      if (!outcome) outcome = flushed.error();
}

Bytes SpaceProvider::memlock_charge(const pinning::PinRequest& request) const noexcept {
  return request.memory != 0 && registered_memory_is_pinned_ ? Bytes{0} : request.range.length();
}

// Without the lane: its holder may be anywhere.
void SpaceProvider::memory_changed(const pinning::MemoryRange& range) noexcept {
  const std::lock_guard held{backend_lock_};
  if (backend_ != nullptr) backend_->memory_changed(range.start, range.last);
}

void SpaceProvider::close() noexcept {
  {
    const std::lock_guard held{backend_lock_};
    backend_ = nullptr;
  }
  const std::lock_guard held{queue_lock_};
  queue_.reset();
}

}  // namespace iovane::engine
