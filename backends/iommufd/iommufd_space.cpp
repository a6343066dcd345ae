#include "backends/iommufd/iommufd_space.hpp"

#include <algorithm>
#include <cerrno>

#include "backends/iommufd/ioas_calls.hpp"
#include "backends/kernel_error.hpp"
#include "backends/range_list.hpp"
#include "backends/uapi/iommufd.hpp"
#include "backends/uapi/vfio.hpp"
#include "base/checked_math.hpp"
#include "base/error_text.hpp"

namespace iovane::backends::iommufd {
namespace {

namespace uapi = backends::uapi::iommufd;

constexpr std::uint32_t map_flags(Access access) noexcept {
  return uapi::ioas_map_fixed_iova | (may_read(access) ? uapi::ioas_map_readable : 0) |
         (may_write(access) ? uapi::ioas_map_writeable : 0);
}

}  // namespace

IommufdSpace::IommufdSpace(SharedDescriptor& shared, std::uint32_t ioas, const SpaceOptions& options)
    : shared_{shared}, ioas_{ioas}, options_{options} {
  facts_.interface = Interface::iommufd;
  facts_.capabilities = Capability::explicit_pin | Capability::copy_reuses_pin | Capability::parallel_map |
                        Capability::span_unmap | Capability::promise_ranges | Capability::unmap_all;
  if (shared.map_file()) facts_.capabilities = facts_.capabilities | Capability::file_memory;
  if (options.dirty_tracking) facts_.capabilities = facts_.capabilities | Capability::dirty_tracking;
  facts_.granule = shared.granule();
}

IommufdSpace::~IommufdSpace() {
  while (!devices_.empty()) {
    if (detach(devices_.back().id)) continue;
    // The kernel would not detach it; closing its descriptor does.
    shared_.unbind(devices_.back());
    devices_.pop_back();
  }
  for (const std::uint32_t table : own_tables_) destroy(shared_.kernel(), shared_.fd(), table);
  close_fault_queue();
  destroy(shared_.kernel(), shared_.fd(), ioas_);
  for (const StagedMemory* staged : regions_)
    if (staged != nullptr) shared_.staging().drop(staged);
}

void IommufdSpace::execute(std::span<const BackendOp> ops, std::span<BackendOpResult> results) noexcept {
  for (std::size_t i = 0; i < ops.size(); ++i) results[i] = run(ops[i]);
}

[[gnu::always_inline]] inline BackendOpResult IommufdSpace::run(const BackendOp& op) noexcept {
  switch (op.kind) {
    case OpKind::map: return map(op);
    case OpKind::copy: return op.range.length() < options_.copy_from ? copy_or_map(op) : copy(op);
    case OpKind::unmap: return unmap(op.range);
    case OpKind::replace: break;
  }
  return {
      base::fail(Errc::unsupported, Stage::map, 0, "iommufd cannot replace a mapping in place; unmap it and map again"),
      {}};
}

const StagedMemory* IommufdSpace::region_of(const BackendOp& op) const noexcept {
  if (op.region.value == 0 || op.region.value > regions_.size()) return nullptr;
  const StagedMemory* const staged = regions_[op.region.value - 1];
  if (staged == nullptr || op.range.span() > staged->staged.span()) return nullptr;
  return op.memory <= staged->staged.span() - op.range.span() ? staged : nullptr;
}

BackendOpResult IommufdSpace::map(const BackendOp& op) noexcept {
  const std::uint64_t length = op.range.length().value;
  std::uint64_t memory = op.memory;
  int why = 0;
  if (op.region.value != 0) {
    const StagedMemory* const staged = region_of(op);
    if (staged == nullptr)
      return {base::fail(Errc::invalid_argument, Stage::map, 0, "{} bytes at offset {:#x} are not inside region {}",
                         length, op.memory, op.region.value),
              {}};
    if (staged->memory.address == nullptr) {
      memory = staged->memory.fd_offset + op.memory;
      uapi::IoasMapFile file{.flags = map_flags(op.access),
                             .ioas_id = ioas_,
                             .fd = staged->memory.fd,
                             .start = memory,
                             .length = length,
                             .iova = op.range.start.value};
      why = call(shared_.kernel(), shared_.fd(), file);
      if (why == 0) return {{}, Bytes{length}};
      return {map_error("IOAS_MAP_FILE", why, op, memory), {}};
    }
    memory = reinterpret_cast<std::uintptr_t>(staged->memory.address) + op.memory;
  }
  uapi::IoasMap map{.flags = map_flags(op.access),
                    .ioas_id = ioas_,
                    .user_va = memory,
                    .length = length,
                    .iova = op.range.start.value};
  why = call(shared_.kernel(), shared_.fd(), map);
  if (why == 0) [[likely]]
    return {{}, Bytes{length}};
  return {map_error("IOAS_MAP", why, op, memory), {}};
}

[[gnu::always_inline]] inline BackendOpResult IommufdSpace::copy(const BackendOp& op) noexcept {
  const std::uint64_t length = op.range.length().value;
  const StagedMemory* const staged = region_of(op);
  if (staged == nullptr)
    return {base::fail(Errc::invalid_argument, Stage::map, 0, "{} bytes at offset {:#x} are not inside region {}",
                       length, op.memory, op.region.value),
            {}};
  uapi::IoasCopy copy{.flags = map_flags(op.access),
                      .dst_ioas_id = ioas_,
                      .src_ioas_id = staging_ioas_,
                      .length = length,
                      .dst_iova = op.range.start.value,
                      .src_iova = staged->staged.start.value + op.memory};
  const int why = call(shared_.kernel(), shared_.fd(), copy);
  if (why == 0) [[likely]]
    return {{}, Bytes{length}};
  return {map_error("IOAS_COPY", why, op, op.memory), {}};
}

// For lengths below SpaceOptions::copy_from.
BackendOpResult IommufdSpace::copy_or_map(const BackendOp& op) noexcept {
  const BackendOpResult mapped = map(op);
  if (!mapped.error || mapped.error.code == Errc::iova_busy) [[likely]]
    return mapped;
  // A map whose answer could not be written back fails, and stands.
  if (mapped.error.os_errno == EFAULT && unmap(op.range).error) return mapped;
  // What a second pin meets (memlock, memory that its owner took away) a copy need not.
  return copy(op);
}

BackendOpResult IommufdSpace::unmap(IovaRange range) noexcept {
  if (range == IovaRange::everything()) {
    const auto gone = unmap_all();
    return {gone.error(), gone.value_or(Bytes{})};
  }
  if (harvest_ != nullptr) [[unlikely]]
    harvest(range);
  uapi::IoasUnmap unmap{.ioas_id = ioas_, .iova = range.start.value, .length = range.length().value};
  const int why = call(shared_.kernel(), shared_.fd(), unmap);
  if (why == 0) [[likely]]
    return {{}, Bytes{unmap.length}};
  if (why == ENOENT && !cuts_mapping(shared_.kernel(), shared_.fd(), ioas_, range)) return {{}, {}};
  if (why == ENOENT)
    return {base::fail(Errc::would_bisect, Stage::unmap, why,
                       "IOAS_UNMAP of [{:#x}, {:#x}] would cut a mapping; whole mappings before the cut are gone",
                       range.start.value, range.last.value),
            {}};
  if (why == EBUSY)
    return {base::fail(Errc::busy, Stage::unmap, why,
                       "IOAS_UNMAP of [{:#x}, {:#x}]: a mapping inside is still being made or is pinned by hardware",
                       range.start.value, range.last.value),
            {}};
  return {explain_call(Stage::unmap, "IOAS_UNMAP", why), {}};
}

Result<Bytes> IommufdSpace::unmap_all() noexcept {
  if (harvest_ != nullptr) harvest(IovaRange::everything());
  uapi::IoasUnmap unmap{.ioas_id = ioas_, .iova = 0, .length = iova_max.value};
  const int why = call(shared_.kernel(), shared_.fd(), unmap);
  if (why == 0) return Bytes{unmap.length};
  if (why == ENOENT) return Bytes{0};
  return explain_call(Stage::unmap, "IOAS_UNMAP of everything", why);
}

Error IommufdSpace::map_error(const char* name, int os_errno, const BackendOp& op, std::uint64_t memory) noexcept {
  const MapFailure failure{.call = name,
                           .os_errno = os_errno,
                           .range = op.range,
                           .memory = memory,
                           .access = op.access,
                           .account = MemlockAccount::user_pinned};
  if (!needs_usable_ranges(os_errno)) return explain_map(shared_.kernel(), failure, {});
  try {
    const auto usable = ioas_ranges(shared_.kernel(), shared_.fd(), ioas_);
    if (usable) return explain_map(shared_.kernel(), failure, *usable);
  } catch (...) {
    // No memory to ask for the ranges: the general explanation has to do.
  }
  return explain_call(Stage::map, name, os_errno);
}

Result<RegionId> IommufdSpace::register_memory(const MemoryRange& memory) {
  const std::uint64_t granule = facts_.granule.value;
  const auto address = reinterpret_cast<std::uintptr_t>(memory.address);
  if (memory.length.value == 0 || !base::is_aligned(memory.length.value | address | memory.fd_offset, granule))
    return base::fail(
        Errc::invalid_argument, Stage::pin, 0,
        "memory at {:#x} (file offset {:#x}) of {} bytes cannot be registered: all three must be multiples "
        "of {}, and the length not 0",
        address, memory.fd_offset, memory.length.value, granule);
  if (memory.address == nullptr && (memory.fd < 0 || !shared_.map_file()))
    return base::fail(
        Errc::unsupported, Stage::pin, 0,
        "memory without a process address needs a file descriptor and IOAS_MAP_FILE (Linux 6.13); map the "
        "file into the process and register its address");
  regions_.reserve(regions_.size() + 1);
  const auto staged = shared_.staging().acquire(memory);
  if (!staged) return staged.error();
  staging_ioas_ = shared_.staging().ioas();
  regions_.push_back(*staged);
  return RegionId{static_cast<std::uint32_t>(regions_.size())};
}

Result<void> IommufdSpace::unregister_memory(RegionId region) {
  if (region.value == 0 || region.value > regions_.size() || regions_[region.value - 1] == nullptr)
    return base::fail(Errc::not_found, Stage::unpin, 0, "region {} is not registered with this space", region.value);
  shared_.staging().drop(std::exchange(regions_[region.value - 1], nullptr));
  return {};
}

Result<std::vector<IovaRange>> IommufdSpace::usable_ranges() {
  const auto ranges = ioas_ranges(shared_.kernel(), shared_.fd(), ioas_);
  if (!ranges) return ranges.error();
  return whole_granules(*ranges, facts_.granule);
}

Result<void> IommufdSpace::promise(std::span<const IovaRange> ranges) {
  return ioas_allow(shared_.kernel(), shared_.fd(), ioas_, ranges);
}

Headroom IommufdSpace::headroom() noexcept { return memlock_headroom(shared_.kernel(), MemlockAccount::user_pinned); }

}  // namespace iovane::backends::iommufd
