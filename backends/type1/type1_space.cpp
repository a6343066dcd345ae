#include "backends/type1/type1_space.hpp"

#include <unistd.h>

#include <cerrno>
#include <iterator>

#include "backends/iommufd/ioas_calls.hpp"
#include "backends/range_list.hpp"
#include "backends/uapi/iommufd.hpp"
#include "backends/uapi/vfio.hpp"
#include "base/checked_math.hpp"
#include "base/error_text.hpp"

namespace iovane::backends::type1 {
namespace {

namespace uapi = backends::uapi::vfio;

constexpr std::uint32_t map_flags(Access access) noexcept {
  return (may_read(access) ? uapi::dma_map_flag_read : 0) | (may_write(access) ? uapi::dma_map_flag_write : 0);
}

}  // namespace

bool LiveStarts::prepare() noexcept {
  if (!spare_.empty()) return true;
  try {
    // Room for every node to come back; doubled, so that growing is rare.
    if (spare_.capacity() < live_.size() + 2) spare_.reserve(2 * live_.size() + 16);
    Map fresh;
    fresh.emplace(0, 0);
    spare_.push_back(fresh.extract(fresh.begin()));
    return true;
  } catch (...) {
    return false;
  }
}

void LiveStarts::insert(IovaRange range) noexcept {
  Map::node_type node = std::move(spare_.back());
  spare_.pop_back();
  node.key() = range.start.value;
  node.mapped() = range.last.value;
  live_.insert(std::move(node));
}

void LiveStarts::erase(Iova start) noexcept {
  Map::node_type node = live_.extract(start.value);
  // prepare() keeps the capacity at or above the number of live nodes; without room the node is simply freed.
  if (node && spare_.size() < spare_.capacity()) spare_.push_back(std::move(node));
}

void LiveStarts::clear() noexcept { live_.clear(); }

std::optional<IovaRange> LiveStarts::next(Iova from, Iova last) const noexcept {
  const auto at = live_.lower_bound(from.value);
  if (at == live_.end() || at->first > last.value) return std::nullopt;
  return IovaRange{Iova{at->first}, Iova{at->second}};
}

bool LiveStarts::cut_by(const IovaRange& range) const noexcept {
  auto after = live_.upper_bound(range.last.value);
  if (after != live_.begin() && std::prev(after)->second > range.last.value) return true;
  auto first = live_.lower_bound(range.start.value);
  return first != live_.begin() && std::prev(first)->second >= range.start.value;
}

Type1Space::Type1Space(Kernel& kernel, KernelFd container, Interface interface, std::uint32_t ioas,
                       const SpaceOptions& options)
    : kernel_{kernel},
      container_{std::move(container)},
      ioas_{ioas},
      options_{options},
      groups_{kernel, container_.get(),
              interface == Interface::type1_v1 || interface == Interface::compat_v1 ? uapi::type1_iommu
                                                                                    : uapi::type1_v2_iommu} {
  facts_.interface = interface;
  facts_.granule = Bytes{static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE))};
  map_last_ = compat() ? iova_max : last_mappable();
  if (!version_1()) facts_.capabilities = facts_.capabilities | Capability::span_unmap;
  if (kernel.ioctl_value(container_.get(), uapi::check_extension, uapi::unmap_all) == 1)
    facts_.capabilities = facts_.capabilities | Capability::unmap_all;
  facts_.capabilities = facts_.capabilities | (compat() ? Capability::promise_ranges : Capability::mmio_memory);
  if (options.dirty_tracking) facts_.capabilities = facts_.capabilities | Capability::dirty_tracking;
  facts_.dirty_reads_whole_mappings = true;
}

Type1Space::~Type1Space() {
  if (!compat()) return;  // the container takes its mappings along
  // A descriptor that was handed in lives on; what this space made on it must not.
  groups_.leave_all();
  backends::uapi::iommufd::VfioIoas clear{.op = backends::uapi::iommufd::vfio_ioas_clear};
  call(kernel_, container_.get(), clear);
  iommufd::destroy(kernel_, container_.get(), ioas_);
}

void Type1Space::execute(std::span<const BackendOp> ops, std::span<BackendOpResult> results) noexcept {
  for (std::size_t i = 0; i < ops.size(); ++i) results[i] = run(ops[i]);
}

