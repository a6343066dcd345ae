// AddressSpace's calls on its cache, and on memory that is pinned in bulk.
#include <new>
#include <utility>

#include "base/error_text.hpp"
#include "engine/out_of_memory.hpp"
#include "engine/space_cache.hpp"
#include "engine/space_core.hpp"
#include "iovane/address_space.hpp"
#include "pinning/population.hpp"
#include "pinning/preflight.hpp"

namespace iovane {

using engine::CountedLease;
using engine::SpaceCache;

namespace {

Error no_cache() noexcept {
  return make_error(Errc::closed, Stage::validate, "no cache is open: call AddressSpace::open_cache() first");
}

pinning::PinningBackend charged_as(backends::Interface interface) noexcept {
  using backends::Interface;
  using pinning::PinningBackend;
  switch (interface) {
    case Interface::iommufd:
    case Interface::stage1: return PinningBackend::iommufd;
    case Interface::type1_v2:
    case Interface::type1_v1: return PinningBackend::type1;
    case Interface::compat_v2:
    case Interface::compat_v1: return PinningBackend::iommufd_process_mode;  // the compatibility interface's default
    case Interface::spapr_v2: return PinningBackend::spapr_v2;
    case Interface::spapr_v1: return PinningBackend::spapr_v1;
  }
  return PinningBackend::iommufd;
}

}  // namespace

Result<void> AddressSpace::open_cache(const CacheConfig& config) {
  return engine::or_out_of_memory(Stage::open, [&] { return core_->open_cache(config); });
}

void MemoryLease::release_counted() noexcept { delete std::exchange(counted_, nullptr); }

// Counted leases are rare: threads with more leases than guard words, and those that asked for it.
Result<MemoryLease> AddressSpace::counted(pinning::Hold&& hold) noexcept {
  MemoryLease lease;
  lease.iova_ = Iova{hold.address()};
  lease.length_ = hold.length();
  lease.counted_ = new (std::nothrow) CountedLease{core_, std::move(hold)};
  if (lease.counted_ == nullptr) return make_error(Errc::out_of_memory, Stage::publish, "no memory for a lease");
  return lease;
}

Result<MemoryLease> AddressSpace::acquire(const MemoryPiece& memory, Access access) noexcept {
  // The usual hit: process memory, leased by a guard word. Everything else is a call, so that nothing but the result
  // is kept in memory here.
  SpaceCache* const cache = core_->cache();
  const auto keys = pinning::MemoryRange::from_length(memory.offset, memory.length);
  if (cache != nullptr && !memory.memory && keys && keys->last < pinning::file_key_first) [[likely]] {
    pinning::Lease found = cache->map_cache().try_acquire_by_guard(*keys, access);
    MemoryLease lease;
    lease.iova_ = Iova{found.address()};
    lease.length_ = found.length();
    lease.guard_ = found.detach();
    if (lease.guard_ != nullptr) [[likely]]
      return lease;
  }
  return acquire_slowly(memory, access);
}

Result<MemoryLease> AddressSpace::acquire_slowly(const MemoryPiece& memory, Access access) noexcept {
  SpaceCache* const cache = core_->cache();
  if (cache == nullptr) return no_cache();
  const auto keys = cache->keys_of(memory);
  if (!keys) return keys.error();
  auto found = cache->map_cache().acquire(*keys, access);
  if (!found) return found.error();
  MemoryLease lease;
  lease.iova_ = Iova{found->address()};
  lease.length_ = found->length();
  lease.guard_ = found->detach();
  if (lease.guard_ == nullptr) return counted(found->hold());
  return lease;
}

Result<MemoryLease> AddressSpace::acquire_portable(const MemoryPiece& memory, Access access) noexcept {
  SpaceCache* const cache = core_->cache();
  if (cache == nullptr) return no_cache();
  const auto keys = cache->keys_of(memory);
  if (!keys) return keys.error();
  auto hold = cache->map_cache().acquire_hold(*keys, access);
  if (!hold) return hold.error();
  return counted(*std::move(hold));
}

Result<std::size_t> AddressSpace::acquire_all(const MemoryPiece& memory, Access access,
                                              std::span<MemoryLease> out) noexcept {
  std::size_t count = 0;
  Error refused{};
  MemoryPiece rest = memory;
  while (count < out.size()) {
    auto lease = acquire(rest, access);
    if (!lease) {
      refused = lease.error();
      break;
    }
    const std::uint64_t covered = lease->length().value;
    out[count++] = *std::move(lease);
    if (covered >= rest.length.value) return count;
    rest.offset += covered;
    rest.length.value -= covered;
  }
  for (std::size_t i = 0; i < count; ++i) out[i].release();
  if (refused) return refused;
  return base::fail(Errc::limit_reached, Stage::pin, 0,
                    "{} bytes at {:#x} lie in more than {} mappings: ask for smaller parts, or open the cache with a "
                    "larger chunk",
                    memory.length.value, memory.offset, out.size());
}

std::size_t AddressSpace::invalidate(const MemoryPiece& memory) noexcept {
  SpaceCache* const cache = core_->cache();
  if (cache == nullptr) return 0;
  const auto keys = cache->keys_of(memory);
  if (!keys) return 0;
  const std::size_t count = cache->map_cache().invalidate(*keys);
  cache->map_cache().collect();
  return count;
}

Bytes AddressSpace::evict(Bytes bytes) noexcept {
  SpaceCache* const cache = core_->cache();
  return cache != nullptr ? cache->evict(bytes) : Bytes{};
}

CacheStats AddressSpace::cache_stats() const noexcept {
  SpaceCache* const cache = core_->cache();
  return cache != nullptr ? cache->stats() : CacheStats{};
}

Result<void> AddressSpace::check_memlock(Bytes planned) const {
  const backends::MemlockUse account = core_->memlock_use();
  const auto or_unlimited = [](std::optional<Bytes> limit) {
    return limit ? limit->value : pinning::MemlockState::unlimited;
  };
  const pinning::MemlockState state{.soft_limit = or_unlimited(account.limit),
                                    .hard_limit = or_unlimited(account.hard_limit),
                                    .locked = account.locked.value,
                                    .pinned = account.pinned.value,
                                    .exempt = account.exempt};
  const pinning::PlannedUse use{.backend = charged_as(core_->interface()), .memory = planned};
  const auto report = pinning::preflight({&use, 1}, state);
  if (!report) return report.error();
  return {};
}

Result<Memory> AddressSpace::register_memory(const MemoryConfig& config, const PopulateConfig& populate) {
  constexpr Bytes border{std::uint64_t{1} << 30};
  if (auto fits = check_memlock(config.length); !fits) return fits.error();
  // Of a file alone only the length counts; its pieces are cut where the file's huge pages are.
  const std::uint64_t start =
      config.address != nullptr ? reinterpret_cast<std::uintptr_t>(config.address) : config.fd_offset;
  const auto range = pinning::MemoryRange::from_length(start, config.length);
  if (!range)
    return base::fail(Errc::invalid_argument, Stage::validate, 0, "{} bytes at {:#x} are not a range of memory",
                      config.length.value, start);
  pinning::PopulationConfig settings;
  settings.threads = populate.threads;
  settings.os_page = populate.os_page;
  settings.progress = populate.progress;
  const int fd = config.address != nullptr ? -1 : config.fd;
  if (auto present = pinning::Population::prefault(*range, fd, config.fd_offset, border, settings); !present)
    return present.error();
  return register_memory(config);
}

}  // namespace iovane
