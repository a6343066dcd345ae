#include "backends/spapr_tce/registered_memory.hpp"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>

#include "backends/kernel_call.hpp"
#include "backends/kernel_error.hpp"
#include "backends/uapi/vfio.hpp"
#include "base/checked_math.hpp"
#include "base/error_text.hpp"

namespace iovane::backends::spapr {
namespace {

namespace uapi = backends::uapi::vfio;

Error register_error(Kernel& kernel, long answer, MemorySpan span) {
  // A positive answer is the number of pages that could be pinned before one that could not.
  const int why = answer > 0 ? EFAULT : static_cast<int>(-answer);
  switch (why) {
    case EFAULT:
      return base::fail(Errc::bad_memory, Stage::pin, why,
                        "memory [{:#x}, {:#x}] cannot be registered: not all of it is mapped in this process and "
                        "writable, or it is of a kind that cannot be pinned (device BARs)",
                        span.start, span.last);
    case ENOMEM:
      return explain_no_memory(kernel, MemlockAccount::process_locked, Stage::pin, "VFIO_IOMMU_SPAPR_REGISTER_MEMORY",
                               Bytes{span.bytes()});
    case EBUSY:
    case EINVAL:
      return base::fail(Errc::busy, Stage::pin, why,
                        "memory [{:#x}, {:#x}] overlaps memory that something else in this process registered with "
                        "sPAPR; registrations of a process must not overlap",
                        span.start, span.last);
    case EPERM:
      return base::fail(Errc::permission, Stage::pin, why,
                        "the container belongs to another process: a sPAPR container works for the one that used it "
                        "first");
    default: return explain_call(Stage::pin, "VFIO_IOMMU_SPAPR_REGISTER_MEMORY", why);
  }
}

}  // namespace

void ChangeLog::add(MemorySpan span) noexcept {
  const std::lock_guard lock{mutex_};
  const auto distance = [&](const MemorySpan& other) {
    if (other.last < span.start) return span.start - other.last;
    return other.start > span.last ? other.start - span.last : 0;
  };
  const auto end = spans_.begin() + static_cast<std::ptrdiff_t>(count_);
  const auto nearest = std::min_element(
      spans_.begin(), end, [&](const MemorySpan& a, const MemorySpan& b) { return distance(a) < distance(b); });
  if (nearest != end && (distance(*nearest) <= 1 || count_ == spans_max))
    *nearest = {std::min(nearest->start, span.start), std::max(nearest->last, span.last)};
  else
    spans_[count_++] = span;
}

// Under the mutex, before a piece is made: what changed so far concerns those that are there.
void ProcessMemory::mark_changed() {
  changes_.drain([this](MemorySpan span) {
    auto at = pieces_.upper_bound(span.start);
    if (at != pieces_.begin() && std::prev(at)->second.last >= span.start) --at;
    for (; at != pieces_.end() && at->first <= span.last; ++at) at->second.stale = true;
  });
}

Result<std::vector<MemorySpan>> ProcessMemory::take(MemorySpan wanted) {
  const std::lock_guard lock{mutex_};
  mark_changed();
  std::vector<MemorySpan> cover;
  auto at = pieces_.upper_bound(wanted.start);
  if (at != pieces_.begin() && std::prev(at)->second.last >= wanted.start) --at;
  std::uint64_t from = wanted.start;
  for (; at != pieces_.end() && at->first <= wanted.last; ++at) {
    if (at->second.stale)
      return base::fail(Errc::busy, Stage::pin, 0,
                        "memory [{:#x}, {:#x}] changed while it was registered with sPAPR, and the old pages are still "
                        "in use; registrations go by address, so release the leases, mappings and registered memory "
                        "that need them, and try again",
                        at->first, at->second.last);
    if (from < at->first) cover.push_back({from, at->first - 1});
    cover.push_back({at->first, at->second.last});
    from = at->second.last + 1;
  }
  if (from <= wanted.last) cover.push_back({from, wanted.last});
  for (const MemorySpan& span : cover) {
    Piece& piece = pieces_[span.start];
    piece.last = span.last;
    ++piece.users;
  }
  return cover;
}

void ProcessMemory::give_back(std::uint64_t start) noexcept {
  const std::lock_guard lock{mutex_};
  const auto at = pieces_.find(start);
  if (at != pieces_.end() && --at->second.users == 0) pieces_.erase(at);
}

SpaceMemory::SpaceMemory(Kernel& kernel, int container, ProcessMemory& process) noexcept
    : kernel_{kernel},
      container_{container},
      process_{process},
      os_page_{static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE))} {}

Result<std::uint32_t> SpaceMemory::fresh_number() {
  if (!free_.empty()) {
    const std::uint32_t number = free_.back();
    free_.pop_back();
    return number;
  }
  if (count_ == registrations_max)
    return base::fail(Errc::limit_reached, Stage::pin, 0, "{} registrations are all that a space can tell apart",
                      registrations_max);
  const auto chunk = static_cast<unsigned>(std::bit_width((count_ >> first_chunk_bits) + 1)) - 1;
  if (!chunks_[chunk]) chunks_[chunk] = std::make_unique<Registration[]>(std::size_t{1} << (first_chunk_bits + chunk));
  free_.reserve(count_ + 1);  // so that giving a number back cannot fail
  return count_++;
}