[[gnu::always_inline]] inline BackendOpResult Type1Space::run(const BackendOp& op) noexcept {
  switch (op.kind) {
    case OpKind::map: return map(op);
    case OpKind::unmap: return unmap(op.range);
    case OpKind::copy:
    case OpKind::replace: break;
  }
  return {base::fail(Errc::unsupported, Stage::map, 0, "{} has no {}; map the memory instead",
                     to_string(facts_.interface), op.kind == OpKind::copy ? "copy" : "replace in place"),
          {}};
}

// Where the operation's memory lies in this process; false when the region it names does not hold it.
inline bool Type1Space::locate(const BackendOp& op, std::uint64_t& address) const noexcept {
  address = op.memory;
  if (op.region.value == 0) return true;
  if (op.region.value > regions_.size()) [[unlikely]]
    return false;
  const MemoryRange& region = regions_[op.region.value - 1];
  const std::uint64_t span = op.range.span();
  if (span >= region.length.value || op.memory >= region.length.value - span) [[unlikely]]
    return false;
  address += reinterpret_cast<std::uintptr_t>(region.address);
  return true;
}

[[gnu::always_inline]] inline BackendOpResult Type1Space::map(const BackendOp& op) noexcept {
  std::uint64_t address = 0;
  if (op.range.last > map_last_ || !locate(op, address)) [[unlikely]]
    return {bad_map(op), {}};
  if (version_1() && !starts_.prepare())
    return {base::fail(Errc::out_of_memory, Stage::map, 0, "no memory to remember a mapping"), {}};
  const std::uint64_t length = op.range.length().value;
  uapi::Type1DmaMap map{.flags = map_flags(op.access), .vaddr = address, .iova = op.range.start.value, .size = length};
  const int why = call(kernel_, container_.get(), map);
  if (why != 0) [[unlikely]]
    return {map_error(why, op, address), {}};
  live_bytes_ += length;
  if (version_1()) starts_.insert(op.range);
  return {{}, Bytes{length}};
}

// Why the kernel was not asked.
Error Type1Space::bad_map(const BackendOp& op) const noexcept {
  if (op.range.last > map_last_)
    return base::fail(Errc::iova_reserved, Stage::map, 0,
                      "[{:#x}, {:#x}] reaches the last granule of the address space, where kernels before 6.19 "
                      "overflow; it is kept out of use on type1",
                      op.range.start.value, op.range.last.value);
  return base::fail(Errc::invalid_argument, Stage::map, 0, "{} bytes at offset {:#x} are not inside region {}",
                    op.range.length().value, op.memory, op.region.value);
}

Error Type1Space::map_error(int os_errno, const BackendOp& op, std::uint64_t address) noexcept {
  if (!compat() && groups_.empty())
    return base::fail(Errc::no_device, Stage::map, os_errno,
                      "a type1 container accepts no maps before a device is attached; attach one first");
  const MapFailure failure{.call = "VFIO_IOMMU_MAP_DMA",
                           .os_errno = os_errno,
                           .range = op.range,
                           .memory = address,
                           .access = op.access,
                           .account = account(),
                           .entries_max = facts_.entries_max};
  if (!needs_usable_ranges(os_errno)) return explain_map(kernel_, failure, {});
  try {
    const auto usable = usable_ranges();
    if (usable) return explain_map(kernel_, failure, *usable);
  } catch (...) {
    // No memory to ask for the ranges: the general explanation has to do.
  }
  return explain_call(Stage::map, failure.call, os_errno);
}

BackendOpResult Type1Space::unmap(IovaRange range) noexcept {
  if (harvest_ != nullptr && !groups_.empty()) [[unlikely]]
    return unmap_tracked(range);
  if (range == IovaRange::everything()) {
    const auto gone = unmap_all();
    return {gone.error(), gone.value_or(Bytes{})};
  }
  return version_1() ? unmap_each(range) : unmap_once(range);
}

BackendOpResult Type1Space::unmap_each(IovaRange range) noexcept {
  if (starts_.cut_by(range))
    return {base::fail(Errc::would_bisect, Stage::unmap, 0,
                       "unmap of [{:#x}, {:#x}] would cut a mapping; nothing was unmapped", range.start.value,
                       range.last.value),
            {}};
  BackendOpResult sum;
  Iova from = range.start;
  while (const auto mapping = starts_.next(from, range.last)) {
    BackendOpResult one = unmap_once(*mapping);
    // A kernel that could not write its answer back has unmapped: then the second call finds nothing.
    if (one.error.os_errno == EFAULT) [[unlikely]] {
      one = unmap_once(*mapping);
      if (!one.error && one.bytes.value == 0) {
        one.bytes = mapping->length();
        live_bytes_ -= one.bytes.value;
      }
    }
    sum.bytes.value += one.bytes.value;
    if (!one.error && one.bytes == mapping->length()) {
      starts_.erase(mapping->start);
    } else {
      sum.error = one.error ? one.error
                            : base::fail(Errc::io_error, Stage::unmap, 0,
                                         "VFIO_IOMMU_UNMAP_DMA of [{:#x}, {:#x}] removed {} bytes",
                                         mapping->start.value, mapping->last.value, one.bytes.value);
      return sum;
    }
    if (mapping->last == iova_max) break;
    from = Iova{mapping->last.value + 1};
  }
  return sum;
}

