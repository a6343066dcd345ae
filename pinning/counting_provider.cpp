#include "pinning/counting_provider.hpp"

#include <cerrno>

#include "base/error_text.hpp"

namespace iovane::pinning {

void CountingProvider::fail_nth(std::uint64_t n, std::uint64_t times) noexcept {
  const std::lock_guard held{lock_};
  fail_in_ = n;
  fail_times_ = n != 0 ? times : 0;
}

// Under lock_.
bool CountingProvider::should_fail() noexcept {
  if (fail_times_ == 0) return false;
  if (fail_in_ > 1) {
    --fail_in_;
    return false;
  }
  --fail_times_;
  return true;
}

void CountingProvider::pin(std::span<const PinRequest> requests, std::span<PinOutcome> outcomes) noexcept {
  if (pin_hook_)
    for (const PinRequest& request : requests) pin_hook_(request);
  const std::lock_guard held{lock_};
  ++counts_.pin_calls;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const PinRequest& request = requests[i];
    const std::uint64_t length = request.range.length().value;
    if (should_fail()) {
      outcomes[i].error = base::fail(Errc::io_error, Stage::pin, EIO, "the test asked this pin to fail");
      continue;
    }
    if (hole_.well_formed() && hole_.overlaps(request.range)) {
      outcomes[i].error = base::fail(Errc::bad_memory, Stage::pin, EFAULT, "[{:#x}, {:#x}] is not mapped",
                                     request.range.start, request.range.last);
      continue;
    }
    if (counts_.bytes_pinned + length > config_.memlock_max.value) {
      outcomes[i].error = base::fail(Errc::memlock_exceeded, Stage::pin, ENOMEM, "need {}, limit {}, in use {} bytes",
                                     length, config_.memlock_max.value, counts_.bytes_pinned);
      continue;
    }
    for (const auto& [address, range] : by_address_)
      if (!config_.find_double_pins || range.overlaps(request.range)) {
        counts_.double_pins += config_.find_double_pins ? 1U : 0U;
        break;
      }
    by_address_.emplace(next_address_, request.range);
    outcomes[i] = {{next_address_, counts_.pins}, {}};
    next_address_ += length + granule_bytes;  // a gap, so that no two pins look contiguous by chance
    ++counts_.pins;
    counts_.bytes_pinned += length;
    counts_.bytes_pinned_ever += length;
  }
}

void CountingProvider::unpin(std::span<const UnpinRequest> requests, std::span<Error> outcomes) noexcept {
  const std::lock_guard held{lock_};
  ++counts_.unpin_calls;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    if (should_fail()) {
      outcomes[i] = base::fail(Errc::io_error, Stage::unpin, EIO, "the test asked this unpin to fail");
      continue;
    }
    const auto found = by_address_.find(requests[i].handle.address);
    if (found == by_address_.end() || found->second != requests[i].range) {
      ++counts_.wrong_unpins;
      outcomes[i] = base::fail(Errc::not_found, Stage::unpin, ENOENT, "no such pin");
      continue;
    }
    counts_.bytes_pinned -= requests[i].range.length().value;
    ++counts_.unpins;
    by_address_.erase(found);
    outcomes[i] = {};
  }
}

CountingProvider::Counts CountingProvider::counts() const {
  const std::lock_guard held{lock_};
  return counts_;
}

std::uint64_t CountingProvider::next_address() const {
  const std::lock_guard held{lock_};
  return next_address_;
}

bool CountingProvider::is_pinned(const MemoryRange& range, std::uint64_t address) const {
  const std::lock_guard held{lock_};
  auto after = by_address_.upper_bound(address);
  if (after == by_address_.begin()) return false;
  --after;
  const std::uint64_t offset = address - after->first;
  return after->second.start + offset == range.start && after->second.contains(range);
}

void CountingProvider::set_hole(const MemoryRange& hole) {
  const std::lock_guard held{lock_};
  hole_ = hole;
}

}  // namespace iovane::pinning
