#include "backends/stage1/guest_nesting.hpp"

#include <algorithm>
#include <cerrno>
#include <new>
#include <utility>

#include "backends/iommufd/ioas_calls.hpp"
#include "backends/kernel_error.hpp"
#include "backends/uapi/vfio.hpp"
#include "base/checked_math.hpp"
#include "base/error_text.hpp"

namespace iovane::backends::stage1 {
namespace {

namespace uapi = backends::uapi::iommufd;

constexpr std::uint64_t chunk_bytes = std::uint64_t{1} << 30;

// The bits of a stream table entry that describe the first stage, Arm IHI 0070, 5.2: V, Config, S1Fmt, S1ContextPtr,
// S1CDMax; S1DSS, S1CIR, S1COR, S1CSH, S1STALLD, EATS. The rest is the second stage's, or how memory is reached.
constexpr std::uint64_t stream_entry_0 = 1 | 7U << 1 | 3U << 4 | 0x000f'ffff'ffff'ffc0 | std::uint64_t{31} << 59;
constexpr std::uint64_t stream_entry_1 = 3U | 3U << 2 | 3U << 4 | 3U << 6 | 1U << 27 | 3U << 28;

}  // namespace

Result<std::unique_ptr<GuestNesting>> GuestNesting::open(Kernel& kernel, const DescriptorSource& source) {
  auto fd = open_descriptor(kernel, "/dev/iommu", source);
  if (!fd) return fd.error();
  const auto ioas = iommufd::ioas_alloc(kernel, fd->get());
  if (!ioas && ioas.error().os_errno == ENOTTY)
    return base::fail(Errc::unsupported, Stage::open, ENOTTY, "descriptor {} is not an iommufd", fd->get());
  if (!ioas) return ioas.error();
  std::unique_ptr<GuestNesting> guest{new GuestNesting{kernel, std::move(*fd), source.fd < 0}};
  guest->ioas_ = *ioas;
  return guest;
}

GuestNesting::~GuestNesting() {
  while (!devices_.empty()) {
    const DeviceId id = devices_.back().bound.id;
    if (detach(id)) continue;
    shared_.unbind(devices_.back().bound);  // closing its descriptor detaches it
    devices_.pop_back();
  }
  for (const Table& table : tables_) iommufd::destroy(kernel(), fd(), table.object);
  events_.close(kernel(), fd());
  for (const std::uint32_t object : {viommu_, parent_, ioas_})
    if (object != 0) iommufd::destroy(kernel(), fd(), object);
}

int GuestNesting::map_chunk(IovaRange chunk, const MemoryRange& memory, std::uint64_t offset, bool writable) noexcept {
  const std::uint32_t flags =
      uapi::ioas_map_fixed_iova | uapi::ioas_map_readable | (writable ? uapi::ioas_map_writeable : 0);
  if (memory.fd >= 0 && shared_.map_file()) {
    uapi::IoasMapFile map{.flags = flags,
                          .ioas_id = ioas_,
                          .fd = memory.fd,
                          .start = memory.fd_offset + offset,
                          .length = chunk.length().value,
                          .iova = chunk.start.value};
    return call(kernel(), fd(), map);
  }
  uapi::IoasMap map{.flags = flags,
                    .ioas_id = ioas_,
                    .user_va = reinterpret_cast<std::uintptr_t>(memory.address) + offset,
                    .length = chunk.length().value,
                    .iova = chunk.start.value};
  return call(kernel(), fd(), map);
}

int GuestNesting::unmap(IovaRange range) noexcept {
  uapi::IoasUnmap unmap{.ioas_id = ioas_, .iova = range.start.value, .length = range.length().value};
  return call(kernel(), fd(), unmap);
}

Result<void> GuestNesting::add_memory(std::uint64_t guest_address, const MemoryRange& memory, bool writable) {
  const auto range = IovaRange::from_length(Iova{guest_address}, memory.length);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.address);
  if (!range || !base::is_aligned(guest_address | memory.length.value | address | memory.fd_offset, page_bytes))
    return base::fail(Errc::invalid_argument, Stage::pin, EINVAL,
                      "guest memory at {:#x} of {} bytes cannot be added: address, length and memory must be multiples "
                      "of {}, and the length not 0",
                      guest_address, memory.length.value, page_bytes);
  if (memory.address == nullptr && (memory.fd < 0 || !shared_.map_file()))
    return base::fail(Errc::unsupported, Stage::pin, 0,
                      "guest memory without a process address needs a file descriptor and IOAS_MAP_FILE (Linux 6.13)");
  IovaRange rest = *range;
  while (true) {
    const IovaRange chunk{rest.start, std::min(rest.last, Iova{rest.start.value | (chunk_bytes - 1)})};
    const int why = map_chunk(chunk, memory, chunk.start.value - guest_address, writable);
    if (why != 0) {
      if (chunk.start > range->start) unmap({range->start, Iova{chunk.start.value - 1}});
      const MapFailure failure{.call = "adding guest memory (IOAS_MAP)",
                               .os_errno = why,
                               .range = chunk,
                               .memory = address + (chunk.start.value - guest_address),
                               .access = Access::read_write,
                               .account = MemlockAccount::user_pinned};
      const auto usable = needs_usable_ranges(why) ? iommufd::ioas_ranges(kernel(), fd(), ioas_)
                                                   : Result<std::vector<IovaRange>>{std::vector<IovaRange>{}};
      return explain_map(kernel(), failure, usable ? *usable : std::vector<IovaRange>{});
    }
    if (chunk.last == rest.last) return {};
    rest.start = Iova{chunk.last.value + 1};
  }
}

