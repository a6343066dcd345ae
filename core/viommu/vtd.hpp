// Vtd: an emulated VT-d unit's DMA translation, shadowed on the host.
//
// The VMM keeps the registers; it tells the Vtd about the writes that matter (root table, translation enable,
// invalidation queue, queue tail) and about the devices behind the unit. The Vtd reads descriptors from the queue,
// walks what they name, compares with the shadow, and applies the differences as one batch per domain. Wait descriptors
// of a notification complete, in order, when everything before them is in effect on every host.
//
// The guest must see CAP.CM = 1 (caching mode), so that it also invalidates when it maps; without it a VMM only learns
// of unmaps.
//
// Domains. Devices that share a page table share a ShadowDomain, keyed by table root, levels, stage and domain id.
// Devices in pass-through, and all of them while translation is off, share one that maps RAM to itself. Blocked devices
// are attached to nothing.
//
// Bounds. One call of write_tail() or advance() looks at `work_per_call` entries at most, then says `pending`: the VMM
// calls advance() again when it likes, and other guests have their turn in between. A guest whose tables need more
// index nodes than a domain may have (cycles, self references) gets that domain emptied and marked failed; it stays so
// until the guest invalidates all of it again. Domains are at most `domains_max`.
//
// Faults. A shadow does not see DMA that the host blocked. When the host reports one, fault_of() walks the guest's own
// tables and says what the specification would have recorded. Emulated devices use translate().
//
// Threads: one at a time; translate() and fault_of() from any thread while no endpoint is added or removed.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "viommu/guest_memory.hpp"
#include "viommu/shadow_domain.hpp"
#include "viommu/vtd_descriptor.hpp"
#include "viommu/vtd_queue.hpp"
#include "viommu/vtd_sync.hpp"
#include "viommu/vtd_tables.hpp"
#include "viommu/vtd_walk.hpp"

namespace iovane::viommu {

struct VtdConfig {
  VtdCapabilities capabilities{};
  VtdDescriptorRules descriptors{};
  DomainConfig domain{};  ///< of every domain; address_bits, granule and reserved are set here
  std::uint32_t domains_max = 1024;
  std::uint64_t work_per_call = 1U << 16;  ///< table entries looked at, or taken back, per call
};

/// What the VMM does when the unit has something to say.
class VtdEvents {
 public:
  virtual ~VtdEvents() = default;
  /// A wait descriptor with the interrupt flag completed: set ICS.IWC and raise the completion event.
  virtual void wait_completed() noexcept {}
  /// FSTS.IQE: the descriptor at this head is not one. The queue stands still until the guest clears the fault.
  virtual void queue_error(std::uint64_t head) noexcept { static_cast<void>(head); }
  /// Not about DMA: the VMM's interrupt remapping wants to know.
  virtual void interrupt_cache_invalidated(const VtdDescriptor& descriptor) noexcept { static_cast<void>(descriptor); }
  /// A host refused a change. The guest's device will fault there; the guest cannot be told.
  virtual void shadow_failed(std::uint16_t domain, const Error& error) noexcept {
    static_cast<void>(domain), static_cast<void>(error);
  }
};

struct VtdStats {
  std::uint64_t descriptors = 0;
  std::uint64_t waits = 0;
  std::uint64_t queue_errors = 0;
  std::uint64_t entries_compared = 0;
  std::uint64_t reserved_entries = 0;  ///< present table entries with reserved bits met
  std::uint64_t failed_domains = 0;    ///< emptied for exceeding their bounds
  std::uint64_t moved_endpoints = 0;   ///< to another table
  std::uint64_t yields = 0;            ///< calls that ended because their work was used up
};

class Vtd {
 public:
  /// `memory` and `events` outlive it.
  Vtd(const GuestMemory& memory, VtdConfig config, VtdEvents& events);
  Vtd(const Vtd&) = delete;
  Vtd& operator=(const Vtd&) = delete;
  ~Vtd();

