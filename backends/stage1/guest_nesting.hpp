// A guest's own first-stage tables, walked by the hardware: nothing is shadowed.
//
// Where a guest's virtual IOMMU has the format of the host's, the guest's tables are the first stage. The guest's
// memory lies in a nesting parent, mapped once, at intermediate addresses that are its guest physical addresses; so
// what the guest writes into its tables means the same to the hardware, and reaches the guest's memory and nothing
// else. Maps cost no exit; unmaps cost the guest's own invalidation commands, which are forwarded as arrays.
//
// One GuestNesting is one guest IOMMU that stands for one of the host's: the devices behind it are behind the same
// host IOMMU. It starts them with guest physical addresses passed through, and is told what the guest's configuration
// says of each device; core/viommu reads that from guest memory.
//
// Threads: invalidate() and read_events() from any thread, also while others run; the rest is control plane, one thread
// at a time.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "backends/backend.hpp"
#include "backends/stage1/event_queue.hpp"
#include "backends/stage1/nesting_unit.hpp"
#include "backends/uapi/iommufd.hpp"

namespace iovane::backends::stage1 {

/// What SMMUv3 hardware recorded about a device of the guest, with the guest's stream number in it.
struct GuestEvent {
  std::array<std::uint64_t, 4> words{};
};

class GuestNesting {
 public:
  /// Opens /dev/iommu, or takes a descriptor of it. `kernel` outlives it.
  static Result<std::unique_ptr<GuestNesting>> open(Kernel& kernel, const DescriptorSource& source);
  ~GuestNesting();
  GuestNesting(const GuestNesting&) = delete;
  GuestNesting& operator=(const GuestNesting&) = delete;

  /// Guest RAM, for as long as it is not removed. Address, length and memory are multiples of 4 KiB. It is pinned when
  /// the first device comes, or at once when one is there. Errors: iova_reserved where a device's IOMMU has the address
  /// for something else (the interrupt doorbell): the guest's memory map must leave that out.
  Result<void> add_memory(std::uint64_t guest_address, const MemoryRange& memory, bool writable = true);
  /// A range that was added as such. What the guest's tables say about it leads nowhere from then on.
  Result<void> remove_memory(IovaRange range);

  /// Brings a device in; `guest_id` is what the guest's commands and events call it (its stream number, on SMMUv3). It
  /// reaches guest physical addresses as they are. Errors: unsupported with the reason where the host does not nest, or
  /// where the device is behind another IOMMU than the first one.
  Result<AttachedDevice> attach(const DeviceSource& source, std::uint32_t guest_id);
  Result<void> detach(DeviceId device);
  /// What the host's IOMMU walks; nothing before the first device.
  const FirstStage* first_stage() const noexcept { return first_stage_ ? &*first_stage_ : nullptr; }

  /// The device reaches guest physical addresses as they are.
  Result<void> pass_through(DeviceId device);
  /// The device reaches nothing.
  Result<void> block(DeviceId device);
  /// SMMUv3: what the guest's stream table says of the device, words 0 and 1; bits that are the host's business do not
  /// count. Errors: invalid_argument for an entry that the hardware would not take (C_BAD_STE to the guest).
  Result<void> use_stream_entry(DeviceId device, std::uint64_t word_0, std::uint64_t word_1);
  /// VT-d, scalable mode: the first-level table of the device's requests.
  Result<void> use_first_level(DeviceId device, std::uint64_t root, unsigned levels);

  /// SMMUv3: the guest's commands, which may be TLBI_NH_*, TLBI_NSNH_ALL, CFGI_CD, CFGI_CD_ALL and ATC_INV; the result
  /// is how many the IOMMU took, in order. Fewer than given: the next one is what it refused.
  std::size_t invalidate(std::span<const smmuv3::Command> commands) noexcept;
  /// VT-d: ranges of the device's first level. The same.
  std::size_t invalidate(DeviceId device, std::span<const uapi::iommufd::HwptVtdS1Invalidate> ranges) noexcept;
  /// Names the first level that a device uses now: devices with the same number share it. 0: none.
  std::uint32_t table_of(DeviceId device) const noexcept;

  /// For poll(2): readable while events wait. -1 where the host has no event queues.
  int event_fd() const noexcept;
  /// Takes up to out.size() events, oldest first; `lost`: how many the queue had no room for.
  Result<std::size_t> read_events(std::span<GuestEvent> out, std::uint32_t& lost) noexcept;

 private:
  /// A nested page table, for all devices whose configuration is the same.
  struct Table {
    std::array<std::uint64_t, 2> words;  // stream table entry; or root and levels
    std::uint32_t object;
    std::uint32_t users;
  };
  struct Device {
    iommufd::BoundDevice bound;
    std::uint32_t vdevice = 0;
    std::uint32_t table = 0;  // object of a Table; 0: the parent, or nothing
  };

  GuestNesting(Kernel& kernel, KernelFd fd, bool exclusive) : shared_{kernel, std::move(fd), exclusive} {}
  Kernel& kernel() const noexcept { return shared_.kernel(); }
  int fd() const noexcept { return shared_.fd(); }
  Result<void> make_parent(const iommufd::BoundDevice& device);
  Result<void> name_device(Device& device, std::uint32_t guest_id);
  Device* find(DeviceId device) noexcept;
  Result<void> use_table(DeviceId device, std::array<std::uint64_t, 2> words);
  Result<std::uint32_t> make_table(const Device& device, std::array<std::uint64_t, 2> words);
  Result<void> point(Device& device, std::uint32_t object, std::uint32_t table);
  void drop_table(std::uint32_t object) noexcept;
  int map_chunk(IovaRange chunk, const MemoryRange& memory, std::uint64_t offset, bool writable) noexcept;
  int unmap(IovaRange range) noexcept;

  iommufd::SharedDescriptor shared_;
  std::uint32_t ioas_ = 0;
  std::uint32_t parent_ = 0;  // HWPT
  std::uint32_t viommu_ = 0;
  std::optional<FirstStage> first_stage_;
  std::vector<Device> devices_;
  std::vector<Table> tables_;
  EventQueue events_;
  std::mutex event_mutex_;  // guards what follows
  std::deque<GuestEvent> waiting_;
  std::uint32_t lost_ = 0;
};

}  // namespace iovane::backends::stage1