Result<void> GuestNesting::remove_memory(IovaRange range) {
  const int why = unmap(range);
  if (why == 0) return {};
  return explain_call(Stage::unpin, "removing guest memory (IOAS_UNMAP)", why);
}

GuestNesting::Device* GuestNesting::find(DeviceId device) noexcept {
  const auto at = std::find_if(devices_.begin(), devices_.end(), [&](const Device& d) { return d.bound.id == device; });
  return at == devices_.end() ? nullptr : &*at;
}

Result<void> GuestNesting::make_parent(const iommufd::BoundDevice& device) {
  if (parent_ == 0) {
    uapi::HwptAlloc alloc{.flags = uapi::hwpt_alloc_nest_parent, .dev_id = device.object, .pt_id = ioas_};
    const int why = call(kernel(), fd(), alloc);
    if (why == EOPNOTSUPP)
      return base::fail(Errc::unsupported, Stage::attach, why,
                        "{}: no nesting: this IOMMU, its driver or this kernel (6.7 or newer is needed) translates in "
                        "one stage only",
                        device.name);
    if (why == ENOMEM)
      return explain_no_memory(kernel(), MemlockAccount::user_pinned, Stage::pin, "HWPT_ALLOC for guest memory", {});
    if (why != 0) return explain_call(Stage::attach, "HWPT_ALLOC of a nesting parent", why);
    parent_ = alloc.out_hwpt_id;
  }
  if (first_stage_->format.architecture != Architecture::smmuv3) return {};
  uapi::ViommuAlloc alloc{.type = uapi::viommu_type_arm_smmuv3, .dev_id = device.object, .hwpt_id = parent_};
  const int why = call(kernel(), fd(), alloc);
  if (why == EINVAL)
    return base::fail(Errc::unsupported, Stage::attach, why,
                      "{} is behind another IOMMU than the guest's other devices: give the guest one IOMMU for each of "
                      "the host's",
                      device.name);
  if (why == ENOTTY || why == EOPNOTSUPP)
    return base::fail(Errc::unsupported, Stage::attach, why,
                      "{}: the kernel gives out no vIOMMU: it wants Linux 6.13, CONFIG_ARM_SMMU_V3_IOMMUFD, and the "
                      "firmware's promise that all DMA is coherent (CANWBS) or S2FWB",
                      device.name);
  if (why != 0) return explain_call(Stage::attach, "VIOMMU_ALLOC", why);
  if (viommu_ != 0) {  // it was only a question
    iommufd::destroy(kernel(), fd(), alloc.out_viommu_id);
    return {};
  }
  viommu_ = alloc.out_viommu_id;
  (void)events_.open(kernel(), fd(), viommu_);  // without it the kernel logs what devices do wrong
  return {};
}

