#include "backends/model/pages.hpp"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <new>
#include <utility>

#include "backends/model/page_table.hpp"
#include "base/checked_math.hpp"

namespace iovane::backends::model {

void Pages::name_memory(std::uint64_t address, std::uint64_t bytes, bool writable, Ledger ledger) noexcept {
  base_ = base::align_down(address, os_page_bytes);
  page_count_ = (address + (bytes - 1)) / os_page_bytes - base_ / os_page_bytes + 1;
  writable_ = writable;
  ledger_ = ledger;
  is_file_ = false;
}

void Pages::name_file(base::UniqueFd fd, std::uint64_t offset, std::uint64_t bytes, bool writable,
                      Ledger ledger) noexcept {
  name_memory(offset, bytes, writable, ledger);
  is_file_ = true;
  fd_ = std::move(fd);
}

std::byte* Pages::memory(std::uint64_t offset) const noexcept {
  return is_file_ ? window_.memory() + offset : std::bit_cast<std::byte*>(base_ + offset);
}

bool Pages::shared() const noexcept {
  // A.reference - pairs with R.reference: seen alone, whatever another holder did here happened before.
  return references_.load(std::memory_order_acquire) != 1;
}

bool Pages::drop_reference() noexcept {
  if (!shared()) return true;  // and nobody can come to share it: see above
  // R.reference, A.reference - the last one out sees everything that the others did.
  return references_.fetch_sub(1, std::memory_order_acq_rel) == 1;
}

void Pages::forget() noexcept {
  if (is_file_) {
    window_.unmap();
    fd_.reset();
  }
  references_.store(1, std::memory_order_relaxed);  // relaxed: nobody else has the object
}

int Pages::pin(std::uint64_t first, std::uint64_t last, HostMemory& host, Accounting& accounting,
               SpaceUsage& usage) noexcept {
  try {
    if (!shared()) return pin_locked(first, last, host, accounting, usage);
    const std::lock_guard lock{mutex_};
    return pin_locked(first, last, host, accounting, usage);
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
}

void Pages::unpin(std::uint64_t first, std::uint64_t last, Accounting& accounting, SpaceUsage& usage) noexcept {
  if (!shared()) return unpin_locked(first, last, accounting, usage);
  const std::lock_guard lock{mutex_};
  unpin_locked(first, last, accounting, usage);
}

int Pages::pin_locked(std::uint64_t first, std::uint64_t last, HostMemory& host, Accounting& accounting,
                      SpaceUsage& usage) {
  const bool whole = first == 0 && last == page_count_ - 1;
  std::uint64_t fresh = 0;
  if (whole_holders_ == 0) {
    fresh = last - first + 1 - (partial_.empty() ? 0 : held_partially(first, last));
    if (fresh > 0) {
      if (is_file_) {
        if (window_.memory() == nullptr) {
          const int failure = window_.map(fd_.get(), base_, page_count_ * os_page_bytes, writable_);
          if (failure != 0) return failure;
        }
      } else {
        const std::uint64_t address = base_ + first * os_page_bytes;
        const std::uint64_t bytes = (last - first + 1) * os_page_bytes;
        if (host.touches_mmio(address, bytes) || host.check(address, bytes, writable_) != 0) return -EFAULT;
      }
      if (!accounting.pin(ledger_, fresh, usage)) return -ENOMEM;
    }
  }
  if (whole) {
    ++whole_holders_;
    return 0;
  }
  try {
    add_partial(first, last);
  } catch (const std::bad_alloc&) {
    if (fresh > 0) accounting.unpin(ledger_, fresh, usage);
    throw;
  }
  return 0;
}

int Pages::cut(std::uint64_t first, std::uint64_t last, std::uint64_t right) noexcept {
  const std::lock_guard lock{mutex_};
  try {
    partial_[right].users += 2;  // one holder stops where another begins: no change of their number
    if (first == 0 && last == page_count_ - 1) {
      add_partial(first, last);
      --whole_holders_;
    }
    return 0;
  } catch (const std::bad_alloc&) {
    const auto entry = partial_.find(right);
    if (entry != partial_.end() && (entry->second.users -= 2) == 0) partial_.erase(entry);
    return -ENOMEM;
  }
}

void Pages::unpin_locked(std::uint64_t first, std::uint64_t last, Accounting& accounting, SpaceUsage& usage) noexcept {
  if (first == 0 && last == page_count_ - 1) {
    if (--whole_holders_ == 0) {
      const std::uint64_t kept = partial_.empty() ? 0 : held_partially(0, last);
      accounting.unpin(ledger_, last + 1 - kept, usage);
    }
    return;
  }
  const std::uint64_t before = whole_holders_ > 0 ? last - first + 1 : held_partially(first, last);
  drop_partial(first, last);
  if (whole_holders_ > 0) return;
  const std::uint64_t after = partial_.empty() ? 0 : held_partially(first, last);
  accounting.unpin(ledger_, before - after, usage);
}

// How many of the pages [first, last] have at least one partial holder.
std::uint64_t Pages::held_partially(std::uint64_t first, std::uint64_t last) const noexcept {
  std::uint64_t pages = 0;
  std::int64_t holders = 0;
  std::uint64_t from = 0;
  for (const auto& [at, boundary] : partial_) {
    if (holders > 0 && at > first && from <= last) {
      pages += std::min(at - 1, last) - std::max(from, first) + 1;
    }
    holders += boundary.change;
    from = at;
    if (at > last) break;
  }
  return pages;
}

void Pages::add_partial(std::uint64_t first, std::uint64_t last) {
  Boundary& left = partial_[first];
  try {
    Boundary& right = partial_[last + 1];
    --right.change;
    ++right.users;
  } catch (const std::bad_alloc&) {
    if (left.users == 0) partial_.erase(first);
    throw;
  }
  ++left.change;
  ++left.users;
}

void Pages::drop_partial(std::uint64_t first, std::uint64_t last) noexcept {
  const auto left = partial_.find(first);
  --left->second.change;
  if (--left->second.users == 0) partial_.erase(left);
  const auto right = partial_.find(last + 1);
  ++right->second.change;
  if (--right->second.users == 0) partial_.erase(right);
}

}  // namespace iovane::backends::model
