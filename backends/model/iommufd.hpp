// /dev/iommu: the iommufd interface over the software IOMMU.
//
// Objects live in one table of ids per open file. IOASes are found without a lock, because every map and unmap does;
// all other objects, and every change of the table, are under the context's gate. Invalidations of nested tables enter
// it together, as they do in the kernel; everything else alone.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <vector>

#include "backends/model/argument.hpp"
#include "backends/model/event_queue.hpp"
#include "backends/model/fault_queue.hpp"
#include "backends/model/file.hpp"
#include "backends/model/host.hpp"
#include "backends/model/ioas.hpp"
#include "backends/model/shared_gate.hpp"
#include "backends/uapi/iommufd.hpp"
#include "backends/uapi/vfio.hpp"

namespace iovane::backends::model {

class IommufdFile final : public File {
 public:
  explicit IommufdFile(Host& host) noexcept : host_{host} {}
  ~IommufdFile() override;

  long ioctl(unsigned long request, std::uint64_t argument) noexcept override;
  void release() noexcept override;

  // VFIO's side: device cdevs, and legacy groups whose container is this descriptor. Host::vfio_mutex is held.
  /// Returns the device's id here, or -errno (-EPERM: another owner).
  long bind(SimulatedDevice& device, IommuGroup& group) noexcept;
  void unbind(std::uint32_t device_id) noexcept;
  /// Attaches, or moves when attached already. `pt_id`: in an IOAS or HWPT, out the HWPT.
  int attach(std::uint32_t device_id, std::uint32_t& pt_id) noexcept;
  void detach(std::uint32_t device_id) noexcept;
  /// The IOAS of the compatibility interface: its id or -ENODEV; or made when there is none.
  long compat_ioas() const noexcept;
  long make_compat_ioas() noexcept;

  /// Totals over all IOASes, for leak checks.
  void add_usage(SpaceUsage& usage, std::size_t& areas, std::size_t& objects) const;

 private:
  enum class Kind : std::uint8_t { ioas, hwpt, device, faults, viommu, vdevice, events };
  struct Object {
    Kind kind;
    std::uint32_t id = 0;
    virtual ~Object() = default;
    explicit Object(Kind k) noexcept : kind{k} {}
  };
  struct Hwpt;
  struct Viommu;
  struct Vdevice;
  struct IoasObject final : Object {
    static constexpr Kind kind_of = Kind::ioas;
    IoasObject(HostMemory& memory, Accounting& accounting) noexcept : Object{Kind::ioas}, ioas{memory, accounting} {}
    Ioas ioas;
    std::vector<Hwpt*> hwpts;
  };
  struct Hwpt final : Object {
    static constexpr Kind kind_of = Kind::hwpt;
    Hwpt(IoasObject& o, const SimulatedDevice& like, std::shared_ptr<FaultQueue> queue) noexcept
        : Object{Kind::hwpt}, ioas{o}, domain{like.iommu(), std::move(queue)}, iommu{like.options().iommu} {}
    /// A first stage on `p`, through `v` where the architecture has vIOMMUs.
    Hwpt(Hwpt& p, Viommu* v, const SimulatedDevice& like, const FirstStage& first_stage,
         std::shared_ptr<EventPort> events)
        : Object{Kind::hwpt},
          ioas{p.ioas},
          domain{like.iommu(), p.domain, first_stage, std::move(events)},
          parent{&p},
          viommu{v},
          iommu{like.options().iommu} {}
    IoasObject& ioas;
    Domain domain;
    Hwpt* const parent = nullptr;
    Viommu* const viommu = nullptr;
    bool nest_parent = false;
    unsigned users = 0;           // nested tables and vIOMMUs on it
    bool automatic = false;       // made by attaching to an IOAS; goes with its last device
    bool dirty_enforced = false;  // only devices that can track
    unsigned devices = 0;
    std::size_t iommu;  // only devices behind this unit
  };
  struct Faults final : Object {
    static constexpr Kind kind_of = Kind::faults;
    explicit Faults(std::shared_ptr<FaultQueue> q) noexcept : Object{Kind::faults}, queue{std::move(q)} {}
    std::shared_ptr<FaultQueue> queue;  // shared with its descriptor and with page tables
  };
  struct Viommu final : Object {
    static constexpr Kind kind_of = Kind::viommu;
    Viommu(Hwpt& p, std::size_t unit) : Object{Kind::viommu}, parent{p}, iommu{unit} {}
    Hwpt& parent;
    std::size_t iommu;
    unsigned users = 0;  // nested tables, vDEVICEs and event queues
    const std::shared_ptr<EventPort> events = std::make_shared<EventPort>();
  };
  struct Events final : Object {
    static constexpr Kind kind_of = Kind::events;
    Events(Viommu& v, std::shared_ptr<EventQueue> q) noexcept : Object{Kind::events}, viommu{v}, queue{std::move(q)} {}
    Viommu& viommu;
    std::shared_ptr<EventQueue> queue;
  };
  struct BoundDevice;
  struct Vdevice final : Object {
    static constexpr Kind kind_of = Kind::vdevice;
    Vdevice(Viommu& v, BoundDevice& d, std::uint64_t number) noexcept
        : Object{Kind::vdevice}, viommu{v}, device{d}, virtual_id{number} {}
    Viommu& viommu;
    BoundDevice& device;
    std::uint64_t virtual_id;
  };
  struct BoundDevice final : Object {
    static constexpr Kind kind_of = Kind::device;
    BoundDevice(SimulatedDevice& d, IommuGroup& g) noexcept : Object{Kind::device}, device{d}, group{g} {}
    SimulatedDevice& device;
    IommuGroup& group;
    Hwpt* hwpt = nullptr;
    Vdevice* vdevice = nullptr;
  };