Result<void> GuestNesting::name_device(Device& device, std::uint32_t guest_id) {
  if (viommu_ == 0) return {};
  uapi::VdeviceAlloc alloc{.viommu_id = viommu_, .dev_id = device.bound.object, .virt_id = guest_id};
  const int why = call(kernel(), fd(), alloc);
  if (why == EEXIST || why == EBUSY)
    return base::fail(Errc::busy, Stage::attach, why, "{} or the guest's number {:#x} is in use already",
                      device.bound.name, guest_id);
  if (why != 0) return explain_call(Stage::attach, "VDEVICE_ALLOC", why);
  device.vdevice = alloc.out_vdevice_id;
  return {};
}

Result<AttachedDevice> GuestNesting::attach(const DeviceSource& source, std::uint32_t guest_id) {
  devices_.reserve(devices_.size() + 1);  // nothing may fail after the kernel has attached it
  auto bound = shared_.bind(source);
  if (!bound) return bound.error();
  Device device{.bound = std::move(*bound)};
  const auto undo = [&](const Error& error) {
    if (device.vdevice != 0) iommufd::destroy(kernel(), fd(), device.vdevice);
    shared_.unbind(device.bound);
    return error;
  };
  const auto first_stage = first_stage_of(kernel(), fd(), device.bound);
  if (!first_stage) return undo(first_stage.error());
  const bool first = !first_stage_.has_value();
  if (first)
    first_stage_ = *first_stage;
  else if (first_stage_->format.architecture != first_stage->format.architecture)
    return undo(
        base::fail(Errc::unsupported, Stage::attach, 0, "{} is behind another kind of IOMMU", device.bound.name));
  const auto made = make_parent(device.bound);
  if (!made) {
    if (first) first_stage_.reset();
    return undo(made.error());
  }
  if (const auto named = name_device(device, guest_id); !named) return undo(named.error());
  if (const auto pointed = point(device, parent_, 0); !pointed) return undo(pointed.error());
  devices_.push_back(std::move(device));
  const iommufd::BoundDevice& there = devices_.back().bound;
  return AttachedDevice{.id = there.id,
                        .name = there.name,
                        .device_fd = there.fd.get(),
                        .reserved = there.reserved,
                        .iommu = there.hardware.name,
                        .dirty_tracking = false};
}

Result<void> GuestNesting::detach(DeviceId id) {
  Device* const device = find(id);
  if (device == nullptr) return base::fail(Errc::not_found, Stage::detach, 0, "there is no device {} here", id.value);
  backends::uapi::vfio::DeviceDetachIommufdPt detach;
  if (const int why = call(kernel(), device->bound.fd.get(), detach); why != 0)
    return explain_call(Stage::detach, "VFIO_DEVICE_DETACH_IOMMUFD_PT", why);
  drop_table(device->table);
  if (device->vdevice != 0) iommufd::destroy(kernel(), fd(), device->vdevice);
  shared_.unbind(device->bound);
  devices_.erase(devices_.begin() + (device - devices_.data()));
  return {};
}

// Translates through `object` from here on; `table` is it where it is one of ours, with its user counted already.
Result<void> GuestNesting::point(Device& device, std::uint32_t object, std::uint32_t table) {
  backends::uapi::vfio::DeviceAttachIommufdPt attach{.pt_id = object};
  const int why = call(kernel(), device.bound.fd.get(), attach);
  if (why != 0) {
    drop_table(table);
    if (why == EADDRINUSE)
      return base::fail(Errc::iova_reserved, Stage::attach, why,
                        "{} reserves addresses that the guest's memory has; leave them out of the guest's memory map",
                        device.bound.name);
    return explain_call(Stage::attach, "VFIO_DEVICE_ATTACH_IOMMUFD_PT", why);
  }
  drop_table(std::exchange(device.table, table));
  return {};
}