  /// Names a device, or one of its PASIDs, and where its DMA happens (null: emulated, in this process). The target has
  /// the guest's regions already and outlives the endpoint. Waits. Errors: busy (there is one), and attach's.
  Result<void> add_endpoint(std::uint16_t source, std::optional<std::uint32_t> pasid, ShadowTarget* target);
  /// Waits until nothing of the guest's is left on its target.
  Result<void> remove_endpoint(std::uint16_t source, std::optional<std::uint32_t> pasid);

  /// GCMD.SRTP with this RTADDR. Takes effect at once for all endpoints, as if followed by global invalidations.
  Progress set_root_table(std::uint64_t rtaddr) noexcept;
  /// GCMD.TE.
  Progress set_translation(bool enabled) noexcept;
  /// GCMD.QIE with this IQA: bits 63:12 the queue, 11 its descriptors' width, 2:0 its size. Head and tail become 0.
  /// False for an IQA that is not one.
  bool set_queue(std::uint64_t iqa) noexcept;
  /// IQT as written. Processes everything up to it, unless an earlier call is not finished or the queue stands still.
  Progress write_tail(std::uint64_t iqt) noexcept;
  /// The guest cleared FSTS.IQE: goes on at the head, where it has put another descriptor by now.
  Progress clear_queue_error() noexcept;
  /// IQH as the guest reads it.
  std::uint64_t head() const noexcept;

  /// One descriptor by other means (register-based invalidation). Effective when `done`.
  Progress execute(const VtdDescriptor& descriptor) noexcept;

  /// Goes on with what is pending. Call it when a target's event arrives, or after a call that ran out of work.
  Progress advance() noexcept;
  bool idle() const noexcept { return !busy_; }
  void wait(std::chrono::nanoseconds timeout) noexcept;
  /// advance() until done.
  void finish() noexcept;

  /// What a migrating guest's unit needs beside its registers. Precondition of both: idle(). Tables are guest memory
  /// and travel with it: restore_state() walks them anew for the endpoints that are there.
  struct State {
    std::uint32_t version = 1;
    std::uint32_t enabled = 0;
    std::uint64_t rtaddr = 0;
    std::uint64_t iqa = 0;
    std::uint64_t head = 0;         ///< as IQH
    std::uint64_t tail = 0;         ///< as IQT
    std::uint64_t queue_error = 0;  ///< FSTS.IQE is set: the queue stands still
  };
  State save_state() const noexcept;
  Result<void> restore_state(const State& state) noexcept;

  /// RAM was added (the targets have it already), or is about to go. Wait for `done` before GuestMemory::remove().
  Progress memory_added() noexcept;
  Progress memory_removing(const Region& region) noexcept;

  /// What an endpoint's address means, by the shadow. Nothing: it faults.
  std::optional<std::pair<std::uint64_t, Access>> translate(std::uint16_t source, std::optional<std::uint32_t> pasid,
                                                            std::uint64_t iova) const noexcept;
  /// Why the guest's own tables refuse a request; none when they allow it. `record` is false when FPD says not to.
  struct FaultReport {
    VtdFault reason = VtdFault::none;
    bool record = true;
  };
  FaultReport fault_of(std::uint16_t source, std::optional<std::uint32_t> pasid, std::uint64_t iova,
                       bool write) const noexcept;

  const VtdStats& stats() const noexcept { return stats_; }
  /// The domain that an endpoint is attached to; null when it is blocked or unknown.
  const ShadowDomain* domain_of(std::uint16_t source, std::optional<std::uint32_t> pasid) const noexcept;
  std::size_t domains() const noexcept { return domains_.size(); }

 private:
  struct Domain;
  struct Endpoint {
    std::uint16_t source = 0;
    std::optional<std::uint32_t> pasid;
    ShadowTarget* target = nullptr;
    VtdBinding binding{};
    Domain* domain = nullptr;
    bool stale = false;  // to be looked up again
  };
  struct Task {  // a range of a domain to be compared, or emptied
    Domain* domain = nullptr;
    IovaRange range{};
    bool empties = false;
  };
  struct PendingWait {  // as its descriptor has it
    std::uint64_t flags_and_data = 0;
    std::uint64_t status_address = 0;
  };

