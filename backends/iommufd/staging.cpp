#include "backends/iommufd/staging.hpp"

#include <algorithm>
#include <cerrno>

#include "backends/iommufd/ioas_calls.hpp"
#include "backends/kernel_call.hpp"
#include "backends/kernel_error.hpp"
#include "backends/range_list.hpp"
#include "backends/uapi/iommufd.hpp"
#include "base/checked_math.hpp"
#include "base/error_text.hpp"

namespace iovane::backends::iommufd {
namespace {

namespace uapi = backends::uapi::iommufd;

constexpr std::uint64_t chunk_bytes = 1ULL << 30;

std::uint64_t where(const MemoryRange& memory) noexcept {
  return memory.address != nullptr ? reinterpret_cast<std::uintptr_t>(memory.address) : memory.fd_offset;
}

bool same(const MemoryRange& a, const MemoryRange& b) noexcept {
  return a.address == b.address && a.length == b.length && a.fd == b.fd && a.fd_offset == b.fd_offset;
}

/// The staged address agrees with the memory's modulo the largest IOPTE that could cover a part of it.
std::uint64_t congruence(Bytes length, Bytes granule) noexcept {
  // 64 KiB and 32 MiB are what Arm's contiguous hint makes of pages and of blocks.
  for (const unsigned shift : {30U, 25U, 21U, 16U})
    if (length.value >> shift != 0) return std::max(std::uint64_t{1} << shift, granule.value);
  return granule.value;
}

}  // namespace

Staging::~Staging() {
  if (holder_ != 0) destroy(kernel_, fd_, holder_);
  if (ioas_ != 0) destroy(kernel_, fd_, ioas_);
}

Result<const StagedMemory*> Staging::acquire(const MemoryRange& memory) {
  const std::lock_guard lock{mutex_};
  for (StagedMemory& known : registrations_) {
    if (!same(known.memory, memory)) continue;
    ++known.references;
    return &known;
  }
  if (const auto there = have_ioas(); !there) return there.error();
  if (holder_ == 0 && !bound_.empty()) {
    if (const auto held = hold_pins(bound_.front()); !held) return held.error();
  }
  const auto room = find_room(memory);
  if (!room) return room.error();
  registrations_.push_back({memory, *room, true, 1});
  StagedMemory& staged = registrations_.back();
  try {
    used_.emplace(room->start.value, room->last.value);
  } catch (...) {
    registrations_.pop_back();
    throw;
  }
  if (const auto mapped = map_chunks(staged); !mapped) {
    used_.erase(room->start.value);
    registrations_.pop_back();
    return mapped.error();
  }
  return &staged;
}

void Staging::drop(const StagedMemory* staged) noexcept {
  const std::lock_guard lock{mutex_};
  for (auto at = registrations_.begin(); at != registrations_.end(); ++at) {
    if (&*at != staged) continue;
    if (--at->references != 0) return;
    // What the kernel fails to unmap stays pinned until the descriptor closes, and its room is never used again.
    if (unmap(at->staged) == 0) used_.erase(at->staged.start.value);
    registrations_.erase(at);
    return;
  }
}

Result<void> Staging::device_bound(std::uint32_t device) {
  const std::lock_guard lock{mutex_};
  if (holder_ == 0 && !registrations_.empty()) {
    if (const auto held = hold_pins(device); !held) return held;
  }
  bound_.push_back(device);
  return {};
}

void Staging::device_unbound(std::uint32_t device) noexcept {
  const std::lock_guard lock{mutex_};
  bound_.erase(std::remove(bound_.begin(), bound_.end(), device), bound_.end());
}

Result<void> Staging::have_ioas() {
  if (ioas_ != 0) return {};
  const auto ioas = ioas_alloc(kernel_, fd_);
  if (!ioas) return ioas.error();
  ioas_ = *ioas;
  return {};
}

Result<std::uint32_t> Staging::holder(std::uint32_t device) {
  const std::lock_guard lock{mutex_};
  if (holder_ != 0) return holder_;
  if (const auto there = have_ioas(); !there) return there.error();
  if (const auto held = hold_pins(device); !held) return held.error();
  return holder_;
}

Result<IovaRange> Staging::reserve(Bytes length) {
  const std::lock_guard lock{mutex_};
  if (const auto there = have_ioas(); !there) return there.error();
  if (usable_.empty()) {
    if (const auto asked = ask_usable(); !asked) return asked.error();
  }
  // Next fit: with many reservations alive the first one would be found by walking over all of them.
  auto room = first_fit(next_room_, length, granule_.value, 0);
  if (!room) room = first_fit(0, length, granule_.value, 0);
  if (!room)
    return base::fail(Errc::iova_exhausted, Stage::pin, 0,
                      "no room for {} bytes in the intermediate address space; unmap or unregister memory that is not "
                      "needed",
                      length.value);
  used_.emplace(room->start.value, room->last.value);
  next_room_ = room->last.value == iova_max.value ? 0 : room->last.value + 1;
  return *room;
}

void Staging::release(IovaRange room) noexcept {
  const std::lock_guard lock{mutex_};
  used_.erase(room.start.value);
}

int Staging::map_at(Iova at, std::uint64_t address, Bytes length, bool writable) noexcept {
  uapi::IoasMap map{
      .flags = uapi::ioas_map_fixed_iova | uapi::ioas_map_readable | (writable ? uapi::ioas_map_writeable : 0),
      .ioas_id = ioas_,
      .user_va = address,
      .length = length.value,
      .iova = at.value};
  return call(kernel_, fd_, map);
}

Result<void> Staging::hold_pins(std::uint32_t device) {
  uapi::HwptAlloc alloc{.flags = options_.holder_flags, .dev_id = device, .pt_id = ioas_};
  const int why = call(kernel_, fd_, alloc);
  if (why == 0) {
    holder_ = alloc.out_hwpt_id;
    usable_.clear();  // the IOMMU may reach less than 64 bits
    return {};
  }
  if (why == EOPNOTSUPP && (options_.holder_flags & uapi::hwpt_alloc_nest_parent) != 0)
    return base::fail(Errc::unsupported, Stage::attach, why,
                      "no nesting: this IOMMU, its driver or this kernel (6.7 or newer is needed) translates in one "
                      "stage only");
  Bytes registered{};
  for (const StagedMemory& staged : registrations_) registered.value += staged.memory.length.value;
  if (why == ENOMEM)
    return explain_no_memory(kernel_, MemlockAccount::user_pinned, Stage::pin, "HWPT_ALLOC for registered memory",
                             registered);
  if (why == EFAULT)
    return base::fail(Errc::bad_memory, Stage::pin, why,
                      "memory registered before this device ({} bytes) cannot be pinned: part of it is not mapped in "
                      "this process, read-only, or device memory; unregister it first",
                      registered.value);
  if (why == EADDRINUSE)
    return base::fail(Errc::iova_reserved, Stage::pin, why,
                      "memory registered before this device ({} bytes) lies beyond what its IOMMU can translate; "
                      "register it again after the device",
                      registered.value);
  return explain_call(Stage::pin, "HWPT_ALLOC", why);
}

Result<void> Staging::ask_usable() {
  const auto usable = ioas_ranges(kernel_, fd_, ioas_);
  if (!usable) return usable.error();
  usable_ = whole_granules(without(*usable, options_.avoid), granule_);
  return {};
}

// First fit from `from` up: small apertures fill last.
std::optional<IovaRange> Staging::first_fit(std::uint64_t from, Bytes length, std::uint64_t modulus,
                                            std::uint64_t phase) const noexcept {
  for (const IovaRange& window : usable_) {
    if (window.last.value < from) continue;
    std::uint64_t at = std::max(window.start.value, from);
    auto next = used_.upper_bound(at);
    if (next != used_.begin()) --next;  // it may reach beyond
    while (true) {
      const auto base = base::align_up(at, modulus);
      const auto start = base ? base::checked_add(*base, phase) : std::nullopt;
      const auto fit = start ? IovaRange::from_length(Iova{*start}, length) : std::nullopt;
      if (!fit || fit->last > window.last) break;
      while (next != used_.end() && next->second < fit->start.value) ++next;
      if (next == used_.end() || next->first > fit->last.value) return *fit;
      if (next->second == iova_max.value) break;
      at = next->second + 1;
    }
  }
  return std::nullopt;
}

Result<IovaRange> Staging::find_room(const MemoryRange& memory) {
  if (const auto asked = ask_usable(); !asked) return asked.error();
  const std::uint64_t modulus = congruence(memory.length, granule_);
  if (const auto room = first_fit(0, memory.length, modulus, where(memory) & (modulus - 1))) return *room;
  return base::fail(Errc::iova_exhausted, Stage::pin, 0,
                    "no room for {} bytes in the staging address space; unregister memory that is not needed",
                    memory.length.value);
}

Result<void> Staging::map_chunks(StagedMemory& staged) {
  IovaRange rest = staged.staged;
  while (true) {
    const std::uint64_t border = rest.start.value | (chunk_bytes - 1);
    const IovaRange chunk{rest.start, std::min(rest.last, Iova{border})};
    int why = map_chunk(staged, chunk);
    if (why == EFAULT && staged.writable && chunk.start == staged.staged.start) {
      // Memory that this process may only read pins as read-only. Every chunk then agrees with the first.
      staged.writable = false;
      why = map_chunk(staged, chunk);
    }
    if (why != 0) {
      if (staged.staged.start < chunk.start) unmap({staged.staged.start, Iova{chunk.start.value - 1}});
      MapFailure failure{.call = "registering memory (IOAS_MAP)",
                         .os_errno = why,
                         .range = chunk,
                         .memory = where(staged.memory) + (chunk.start.value - staged.staged.start.value),
                         .access = Access::read_write};
      if (why == EINVAL || why == EOVERFLOW || why == EADDRINUSE)
        return base::fail(Errc::invalid_argument, Stage::pin, why,
                          "memory at {:#x} of {} bytes cannot be registered: address, offset and length must be "
                          "multiples of {}, and a descriptor must be a memfd, hugetlbfs file or dma-buf",
                          where(staged.memory), staged.memory.length.value, granule_.value);
      Error error = explain_map(kernel_, failure, {});
      error.stage = Stage::pin;
      return error;
    }
    if (chunk.last == rest.last) return {};
    rest.start = Iova{chunk.last.value + 1};
  }
}

int Staging::map_chunk(const StagedMemory& staged, IovaRange chunk) noexcept {
  const std::uint64_t offset = chunk.start.value - staged.staged.start.value;
  const std::uint32_t flags =
      uapi::ioas_map_fixed_iova | uapi::ioas_map_readable | (staged.writable ? uapi::ioas_map_writeable : 0);
  if (staged.memory.fd >= 0 && map_file_) {
    uapi::IoasMapFile map{.flags = flags,
                          .ioas_id = ioas_,
                          .fd = staged.memory.fd,
                          .start = staged.memory.fd_offset + offset,
                          .length = chunk.length().value,
                          .iova = chunk.start.value};
    return settled(call(kernel_, fd_, map), chunk);
  }
  uapi::IoasMap map{.flags = flags,
                    .ioas_id = ioas_,
                    .user_va = reinterpret_cast<std::uintptr_t>(staged.memory.address) + offset,
                    .length = chunk.length().value,
                    .iova = chunk.start.value};
  return settled(call(kernel_, fd_, map), chunk);
}

// A map whose answer could not be written back fails, and stands: it is taken out.
int Staging::settled(int why, IovaRange chunk) noexcept {
  if (why == EFAULT) unmap(chunk);
  return why;
}

int Staging::unmap(IovaRange range) noexcept {
  uapi::IoasUnmap unmap{.ioas_id = ioas_, .iova = range.start.value, .length = range.length().value};
  int why = call(kernel_, fd_, unmap);
  if (why != EFAULT) return why;
  // Nor can an unmap's: then it has happened, and the second one finds nothing.
  unmap.length = range.length().value;
  why = call(kernel_, fd_, unmap);
  return why == ENOENT ? 0 : why;
}

}  // namespace iovane::backends::iommufd