Result<void> GuestNesting::pass_through(DeviceId id) {
  Device* const device = find(id);
  if (device == nullptr) return base::fail(Errc::not_found, Stage::attach, 0, "there is no device {} here", id.value);
  return point(*device, parent_, 0);
}

Result<void> GuestNesting::block(DeviceId id) {
  Device* const device = find(id);
  if (device == nullptr) return base::fail(Errc::not_found, Stage::attach, 0, "there is no device {} here", id.value);
  if (viommu_ != 0) return use_table(id, {0, 0});  // an entry that is not valid
  backends::uapi::vfio::DeviceDetachIommufdPt detach;
  if (const int why = call(kernel(), device->bound.fd.get(), detach); why != 0)
    return explain_call(Stage::detach, "VFIO_DEVICE_DETACH_IOMMUFD_PT", why);
  drop_table(std::exchange(device->table, 0));
  return {};
}

Result<void> GuestNesting::use_stream_entry(DeviceId device, std::uint64_t word_0, std::uint64_t word_1) {
  if (viommu_ == 0) return make_error(Errc::unsupported, Stage::attach, "stream table entries are for an Arm SMMUv3");
  return use_table(device, {word_0 & stream_entry_0, word_1 & stream_entry_1});
}

Result<void> GuestNesting::use_first_level(DeviceId device, std::uint64_t root, unsigned levels) {
  if (!first_stage_ || first_stage_->format.architecture != Architecture::vtd)
    return make_error(Errc::unsupported, Stage::attach, "first-level tables are for Intel VT-d");
  if (levels < first_stage_->levels_least || levels > first_stage_->levels_most)
    return base::fail(Errc::unsupported, Stage::attach, EINVAL,
                      "the host's unit walks first-level tables of {} to {} levels, not {}", first_stage_->levels_least,
                      first_stage_->levels_most, levels);
  return use_table(device, {root, levels});
}

Result<std::uint32_t> GuestNesting::make_table(const Device& device, std::array<std::uint64_t, 2> words) {
  tables_.reserve(tables_.size() + 1);
  uapi::HwptArmSmmuv3 entry;
  uapi::HwptVtdS1 first_level;
  uapi::HwptAlloc alloc{.dev_id = device.bound.object};
  if (viommu_ != 0) {
    entry.ste[0] = words[0];
    entry.ste[1] = words[1];
    alloc.pt_id = viommu_;
    alloc.data_type = uapi::hwpt_data_arm_smmuv3;
    alloc.data_len = sizeof entry;
    alloc.data_uptr = reinterpret_cast<std::uintptr_t>(&entry);
  } else {
    first_level.pgtbl_addr = words[0];
    first_level.addr_width = static_cast<std::uint32_t>(12 + 9 * words[1]);
    alloc.pt_id = parent_;
    alloc.data_type = uapi::hwpt_data_vtd_s1;
    alloc.data_len = sizeof first_level;
    alloc.data_uptr = reinterpret_cast<std::uintptr_t>(&first_level);
  }
  const int why = call(kernel(), fd(), alloc);
  if (why == EIO || why == EINVAL)
    return base::fail(Errc::invalid_argument, Stage::attach, why,
                      "the host's IOMMU takes no first stage described by {:#x} {:#x}", words[0], words[1]);
  if (why != 0) return explain_call(Stage::attach, "HWPT_ALLOC of a guest's first stage", why);
  tables_.push_back({words, alloc.out_hwpt_id, 0});
  return alloc.out_hwpt_id;
}

Result<void> GuestNesting::use_table(DeviceId id, std::array<std::uint64_t, 2> words) {
  Device* const device = find(id);
  if (device == nullptr) return base::fail(Errc::not_found, Stage::attach, 0, "there is no device {} here", id.value);
  auto table = std::find_if(tables_.begin(), tables_.end(), [&](const Table& t) { return t.words == words; });
  if (table == tables_.end()) {
    const auto made = make_table(*device, words);
    if (!made) return made.error();
    table = tables_.end() - 1;
  }
  if (device->table == table->object) return {};
  ++table->users;
  const std::uint32_t object = table->object;
  return point(*device, object, object);
}