BackendOpResult Type1Space::unmap_once(IovaRange range) noexcept {
  if (!compat() && range.last > last_mappable()) {
    if (range.start > last_mappable()) return {{}, {}};
    range.last = last_mappable();
  }
  uapi::Type1DmaUnmap unmap{.iova = range.start.value, .size = range.length().value};
  const std::uint64_t asked = unmap.size;
  const int why = call(kernel_, container_.get(), unmap);
  if (why == 0) [[likely]] {
    live_bytes_ -= unmap.size;
    return {{}, Bytes{unmap.size}};
  }
  // The compatibility interface writes back what went before the failure; a container leaves the question standing.
  const Bytes gone{compat() && unmap.size != asked ? unmap.size : 0};
  live_bytes_ -= gone.value;
  if (!compat() && groups_.empty()) return {{}, {}};  // no IOMMU, so nothing can be mapped
  if (why == ENOENT && compat() && !iommufd::cuts_mapping(kernel_, container_.get(), ioas_, range)) return {{}, gone};
  const bool aligned = base::is_aligned(range.start.value | range.length().value, facts_.granule.value);
  if (why == ENOENT || (why == EINVAL && aligned))
    return {base::fail(Errc::would_bisect, Stage::unmap, why,
                       "VFIO_IOMMU_UNMAP_DMA of [{:#x}, {:#x}] would cut a mapping; {} bytes are gone",
                       range.start.value, range.last.value, gone.value),
            gone};
  return {explain_call(Stage::unmap, "VFIO_IOMMU_UNMAP_DMA", why), gone};
}

Result<Bytes> Type1Space::unmap_all() noexcept {
  if (!compat() && groups_.empty()) return Bytes{0};
  if (harvest_ != nullptr) {
    const BackendOpResult tracked = unmap_tracked({Iova{0}, last_mappable()});
    if (tracked.error) return tracked.error;
    return tracked.bytes;
  }
  if (!has(facts_.capabilities, Capability::unmap_all)) return unmap_windows();
  uapi::Type1DmaUnmap unmap{.flags = uapi::dma_unmap_flag_all};
  int why = call(kernel_, container_.get(), unmap);
  if (why == EFAULT) {  // done, but for the answer: now it finds nothing
    unmap.size = 0;
    why = call(kernel_, container_.get(), unmap);
  }
  if (why != 0) return explain_call(Stage::unmap, "VFIO_IOMMU_UNMAP_DMA of everything", why);
  live_bytes_ = 0;
  starts_.clear();
  return Bytes{unmap.size};
}

/// Kernels without UNMAP_ALL (before 5.12): no mapping crosses a border of a usable range, so each can be unmapped
/// whole.
Result<Bytes> Type1Space::unmap_windows() noexcept {
  try {
    const auto usable = usable_ranges();
    if (!usable) return usable.error();
    Bytes sum{};
    for (const IovaRange& window : *usable) {
      const BackendOpResult one = version_1() ? unmap_each(window) : unmap_once(window);
      sum.value += one.bytes.value;
      if (one.error) return one.error;
    }
    return sum;
  } catch (...) {
    return base::fail(Errc::out_of_memory, Stage::unmap, 0, "no memory to ask for the usable ranges");
  }
}

Result<RegionId> Type1Space::register_memory(const MemoryRange& memory) {
  const auto address = reinterpret_cast<std::uintptr_t>(memory.address);
  if (memory.length.value == 0 || !base::is_aligned(memory.length.value | address, facts_.granule.value))
    return base::fail(Errc::invalid_argument, Stage::pin, 0,
                      "memory at {:#x} of {} bytes cannot be registered: both must be multiples of {}, and the length "
                      "not 0",
                      address, memory.length.value, facts_.granule.value);
  if (memory.address == nullptr)
    return base::fail(Errc::unsupported, Stage::pin, 0,
                      "type1 maps process addresses; map the file into the process and register its address");
  regions_.push_back(memory);
  return RegionId{static_cast<std::uint32_t>(regions_.size())};
}

