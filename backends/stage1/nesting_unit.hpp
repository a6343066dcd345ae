// An IOMMU that nests two stages: its nesting parent, its vIOMMU, and what its first stage must look like.
#pragma once

#include <bitset>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "backends/iommufd/iommufd_space.hpp"
#include "backends/stage1/event_queue.hpp"
#include "backends/stage1/smmuv3.hpp"
#include "backends/stage1/table_format.hpp"
#include "base/topology.hpp"

namespace iovane::backends::stage1 {

/// What GET_HW_INFO says about the first stage behind a device.
struct FirstStage {
  TableFormat format = smmuv3_format();
  unsigned levels = 4;
  unsigned levels_least = 3;
  unsigned levels_most = 4;
  bool range_invalidation = false;
  bool invalidate_after_map = false;  ///< it may remember that nothing was there
  std::uint32_t output_size = 0;      ///< SMMUv3: code of the address size
};

/// unsupported, with the reason, where the hardware's first stage is not one that we write.
Result<FirstStage> first_stage_of(Kernel& kernel, int fd, const iommufd::BoundDevice& device);

/// One per IOMMU that a device of the descriptor is behind; all address spaces share it.
struct NestingUnit {
  std::uint32_t parent = 0;  ///< HWPT: every intermediate address of the descriptor
  bool own_parent = false;   ///< not the staging's holder
  std::uint32_t viommu = 0;  ///< 0 where nested tables hang on the parent itself (VT-d)
  FirstStage first_stage;
  int numa_node = -1;                    ///< of the first device behind it; -1: not known
  std::unique_ptr<EventQueue> events{};  ///< null where the kernel or the architecture has none
};

/// A device with what it needs on its unit.
struct NestedDevice {
  iommufd::BoundDevice bound;
  NestingUnit* unit = nullptr;
  std::uint32_t vdevice = 0;  ///< 0: none
};

/// What the stage-1 spaces of one /dev/iommu share. Outlives them.
class SharedNesting {
 public:
  SharedNesting(Kernel& kernel, KernelFd fd, bool exclusive, std::vector<IovaRange> avoid);
  ~SharedNesting();

  Kernel& kernel() const noexcept { return shared_.kernel(); }
  int fd() const noexcept { return shared_.fd(); }
  iommufd::SharedDescriptor& descriptor() noexcept { return shared_; }
  iommufd::Staging& parent() noexcept { return shared_.staging(); }

  /// Binds a device and finds or makes its unit. Control plane.
  Result<NestedDevice> bind(const DeviceSource& source);
  void unbind(NestedDevice& device) noexcept;

  /// A unit that a device is or was behind; null before the first one.
  const NestingUnit* first_unit() noexcept;

  /// Asks that memory which is not there yet comes from the kernel's node `numa_node`; from elsewhere when it is full
  /// or may not be bound. Nothing for -1. Any thread.
  void prefer_node(void* memory, Bytes length, int numa_node) noexcept;

  /// Fault records of the device go there from now on; null: nowhere. What is not read yet stays where it is.
  void route_faults(DeviceId device, FaultInbox* inbox);
  /// Reads some of what is in the event queues of all units into the inboxes; `any`: there was something. 0 or a
  /// positive errno.
  int collect_faults(bool& any) noexcept;

  /// A number that tags this address space's translations; 0 when all are taken.
  std::uint16_t take_asid() noexcept;
  /// Precondition: no IOMMU knows a translation with it any more.
  void give_asid(std::uint16_t asid) noexcept;

 private:
  Result<NestingUnit*> unit_for(const iommufd::BoundDevice& device);
  Result<NestingUnit*> make_unit(const iommufd::BoundDevice& device, const FirstStage& first_stage);
  int make_viommu(const iommufd::BoundDevice& device, NestingUnit& unit) noexcept;
  void open_events(NestingUnit& unit);

  iommufd::SharedDescriptor shared_;
  std::once_flag topology_once_;
  std::optional<base::Topology> topology_;  // asked for by the first table memory with a node
  std::mutex mutex_;                        // control plane: guards everything below
  std::vector<std::unique_ptr<NestingUnit>> units_;
  std::bitset<65536> asids_;
  std::map<std::uint32_t, FaultInbox*> inboxes_;  // by DeviceId, which is the device's number in its vIOMMU
};

}  // namespace iovane::backends::stage1
