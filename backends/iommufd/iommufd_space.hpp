// One IOAS behind the seam, and the state that the spaces of one descriptor share.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "backends/backend.hpp"
#include "backends/iommufd/ioas_calls.hpp"
#include "backends/iommufd/staging.hpp"
#include "backends/kernel_call.hpp"
#include "backends/uapi/iommufd.hpp"

namespace iovane::backends::iommufd {

/// A device bound to the descriptor through its cdev.
struct BoundDevice {
  DeviceId id{};
  std::string name;
  KernelFd fd;               ///< our own: opened, or a duplicate of the caller's
  std::uint32_t object = 0;  ///< its id on the descriptor
  HardwareInfo hardware;     ///< nothing known on kernels that do not tell
  std::vector<IovaRange> reserved;
  int numa_node = -1;  ///< as the kernel numbers it; -1: not known
};

/// What the spaces of one descriptor share. Outlives them; members are locked or constant.
class SharedDescriptor {
 public:
  SharedDescriptor(Kernel& kernel, KernelFd fd, bool exclusive, StagingOptions staging = {});

  Kernel& kernel() const noexcept { return kernel_; }
  int fd() const noexcept { return fd_.get(); }
  bool exclusive() const noexcept { return exclusive_; }
  bool map_file() const noexcept { return map_file_; }
  Bytes granule() const noexcept { return granule_; }
  Staging& staging() noexcept { return staging_; }

  /// Opens (or duplicates) the device's cdev, binds it and pins what is registered.
  Result<BoundDevice> bind(const DeviceSource& source);
  /// Before the descriptor of a bound device goes.
  void unbind(const BoundDevice& device) noexcept;

 private:
  Result<std::uint32_t> bind_cdev(int cdev, int callers_fd, const std::string& name);

  Kernel& kernel_;
  KernelFd fd_;
  bool exclusive_;  // opened by us: nobody else uses its compatibility IOAS
  bool map_file_;
  Bytes granule_;
  Staging staging_;
  // relaxed increments: an id is only compared.
  std::atomic<std::uint32_t> next_device_{1};
  // A cdev that the caller handed in stays bound for as long as his descriptor lives; attaching it again finds its id.
  struct Remembered {
    int callers_fd;
    std::uint32_t object;
  };
  std::mutex mutex_;  // guards remembered_
  std::vector<Remembered> remembered_;
};

class IommufdSpace final : public BackendSpace {
 public:
  IommufdSpace(SharedDescriptor& shared, std::uint32_t ioas, const SpaceOptions& options);
  ~IommufdSpace() override;

  const SpaceFacts& facts() const noexcept override { return facts_; }
  void execute(std::span<const BackendOp> ops, std::span<BackendOpResult> results) noexcept override;
  Result<Bytes> unmap_all() noexcept override;
  Result<RegionId> register_memory(const MemoryRange& memory) override;
  Result<void> unregister_memory(RegionId region) override;
  Result<AttachedDevice> attach(const DeviceSource& source) override;
  Result<void> detach(DeviceId device) override;
  Result<std::vector<IovaRange>> usable_ranges() override;
  Result<void> promise(std::span<const IovaRange> ranges) override;
  Headroom headroom() noexcept override;
  Result<void> start_dirty_tracking(DirtyHarvest& harvest) override;
  Result<void> stop_dirty_tracking() override;
  Result<void> read_dirty(const IovaRange& range, std::span<std::uint64_t> bitmap) noexcept override;

  int page_fault_fd() const noexcept override;
  Result<std::size_t> read_page_faults(std::span<PageFault> out) noexcept override;
  Result<void> answer_page_fault(std::uint32_t cookie, bool retry) noexcept override;

  /// Takes an attached device over from another space of the same descriptor; translation goes from one to the other
  /// without a gap. Both spaces are unchanged on failure.
  Result<AttachedDevice> take_over(IommufdSpace& from, DeviceId device);
  const SharedDescriptor* shared() const noexcept { return &shared_; }

 private:
  BackendOpResult run(const BackendOp& op) noexcept;
  BackendOpResult map(const BackendOp& op) noexcept;
  BackendOpResult copy(const BackendOp& op) noexcept;
  BackendOpResult copy_or_map(const BackendOp& op) noexcept;
  BackendOpResult unmap(IovaRange range) noexcept;
  // iommufd_faults.cpp.
  Result<void> open_fault_queue() noexcept;
  void close_fault_queue() noexcept;
  // iommufd_dirty.cpp.
  int set_tracking(std::uint32_t table, bool on) noexcept;
  int read_tables(const IovaRange& range, bool clear, std::span<std::uint64_t> bitmap) noexcept;
  void harvest(const IovaRange& range) noexcept;
  const StagedMemory* region_of(const BackendOp& op) const noexcept;
  Error map_error(const char* name, int os_errno, const BackendOp& op, std::uint64_t memory) noexcept;
  /// Points the device at this space: its IOAS, or an I/O page table of it that tracks dirty pages or
  /// reports page faults.
  Result<void> connect(const BoundDevice& device);
  Result<void> connect_own_table(const BoundDevice& device);
  Error table_error(int os_errno, const BoundDevice& device) const noexcept;
  int attach_page_table(const BoundDevice& device, std::uint32_t object) noexcept;
  AttachedDevice describe(const BoundDevice& device) const;
  void devices_changed() noexcept;

  SharedDescriptor& shared_;
  std::uint32_t ioas_;
  SpaceOptions options_;
  SpaceFacts facts_;
  std::vector<BoundDevice> devices_;
  std::vector<std::uint32_t> own_tables_;
  std::uint32_t fault_queue_ = 0;  // its id on the descriptor; 0: none
  KernelFd fault_fd_;
  std::array<uapi::iommufd::PageFault, 64> faults_;  // read from the kernel, and not handed out yet
  std::size_t fault_next_ = 0;
  std::size_t fault_count_ = 0;
  DirtyHarvest* harvest_ = nullptr;  // not null: tracking is on
  // Index = RegionId - 1; null where a region was unregistered. Read by execute(), written by the control plane only.
  std::vector<const StagedMemory*> regions_;
  std::uint32_t staging_ioas_ = 0;
};

}  // namespace iovane::backends::iommufd
