// SpaceCore: an address space behind its public handle.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "engine/batch_executor.hpp"
#include "engine/dirty_log.hpp"
#include "engine/lane.hpp"
#include "engine/lane_tasks.hpp"
#include "engine/space_cache.hpp"
#include "engine/space_events.hpp"
#include "engine/space_layout.hpp"
#include "engine/space_state.hpp"
#include "engine/stats_page.hpp"
#include "iovane/address_space.hpp"

namespace iovane::backends {
class SpaprControl;
class SpaprEeh;
}  // namespace iovane::backends

namespace iovane::engine {

class EngineCore;
class QueueCore;

/// What a device is called in texts and in the layout.
std::string name_of(const backends::DeviceSource& source);

/// Shared by the AddressSpace, its queues, leases and registered memories; the last of them ends it. After close() the
/// kernel objects are gone and every call answers Errc::closed.
class SpaceCore : public std::enable_shared_from_this<SpaceCore> {
 public:
  static Result<std::shared_ptr<SpaceCore>> create(std::shared_ptr<EngineCore> engine,
                                                   const AddressSpaceConfig& config);
  ~SpaceCore();

  const AddressSpaceFacts& facts() const noexcept { return facts_; }
  /// Stays until close(); null after it.
  backends::BackendSpace* backend() noexcept { return state_.backend.get(); }
  Lane& lane() noexcept { return lane_; }
  /// The lane's holder only.
  BatchExecutor& executor() noexcept { return *executor_; }

  /// Errors: invalid_argument, out_of_memory, and those of starting a worker where the queue needs one.
  Result<std::unique_ptr<QueueCore>> open_queue(const QueueConfig& config);
  /// One who will submit again and again has come: a queue, or the owner of a DirectBatch.
  void expect_company();
  Completion run_now(const Operation& operation) noexcept;
  Result<DeviceInfo> attach(const DeviceConfig& device);
  Result<void> detach(std::uint32_t device_id);
  // space_devices.cpp.
  Result<DeviceInfo> move_device(std::uint32_t device_id, SpaceCore& to, AddressSpace::Gap gap);
  int page_fault_fd() noexcept;
  Result<std::size_t> read_page_faults(std::span<PageFaultEvent> out) noexcept;
  Result<void> answer_page_fault(const PageFaultEvent& event, PageFaultAnswer answer) noexcept;
  // space_events.cpp.
  Result<void> on_page_fault(PageFaultHandler handler);
  Result<std::unique_ptr<DescriptorTask>> watch(int fd, std::function<bool()> handler);
  int fault_record_fd() noexcept;
  Result<std::size_t> read_fault_records(std::span<FaultRecord> out) noexcept;
  // space_dirty.cpp.
  Result<void> start_dirty_tracking();
  Result<void> stop_dirty_tracking();
  Result<std::uint64_t> read_dirty(const IovaRange& range, Bytes page_size, std::span<std::uint64_t> bitmap);
  std::size_t take_unmapped_dirty(std::span<DirtyRun> out) noexcept;
  DirtyStats dirty_stats() noexcept;

  // space_windows.cpp.
  Result<WindowLimits> window_limits();
  Result<std::vector<Window>> windows();
  Result<Window> create_window(const WindowRequest& request);
  Result<void> remove_window(Iova start);
  // error_handling.cpp. Runs `call` while the space is kept open; its error, closed or unsupported.
  Result<void> recover(const std::function<Result<void>(backends::SpaprEeh&)>& call);