  Endpoint* find(std::uint16_t source, std::optional<std::uint32_t> pasid) noexcept;
  const Endpoint* find(std::uint16_t source, std::optional<std::uint32_t> pasid) const noexcept;
  VtdBinding binding_of(const GuestMemory::View& view, const Endpoint& endpoint) const noexcept;
  void apply(const GuestMemory::View& view, const VtdDescriptor& d) noexcept;
  void mark_endpoints(const VtdDescriptor& d) noexcept;
  void move_stale_endpoints(const GuestMemory::View& view) noexcept;
  Result<void> move_endpoint(const GuestMemory::View& view, Endpoint& endpoint, const VtdBinding& binding) noexcept;
  Result<Domain*> domain_for(const GuestMemory::View& view, const VtdBinding& binding) noexcept;
  Domain& make_domain(const VtdBinding& binding);
  void drop_unused_domains() noexcept;
  Domain* domain_named_last() const noexcept;
  std::uint32_t read_common(const GuestMemory::View& view, VtdQueue::Run run) noexcept;
  std::span<const std::unique_ptr<Domain>> domains_named(const VtdDescriptor& d) noexcept;
  bool tasks_wait() const noexcept { return task_next_ != tasks_.size(); }
  bool may_read() const noexcept;
  static bool is_named(const VtdDescriptor& d, const Domain& domain) noexcept;
  void invalidate(const GuestMemory::View& view, const VtdDescriptor& d) noexcept;
  void invalidate_pages(const GuestMemory::View& view, const VtdDescriptor& d) noexcept;
  void compare_pages(const GuestMemory::View& view, Domain& domain, const IovaRange& named, bool now) noexcept;
  bool compare_page(const GuestMemory::View& view, Domain& domain, std::uint64_t iova) noexcept;
  bool compare_run(const GuestMemory::View& view, Domain& domain, const IovaRange& range) noexcept;
  bool note(Domain& domain, const SyncOutcome& outcome) noexcept;
  void compare(Domain& domain, const IovaRange& range) noexcept;
  bool run_tasks(const GuestMemory::View& view) noexcept;
  void run_task(const GuestMemory::View& view, Task& task) noexcept;
  static Task emptying(Domain& domain) noexcept;
  void empty_some(const GuestMemory::View& view, Task& task) noexcept;
  void fail_domain(Domain& domain, const Error& error) noexcept;
  bool read_descriptors(const GuestMemory::View& view) noexcept;
  void mark_dirty(Domain& domain) noexcept;
  bool commit_domains() noexcept;
  void finish_round(const GuestMemory::View& view) noexcept;
  Progress begin() noexcept;

  const GuestMemory& memory_;
  GuestMemory::Reader reader_;  // of the data path: one thread at a time
  VtdConfig config_;
  VtdEvents& events_;
  std::vector<Endpoint> endpoints_;
  std::vector<std::unique_ptr<Domain>> domains_;  // by binding.domain
  struct Named {                                  // where in domains_ a domain id is: guests name one again and again
    std::uint32_t id = ~0U;
    std::size_t first = 0;
    std::size_t count = 0;
  };
  Named named_;
  std::vector<Domain*> dirty_;  // with staged edits or a batch in flight
  std::vector<Task> tasks_;     // first in, first out from task_next_
  std::size_t task_next_ = 0;
  std::vector<PendingWait> waits_;  // room for as many as the queue has descriptors; of this round, in order:
  std::size_t waits_pending_ = 0;   // so many
  WorkBudget budget_{};
  std::uint64_t rtaddr_ = 0;
  bool enabled_ = false;
  bool busy_ = false;
  bool any_stale_ = false;
  bool queue_error_ = false;
  bool error_reported_ = false;
  VtdQueue queue_;
  VtdStats stats_;
};

}  // namespace iovane::viommu