  static constexpr std::size_t ids_per_block = 1024;
  static constexpr std::size_t id_blocks = 64;
  struct IdBlock {
    std::array<std::atomic<IoasObject*>, ids_per_block> ioas{};
  };

  // Data path.
  Ioas* find_ioas(std::uint32_t id) const noexcept;
  long map(std::uint64_t argument) noexcept;
  long map_file(std::uint64_t argument) noexcept;
  long copy(std::uint64_t argument) noexcept;
  long unmap(std::uint64_t argument) noexcept;
  // Control plane; iommufd.cpp.
  long destroy(std::uint64_t argument) noexcept;
  long ioas_alloc(std::uint64_t argument) noexcept;
  long allow_iovas(std::uint64_t argument) noexcept;
  long iova_ranges(std::uint64_t argument) noexcept;
  long option(std::uint64_t argument) noexcept;
  long vfio_ioas(std::uint64_t argument) noexcept;
  // iommufd_hwpt.cpp.
  long hwpt_alloc(std::uint64_t argument) noexcept;
  long hw_info(std::uint64_t argument) noexcept;
  // iommufd_nesting.cpp.
  int nested_hwpt_alloc(uapi::iommufd::HwptAlloc& command, BoundDevice& device) noexcept;
  long viommu_alloc(std::uint64_t argument) noexcept;
  long vdevice_alloc(std::uint64_t argument) noexcept;
  long veventq_alloc(std::uint64_t argument) noexcept;
  long hwpt_invalidate(std::uint64_t argument) noexcept;
  int invalidate_smmuv3(const Viommu& viommu, const uapi::iommufd::ViommuArmSmmuv3Invalidate& entry) noexcept;
  int invalidate_vtd(Hwpt& hwpt, const uapi::iommufd::HwptVtdS1Invalidate& entry) noexcept;
  void destroy_viommu(Viommu& viommu) noexcept;
  void destroy_vdevice(Vdevice& vdevice) noexcept;
  void destroy_events(Events& events) noexcept;
  long fault_queue_alloc(std::uint64_t argument) noexcept;
  long set_dirty_tracking(std::uint64_t argument) noexcept;
  long get_dirty_bitmap(std::uint64_t argument) noexcept;
  // iommufd_compat.cpp.
  long compat(unsigned long request, std::uint64_t argument) noexcept;
  long compat_set_iommu(std::uint64_t type) noexcept;
  long compat_map(std::uint64_t argument) noexcept;
  long compat_unmap(std::uint64_t argument) noexcept;
  long compat_info(std::uint64_t argument) noexcept;

  // Under mutex_.
  template <typename T>
  T* find(std::uint32_t id) noexcept {
    const auto it = objects_.find(id);
    return it == objects_.end() || it->second->kind != T::kind_of ? nullptr : static_cast<T*>(it->second.get());
  }
  int add(std::unique_ptr<Object> object) noexcept;  // gives it the lowest free id
  long new_ioas() noexcept;
  int destroy_locked(std::uint32_t id) noexcept;
  void destroy_ioas(IoasObject& ioas) noexcept;
  Hwpt* new_hwpt(IoasObject& ioas, const BoundDevice& device, std::shared_ptr<FaultQueue> queue = nullptr) noexcept;
  int attach_to_ioas(BoundDevice& device, IoasObject& ioas) noexcept;
  int change_to(BoundDevice& device, Hwpt& hwpt) noexcept;
  void destroy_hwpt(Hwpt& hwpt) noexcept;
  static bool lacks_vdevice(const BoundDevice& device, const Hwpt& hwpt) noexcept;
  int attach_to(BoundDevice& device, Hwpt& hwpt) noexcept;
  int replace(BoundDevice& device, Hwpt& hwpt) noexcept;
  void detach_from(BoundDevice& device) noexcept;
  void put_hwpt(Hwpt& hwpt) noexcept;
  template <typename Visit>
  void for_attached(const IommuGroup& group, Visit&& visit) noexcept;
  Hwpt* hwpt_of(const IommuGroup& group) noexcept;

  Ledger ledger() const noexcept;
  Ledger compat_ledger() const noexcept { return host_.accounting.ipc_lock() ? Ledger::none : Ledger::process; }

  Host& host_;
  mutable SharedGate mutex_;
  std::array<std::atomic<IdBlock*>, id_blocks> blocks_{};
  std::map<std::uint32_t, std::unique_ptr<Object>> objects_;
  std::vector<std::unique_ptr<Object>> spare_ioas_;  // type-stable: kept for calls that still hold an address
  std::atomic<std::uint32_t> compat_id_{0};          // 0: none
  std::atomic<bool> per_process_{false};             // RLIMIT_MODE
  SpaceUsage settled_;                               // shares of IOASes that are gone
};

}  // namespace iovane::backends::model