void GuestNesting::drop_table(std::uint32_t object) noexcept {
  const auto table = std::find_if(tables_.begin(), tables_.end(), [&](const Table& t) { return t.object == object; });
  if (object == 0 || table == tables_.end() || --table->users != 0) return;
  iommufd::destroy(kernel(), fd(), object);
  tables_.erase(table);
}

std::uint32_t GuestNesting::table_of(DeviceId id) const noexcept {
  for (const Device& device : devices_)
    if (device.bound.id == id) return device.table;
  return 0;
}

namespace {

// The whole array at once; where the kernel stops, one by one: it may say that it handled entries which it had only
// looked at. Entries may be repeated without harm.
template <typename Entry>
std::size_t forward(Kernel& kernel, int fd, std::uint32_t object, std::uint32_t type,
                    std::span<const Entry> entries) noexcept {
  constexpr std::size_t array_max = 1024;
  const auto issue = [&](std::span<const Entry> some) {
    uapi::HwptInvalidate call_{.hwpt_id = object,
                               .data_uptr = reinterpret_cast<std::uintptr_t>(some.data()),
                               .data_type = type,
                               .entry_len = sizeof(Entry),
                               .entry_num = static_cast<std::uint32_t>(some.size())};
    return call(kernel, fd, call_) == 0 && call_.entry_num == some.size();
  };
  for (std::size_t done = 0; done < entries.size();) {
    const std::size_t count = std::min(entries.size() - done, array_max);
    if (!issue(entries.subspan(done, count))) {
      for (std::size_t i = 0; i < count; ++i)
        if (!issue(entries.subspan(done + i, 1))) return done + i;
    }
    done += count;
  }
  return entries.size();
}

}  // namespace

std::size_t GuestNesting::invalidate(std::span<const smmuv3::Command> commands) noexcept {
  if (viommu_ == 0) return 0;
  return forward(kernel(), fd(), viommu_, uapi::viommu_invalidate_data_arm_smmuv3, commands);
}

std::size_t GuestNesting::invalidate(DeviceId device, std::span<const uapi::HwptVtdS1Invalidate> ranges) noexcept {
  const std::uint32_t table = table_of(device);
  if (table == 0 || viommu_ != 0) return 0;
  return forward(kernel(), fd(), table, uapi::hwpt_invalidate_data_vtd_s1, ranges);
}

int GuestNesting::event_fd() const noexcept { return events_.is_open() ? events_.pollable(kernel()) : -1; }

Result<std::size_t> GuestNesting::read_events(std::span<GuestEvent> out, std::uint32_t& lost) noexcept {
  lost = 0;
  if (!events_.is_open())
    return make_error(Errc::unsupported, Stage::query,
                      "the host's IOMMU or kernel has no event queues (VEVENTQ_ALLOC; Arm SMMUv3, Linux 6.15)");
  const std::lock_guard lock{event_mutex_};
  for (bool any = true; any && waiting_.size() < out.size();) {
    any = false;
    const int why = events_.drain(
        kernel(), any,
        [&](const std::uint64_t(&words)[4]) {
          try {
            waiting_.push_back({{words[0], words[1], words[2], words[3]}});
          } catch (const std::bad_alloc&) {
            ++lost_;
          }
        },
        [&](std::uint32_t more) { lost_ += more; });
    if (why != 0) return explain_call(Stage::query, "read of a vIOMMU's events", why);
  }
  std::size_t taken = 0;
  for (; taken < out.size() && !waiting_.empty(); ++taken) {
    out[taken] = waiting_.front();
    waiting_.pop_front();
  }
  if (waiting_.empty()) lost = std::exchange(lost_, 0);
  return taken;
}

}  // namespace iovane::backends::stage1