Result<std::uint32_t> SpaceMemory::hold_piece(MemorySpan span) {
  if (const auto known = by_start_.find(span.start); known != by_start_.end()) {
    process_.give_back(span.start);                                   // this container was counted when it registered
    at(known->second).holds.fetch_add(1, std::memory_order_relaxed);  // relaxed: changes under the mutex
    return known->second;
  }
  const auto number = fresh_number();
  if (!number) {
    process_.give_back(span.start);
    return number.error();
  }
  uapi::SpaprRegisterMemory call{.vaddr = span.start, .size = span.bytes()};
  const long answer = kernel_.ioctl(container_, uapi::SpaprRegisterMemory::request, &call);
  if (answer != 0) {
    process_.give_back(span.start);
    free_.push_back(*number);
    return register_error(kernel_, answer, span);
  }
  Registration& registration = at(*number);
  registration.span = span;
  // relaxed: the number is not known to anybody yet.
  registration.tces.store(0, std::memory_order_relaxed);
  registration.holds.store(1, std::memory_order_relaxed);
  registration.used = true;
  by_start_.emplace(span.start, *number);
  return *number;
}

Result<std::vector<std::uint32_t>> SpaceMemory::hold(std::uint64_t address, std::uint64_t length) {
  const std::uint64_t start = base::align_down(address, os_page_);
  const auto beyond = base::checked_add(address, length);
  const auto end_of = beyond ? base::align_up(*beyond, os_page_) : std::nullopt;
  if (!end_of || *end_of <= start)
    return base::fail(Errc::overflow, Stage::pin, 0, "{} bytes from {:#x} are more than there are addresses", length,
                      address);
  const std::lock_guard lock{mutex_};
  const auto cover = process_.take({start, *end_of - 1});
  if (!cover) return cover.error();
  std::vector<std::uint32_t> held;
  held.reserve(cover->size());
  for (const MemorySpan& span : *cover) {
    const auto number = hold_piece(span);
    if (number) {
      held.push_back(*number);
      continue;
    }
    for (std::size_t i = held.size() + 1; i < cover->size(); ++i) process_.give_back((*cover)[i].start);
    for (const std::uint32_t taken : held) {
      at(taken).holds.fetch_sub(1, std::memory_order_relaxed);  // relaxed: changes under the mutex
      forget_if_idle(taken);
    }
    return number.error();
  }
  return held;
}

void SpaceMemory::release(const std::vector<std::uint32_t>& held) noexcept {
  const std::lock_guard lock{mutex_};
  for (const std::uint32_t number : held) {
    at(number).holds.fetch_sub(1, std::memory_order_relaxed);  // relaxed: changes under the mutex
    forget_if_idle(number);
  }
}

void SpaceMemory::drop_tces(std::uint32_t number, std::uint64_t count) noexcept {
  Registration& registration = at(number);
  // acq_rel: the last one sees what the others did before it unregisters.
  const std::uint64_t before = registration.tces.fetch_sub(count, std::memory_order_acq_rel);
  // relaxed: a region's hold is control plane and cannot go meanwhile; a map's is looked at again under the mutex.
  if (before != count || registration.holds.load(std::memory_order_relaxed) != 0) return;
  const std::lock_guard lock{mutex_};
  forget_if_idle(number);
}

// Under the mutex. A registration that was given up and made anew meanwhile is held or has TCEs, or is not in use.
void SpaceMemory::forget_if_idle(std::uint32_t number) noexcept {
  Registration& registration = at(number);
  // acquire: pairs with the release half of drop_tces() by whoever took the last TCE away.
  if (!registration.used || registration.holds.load(std::memory_order_relaxed) != 0 ||
      registration.tces.load(std::memory_order_acquire) != 0)
    return;
  by_start_.erase(registration.span.start);
  unregister(registration);
  free_.push_back(number);
}

void SpaceMemory::unregister(Registration& registration) noexcept {
  uapi::SpaprRegisterMemory call{.vaddr = registration.span.start, .size = registration.span.bytes()};
  // Whatever it answers, the kernel keeps the pages pinned as long as a TCE leads there, and lets all go with the
  // container.
  kernel_.ioctl(container_, uapi::SpaprRegisterMemory::unregister_request, &call);
  process_.give_back(registration.span.start);
  registration.used = false;
}

void SpaceMemory::drop_all() noexcept {
  const std::lock_guard lock{mutex_};
  for (const auto& [start, number] : by_start_) {
    Registration& registration = at(number);
    unregister(registration);
    // relaxed: control plane.
    registration.holds.store(0, std::memory_order_relaxed);
    registration.tces.store(0, std::memory_order_relaxed);
    free_.push_back(number);
  }
  by_start_.clear();
}

std::uint64_t SpaceMemory::bytes() const noexcept {
  const std::lock_guard lock{mutex_};
  std::uint64_t sum = 0;
  for (const auto& [start, number] : by_start_) sum += at(number).span.bytes();
  return sum;
}

}  // namespace iovane::backends::spapr
