#include "backends/kernel_error.hpp"

#include <cerrno>

#include "backends/range_list.hpp"
#include "base/error_text.hpp"
#include "base/os_error.hpp"

namespace iovane::backends {
namespace {

std::uint64_t used_bytes(const MemlockUse& use, MemlockAccount account) noexcept {
  return account == MemlockAccount::user_pinned ? use.pinned.value : use.locked.value;
}

bool limited(const MemlockUse& use) noexcept { return use.limit.has_value() && !use.exempt; }

Error explain_range(const MapFailure& f, std::span<const IovaRange> usable) noexcept {
  if (const auto hole = first_missing(usable, f.range))
    return base::fail(Errc::iova_reserved, Stage::map, f.os_errno,
                      "{} of [{:#x}, {:#x}]: [{:#x}, {:#x}] is reserved by the host or cannot be translated; choose an "
                      "IOVA inside the usable ranges",
                      f.call, f.range.start.value, f.range.last.value, hole->start.value, hole->last.value);
  return base::fail(Errc::invalid_argument, Stage::map, f.os_errno,
                    "{} of [{:#x}, {:#x}] from {:#x} with access {}: refused as malformed; IOVA, length and memory "
                    "must be multiples of the granule and some access must be asked for",
                    f.call, f.range.start.value, f.range.last.value, f.memory, static_cast<unsigned>(f.access));
}

}  // namespace

Headroom memlock_headroom(Kernel& kernel, MemlockAccount account) noexcept {
  Headroom room{.entries = std::nullopt, .memlock = std::nullopt, .memlock_use = kernel.memlock()};
  if (!limited(room.memlock_use)) return room;
  const std::uint64_t limit = room.memlock_use.limit->value;
  const std::uint64_t used = used_bytes(room.memlock_use, account);
  room.memlock = Bytes{used < limit ? limit - used : 0};
  return room;
}

Error explain_no_memory(Kernel& kernel, MemlockAccount account, Stage stage, std::string_view call,
                        Bytes need) noexcept {
  const MemlockUse use = kernel.memlock();
  const std::uint64_t used = used_bytes(use, account);
  if (limited(use) && (used > use.limit->value || need.value > use.limit->value - used))
    return base::fail(Errc::memlock_exceeded, stage, ENOMEM,
                      "{}: pinning {} bytes more would pass RLIMIT_MEMLOCK: limit {} bytes, {} in use by this process; "
                      "raise it (ulimit -l, LimitMEMLOCK=, setrlimit){}",
                      call, need.value, use.limit->value, used,
                      account == MemlockAccount::user_pinned ? "; other processes of this user count too" : "");
  if (limited(use))
    return base::fail(Errc::out_of_memory, stage, ENOMEM,
                      "{}: no memory for {} bytes; RLIMIT_MEMLOCK of {} bytes has room ({} in use by this process{})",
                      call, need.value, use.limit->value, used,
                      account == MemlockAccount::user_pinned ? ", other processes of this user not seen" : "");
  return base::fail(Errc::out_of_memory, stage, ENOMEM, "{}: the kernel has no memory for {} bytes", call, need.value);
}

Error explain_map(Kernel& kernel, const MapFailure& f, std::span<const IovaRange> usable) noexcept {
  switch (f.os_errno) {
    case EINVAL:
    case EOVERFLOW:
    case EADDRINUSE: return explain_range(f, usable);
    case EEXIST:
      return base::fail(Errc::iova_busy, Stage::map, EEXIST,
                        "{}: [{:#x}, {:#x}] overlaps a live mapping; unmap it first", f.call, f.range.start.value,
                        f.range.last.value);
    case ENOMEM: return explain_no_memory(kernel, f.account, Stage::map, f.call, f.range.length());
    case ENOSPC:
      return base::fail(Errc::entry_limit, Stage::map, ENOSPC,
                        "{}: the container accepts no further mappings (limit {}); unmap some, map larger ranges, or "
                        "raise vfio_iommu_type1's dma_entry_limit",
                        f.call, f.entries_max);
    case EFAULT:
      return base::fail(Errc::bad_memory, Stage::map, EFAULT,
                        "{}: memory at {:#x} is not mapped in this process, not writable although the device may "
                        "write, or of a kind that cannot be pinned (device BARs need type1)",
                        f.call, f.memory);
    case EPERM:
      return base::fail(Errc::permission, Stage::map, EPERM,
                        "{}: the memory at {:#x} was registered without write access; map it for reading", f.call,
                        f.memory);
    default: return explain_call(Stage::map, f.call, f.os_errno);
  }
}

Error explain_call(Stage stage, std::string_view call, int os_errno) noexcept {
  return base::fail(base::errc_from_errno(os_errno), stage, os_errno, "{} failed with errno {}", call, os_errno);
}

}  // namespace iovane::backends