  Result<std::vector<IovaRange>> usable_ranges();
  /// What the space is on, whatever the engine is called. Any thread, without the lane.
  backends::Interface interface() const noexcept { return interface_; }
  backends::MemlockUse memlock_use() noexcept;
  // space_devices.cpp.
  Result<GuestLayout> guest_layout();
  Result<std::vector<LayoutBreach>> check_layout();
  Result<MemoryId> register_memory(const MemoryConfig& memory);
  void unregister_memory(MemoryId memory) noexcept;
  Result<Bytes> memory_length(MemoryId memory) noexcept;
  Result<void> open_cache(const CacheConfig& config);
  /// Null before open_cache(). Stays until the space object goes, also after close().
  SpaceCache* cache() const noexcept {
    // A.cache - acquire, pairs with R.cache in open_cache(): the opened cache.
    return cache_published_.load(std::memory_order_acquire);
  }
  Result<MappingInfo> find(Iova iova) noexcept;
  Result<MappingInfo> info(MappingId mapping) noexcept;
  void for_each(IovaRange range, const std::function<bool(const MappingInfo&)>& visit);
  Result<Bytes> unmap_all() noexcept;
  Result<Bytes> flush() noexcept;
  Stats stats() const noexcept;
  CloseReport close() noexcept;

 private:
  using DeviceNames = std::map<std::uint32_t, backends::DeviceSource>;  // of attached devices: how to attach them again

  SpaceCore(std::shared_ptr<EngineCore> engine, unsigned node, const AddressSpaceConfig& config,
            std::unique_ptr<backends::BackendSpace> backend, MappingIndex index);
  /// Makes worker_ the node's worker, once. Not with the lane held.
  Result<void> start_worker();
  Result<DeviceInfo> attach_now(const DeviceConfig& device);
  /// Takes a device out of the backend. Called with the lane held.
  Result<void> release_device(backends::DeviceId device);
  void devices_came() noexcept;
  void stop_pump() noexcept;
  /// An entry to be made one of device_names_ when the device has its id: that cannot fail.
  static DeviceNames::node_type named_device(const backends::DeviceSource& source);
  void name_device(DeviceNames::node_type named, backends::DeviceId id) noexcept;
  /// Called with the lane held. refresh_usable() reads what the host says and follows it; its error is the first thing
  /// that does not hold any more. expect_device() is asked before a device comes.
  Result<void> refresh_usable();
  Result<std::vector<LayoutBreach>> read_usable();
  Result<void> expect_device(const backends::DeviceSource& source);
  void refresh_facts();
  Result<backends::SpaprControl*> spapr() const;
  /// Of a mapping that is there.
  bool is_stale(MappingId mapping) const noexcept;
  MappingInfo describe(MappingId mapping) const noexcept;
  std::optional<IovaRange> next_dirty_run(const IovaRange& rest, bool& quarantined) noexcept;
  Error read_dirty_runs(IovaRange& rest, DirtyBitmap& bitmap, std::vector<std::uint64_t>& words, bool& more);
  Result<DeviceInfo> move_device_now(std::uint32_t device_id, SpaceCore& to, AddressSpace::Gap gap);
  Result<DeviceInfo> move_with_gap(std::uint32_t device_id, SpaceCore& to);
  Result<DeviceInfo> moved_in(backends::AttachedDevice device, SpaceCore& from);
  Error closed_error() const noexcept;

  const std::shared_ptr<EngineCore> engine_;  // keeps the backend open
  const unsigned node_;
  const AddressSpaceConfig config_;
  Lane lane_;
  SpaceCounters counters_;
  StatsSlot* published_ = nullptr;  // where the counters are instead, when others may look
  SpaceState state_;
  std::unique_ptr<BatchExecutor> executor_;
  std::mutex recovery_lock_;  // before the lane
  std::mutex worker_lock_;
  Worker* worker_ = nullptr;  // the engine's; set once
  std::unique_ptr<StaleFlusher> flusher_;
  std::unique_ptr<Relief> relief_;
  std::unique_ptr<WorkerHeir> heir_;
  std::mutex pump_lock_;
  std::unique_ptr<PageFaultPump> pump_;
  std::atomic<std::uint32_t> companions_{0};
  std::optional<SpaceLayout> layout_;  // made by create()
  DeviceNames device_names_;
  std::unique_ptr<DirtyLog> dirty_;  // made by the first start_dirty_tracking()
  AddressSpaceFacts facts_;
  const backends::Interface interface_;
  // Last: its mappings go before what carries them.
  std::mutex cache_lock_;  // open_cache() only
  std::unique_ptr<SpaceCache> cache_;
  std::atomic<SpaceCache*> cache_published_{nullptr};
};

}  // namespace iovane::engine