Result<void> Type1Space::unregister_memory(RegionId region) {
  if (region.value == 0 || region.value > regions_.size() || regions_[region.value - 1].length.value == 0)
    return base::fail(Errc::not_found, Stage::unpin, 0, "region {} is not registered with this space", region.value);
  regions_[region.value - 1] = {};
  return {};
}

Result<AttachedDevice> Type1Space::attach(const DeviceSource& source) {
  const auto added = groups_.add(source);
  if (!added) return added.error();
  try {
    return settle(**added);
  } catch (...) {
    (void)groups_.remove((*added)->id);
    throw;
  }
}

// The second half of attach(): the device is in the container.
Result<AttachedDevice> Type1Space::settle(const GroupDevice& device) {
  const auto info = query_container(kernel_, container_.get());
  // The last group took the tracking along; START while it is on changes nothing.
  const int not_tracking = harvest_ != nullptr && info && info->dirty_page_sizes != 0 ? set_tracking(true) : 0;
  if (!info || not_tracking != 0 || (options_.dirty_tracking && info->dirty_page_sizes == 0)) {
    const Error error = not_tracking != 0 ? explain_call(Stage::attach, "VFIO_IOMMU_DIRTY_PAGES(START)", not_tracking)
                        : info            ? base::fail(Errc::unsupported, Stage::attach, 0,
                                                       "{} cannot be attached: the container does not track dirty pages, and this "
                                                                  "space promises to",
                                                       device.name)
                                          : info.error();
    (void)groups_.remove(device.id).has_value();
    return error;
  }
  AttachedDevice described{.id = device.id,
                           .name = device.name,
                           .device_fd = device.fd.get(),
                           .reserved = device.reserved,
                           .iommu = {},
                           .dirty_tracking = info->dirty_page_sizes != 0};
  devices_changed();
  return described;
}

void Type1Space::devices_changed() noexcept {
  try {
    if (const auto info = query_container(kernel_, container_.get())) follow(*info);
  } catch (...) {
    // No memory to ask: the facts stay as they were until the next device.
  }
}

void Type1Space::follow(const ContainerInfo& info) noexcept {
  facts_.page_sizes = info.page_sizes;
  // The compatibility interface answers 2^32-1 for "no limit". The limit itself is what is left while nothing is
  // mapped.
  if (!compat() && live_bytes_ == 0) facts_.entries_max = info.entries_left.value_or(0);
}

Result<void> Type1Space::detach(DeviceId device) {
  if (!groups_.contains(device)) return groups_.remove(device);
  if (!compat() && groups_.is_last(device) && live_bytes_ != 0)
    return base::fail(Errc::busy, Stage::detach, 0,
                      "device {} is the last of its type1 container, which would drop {} mapped bytes with it; unmap "
                      "everything or attach another device first",
                      device.value, live_bytes_);
  const auto removed = groups_.remove(device);
  devices_changed();
  return removed;
}

Result<std::vector<IovaRange>> Type1Space::usable_ranges() {
  if (!compat() && groups_.empty()) return std::vector<IovaRange>{};
  const auto info = query_container(kernel_, container_.get());
  if (!info) return info.error();
  // Kernels before 5.4 do not tell; the address space is then what the hardware makes of it.
  if (!info->usable) return std::vector<IovaRange>{{Iova{0}, last_mappable()}};
  const IovaRange past_end{Iova{last_mappable().value + 1}, iova_max};
  if (!compat()) return whole_granules(without(*info->usable, {&past_end, 1}), facts_.granule);
  return whole_granules(*info->usable, facts_.granule);
}

Result<void> Type1Space::promise(std::span<const IovaRange> ranges) {
  if (compat()) return iommufd::ioas_allow(kernel_, container_.get(), ioas_, ranges);
  return base::fail(Errc::unsupported, Stage::reserve, 0,
                    "a type1 container cannot promise ranges; check usable_ranges() after each attach");
}

Headroom Type1Space::headroom() noexcept {
  Headroom room = memlock_headroom(kernel_, account());
  if (compat() || groups_.empty()) return room;
  try {
    if (const auto info = query_container(kernel_, container_.get())) room.entries = info->entries_left;
  } catch (...) {
    // No memory to ask: nothing is said about entries.
  }
  return room;
}

}  // namespace iovane::backends::type1
