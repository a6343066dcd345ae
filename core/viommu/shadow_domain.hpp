// ShadowDomain: an address space whose IOVAs a guest chooses, kept in step on every host side it is attached to.
//
// A front end turns one guest notification into edits (map, unmap, assign), then commits: the edits of the notification
// are one batch on every target, and the notification is answered when commit() or poll() says `done`.
//
// Two truths are kept in one index (shadow_index.hpp): what the guest mapped, and what the host was told. They differ
// where the guest points outside its RAM or into IOVAs that the host keeps for itself: there the guest's mapping exists
// (emulated devices can use it) and the host's does not.
//
// Units. A run of leaves that one edit creates becomes one host mapping, a unit, up to `merge_bytes_max`: fewer kernel
// calls and fewer mapped areas. Host mappings cannot be cut on iommufd and type1, so when a guest removes part of a
// unit, the unit is unmapped and its remainders are mapped again: for that moment devices fault on the remainders. Cuts
// and the bytes concerned are counted. With `exact`, every leaf is its own unit and no cut ever happens, except where
// the guest breaks up a superpage of its own.
//
// Failures. Each host side answers for itself. When one of them fails a map, the others take it back and the guest's
// mapping is gone; the edit's tag carries the error. When one fails an unmap, that range is the engine's to quarantine;
// the tag carries the error. Nothing is only counted or only logged.
//
// Threads: one at a time, except translate() and stats(), which any thread may call.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "iovane/config.hpp"
#include "iovane/result.hpp"
#include "iovane/types.hpp"
#include "viommu/guest_memory.hpp"
#include "viommu/shadow_index.hpp"
#include "viommu/shadow_target.hpp"

namespace iovane::viommu {

struct DomainConfig {
  std::string name = "guest domain";
  unsigned granule_shift = 12;         ///< smallest guest leaf: 12 to 28
  unsigned address_bits = 64;          ///< IOVAs have this many bits
  std::uint32_t nodes_max = 1U << 16;  ///< index nodes of 4 KiB: bounds memory and what a guest can make us keep
  Bytes merge_bytes_max{2U << 20};     ///< longest unit made of several leaves; a longer leaf stays one unit
  bool exact = false;                  ///< every leaf its own unit: no merging, no gaps
  /// How a later target that cannot offer all IOVAs is treated: engine_managed accepts it unless live mappings are in
  /// its way; fixed wants `promised` to stay usable; host_constrained freezes what the first target offered.
  LayoutPolicy layout = LayoutPolicy::engine_managed;
  std::vector<IovaRange> promised;  ///< LayoutPolicy::fixed: sorted, disjoint
  std::vector<IovaRange> reserved;  ///< never shadowed (VT-d's interrupt range): sorted, disjoint
};

/// Counters only grow; gauges are of the moment. Read by any thread; each value is consistent in itself.
struct DomainStats {
  std::uint64_t leaves_mapped = 0;  ///< index leaves that edits created
  std::uint64_t leaves_unmapped = 0;
  std::uint64_t host_ops = 0;  ///< operations given to the targets, each counted once however many mirror it
  std::uint64_t batches = 0;
  std::uint64_t merged_leaves = 0;   ///< leaves that share a unit with the one before them
  std::uint64_t replaces = 0;        ///< done as one operation
  std::uint64_t cuts = 0;            ///< units taken apart because the guest unmapped a part
  std::uint64_t gap_bytes = 0;       ///< remainders that were unmapped for a moment
  std::uint64_t lost_bytes = 0;      ///< remainders that could not be mapped again
  std::uint64_t failed_edits = 0;    ///< host operations that failed on some target
  std::uint64_t rollbacks = 0;       ///< operations taken back on other targets because of that
  std::uint64_t failed_unmaps = 0;   ///< of failed_edits: unmaps; the engine quarantined the range
  std::uint64_t unbacked_bytes = 0;  ///< mapped by the guest to no RAM or to reserved IOVAs; not told to the host
  std::uint64_t live_leaves = 0;     ///< gauge
  std::uint64_t index_nodes = 0;     ///< gauge; 4 KiB each
  std::uint64_t targets = 0;         ///< gauge
};

/// An edit whose host side failed.
struct EditFailure {
  std::uint32_t tag = 0;  ///< as given to the edit
  Error error{};
};

/// What an unmap does with mappings that reach across the border of its range.
enum class CutRule : std::uint8_t {
  cut,     ///< page tables: what lies inside goes, the rest stays
  refuse,  ///< virtio-iommu: would_bisect, and nothing changes
};

class ShadowDomain {
 public:
  explicit ShadowDomain(DomainConfig config);
  ShadowDomain(const ShadowDomain&) = delete;
  ShadowDomain& operator=(const ShadowDomain&) = delete;
  /// Takes everything away from the targets that are still attached, and waits for it.
  ~ShadowDomain();

  using View = GuestMemory::View;

  /// Maps a free range. `gpa` is aligned as the range is. Errors: invalid_argument, overflow, iova_reserved (beyond
  /// address_bits), iova_busy (something is mapped there), limit_reached, out_of_memory; nothing changed then.
  Result<void> map(const View& view, IovaRange range, std::uint64_t gpa, Access access, std::uint32_t tag = 0) noexcept;
  /// Unmaps what is mapped inside a range, which may have holes or be empty; the number of leaves removed.
  Result<std::uint32_t> unmap(const View& view, IovaRange range, CutRule rule, std::uint32_t tag = 0) noexcept;
  /// map() and unmap() of one granule where that is as simple as can be, in the caller's code: for front ends, whose
  /// guests do hardly anything else. False: nothing was done, map() and unmap() know what to do. In shadow_granule.hpp.
  bool map_granule(const View& view, const IovaRange& range, std::uint64_t gpa, Access access,
                   std::uint32_t tag) noexcept;
  bool unmap_granule(const IovaRange& range, CutRule rule, std::uint32_t tag) noexcept;
  /// The same for who has index().granule_slot() of a granule already; `access` is not none, `gpa` aligned.
  bool map_slot(const View& view, std::uint64_t* slot, std::uint64_t iova, std::uint64_t gpa, Access access,
                std::uint32_t tag) noexcept;
  bool unmap_slot(std::uint64_t* slot, std::uint64_t iova, CutRule rule, std::uint32_t tag) noexcept;
  std::uint64_t* granule_slot(std::uint64_t iova) noexcept { return index_.granule_slot(iova); }
  /// Makes a range say exactly this, whatever it said before; true when anything changed. A single leaf that is its
  /// own unit is replaced in one operation.
  Result<bool> assign(const View& view, IovaRange range, std::uint64_t gpa, Access access,
                      std::uint32_t tag = 0) noexcept;
  /// Moves every leaf that can now be told to the host (RAM was added, a range became usable) to it.
  Result<void> refresh_backing(const View& view) noexcept;
  /// Takes every mapping of a region away from the host; the guest's own stays.
  Result<void> withdraw_region(const Region& region) noexcept;

  /// Forgets what is mapped in a range without telling the targets: someone else keeps their side from now on (a TCE
  /// table that moves into KVM). Precondition: idle(), and no unit reaches across the range's borders.
  void abandon(IovaRange range) noexcept;

  /// Sends the staged edits to the targets as one batch. `pending`: poll() until done. No edits while pending.
  Progress commit() noexcept;
  Progress poll() noexcept;
  bool idle() const noexcept { return state_ == State::idle && staged_ == 0; }
  /// A batch has not ended yet: no edits now.
  bool in_flight() const noexcept { return state_ != State::idle; }
  /// Edits staged and not yet committed.
  std::size_t staged() const noexcept { return staged_; }
  /// commit(), then waits for the end.
  void commit_and_wait() noexcept;
  /// The same; the first failure of the batch, or `before`, which comes first.
  Result<void> commit_after(const Result<void>& before) noexcept;
  void wait(std::chrono::nanoseconds timeout) noexcept;
  /// Failures of the batch that ended last; valid until the next edit.
  std::span<const EditFailure> failures() const noexcept { return failures_; }

  /// Control plane, waits: makes the target hold everything that is live. On error nothing is left on it. Refused with
  /// the hole and the mapping named when the layout policy or a live mapping forbids it. Precondition: idle().
  Result<void> attach(const View& view, ShadowTarget& target);
  /// Control plane, waits: takes everything away from the target. The target is forgotten whatever happens.
  Result<void> detach(ShadowTarget& target);
  bool attached(const ShadowTarget& target) const noexcept;
  std::size_t targets() const noexcept { return sides_.size(); }

  /// What a device's address means. Any thread, lock-free.
  std::optional<std::pair<std::uint64_t, Access>> translate(std::uint64_t iova) const noexcept {
    return index_.translate(iova);
  }
  const ShadowIndex& index() const noexcept { return index_; }
  const DomainConfig& config() const noexcept { return config_; }
  /// IOVAs that every target can map: a snapshot, sorted.
  const std::vector<IovaRange>& usable_ranges() const noexcept { return usable_; }
  DomainStats stats() const noexcept;

  /// Calls `visit(range, gpa, access)` for every guest mapping in address order: one call per mapping the guest made,
  /// larger ones in parts where they cross regions.
  void for_each_mapping(const std::function<void(IovaRange, std::uint64_t, Access)>& visit) const;

 private:
  enum class State : std::uint8_t { idle, in_flight, rolling_back };
  struct Side {
    ShadowTarget* target = nullptr;
    Progress progress = Progress::done;
    std::vector<IovaRange> usable;
    std::vector<OpFailure> failures;
    std::vector<HostOp> rollback;
  };

  Result<void> check_range(const IovaRange& range, std::uint64_t gpa, Access access) const noexcept;
  Result<void> map_pieces(const View& view, IovaRange range, std::uint64_t gpa, Access access, bool head,
                          std::uint32_t tag) noexcept;
  const IovaRange* usable_at(std::uint64_t iova) const noexcept {
    return window_.contains(Iova{iova}) ? &window_ : find_usable(iova);
  }
  const IovaRange* find_usable(std::uint64_t iova) const noexcept;
  std::uint64_t next_usable(std::uint64_t iova) const noexcept;
  bool border_is_clean(std::uint64_t iova, std::uint64_t flag) const noexcept;
  IovaRange unit_around(std::uint64_t iova) const noexcept;
  bool stage(const HostOp& op, std::uint32_t tag) noexcept;
  HostOp* stage_in_place(std::uint32_t tag) noexcept;
  bool stage_remainder(const View& view, IovaRange range, std::uint32_t tag) noexcept;
  void begin_edit() noexcept {
    if (!failures_.empty()) failures_.clear();
  }
  Progress advance() noexcept;
  bool handle_failures() noexcept;
  void finish_batch() noexcept;
  void recompute_usable();
  Result<void> check_layout(const ShadowTarget& target, const std::vector<IovaRange>& usable) const;
  Result<void> run_and_wait(Side& side, std::span<const HostOp> ops) noexcept;
  void for_each_unit(const View* view, const std::function<bool(const HostOp&)>& visit) const;

  struct Counters {
    std::atomic<std::uint64_t> leaves_mapped{0}, leaves_unmapped{0}, host_ops{0}, batches{0}, merged_leaves{0},
        replaces{0}, cuts{0}, gap_bytes{0}, lost_bytes{0}, failed_edits{0}, rollbacks{0}, failed_unmaps{0},
        unbacked_bytes{0}, live_leaves{0}, index_nodes{0}, targets{0};
  };
  // relaxed: counters stand for themselves; only the domain's own thread writes, so no read-modify-write is needed.
  static void add(std::atomic<std::uint64_t>& c, std::uint64_t n) noexcept {
    c.store(c.load(std::memory_order_relaxed) + n, std::memory_order_relaxed);
  }

  DomainConfig config_;
  ShadowIndex index_;
  std::uint64_t granule_mask_;  // granule - 1
  State state_ = State::idle;
  bool cut_in_place_ = false;   // every target can cut
  bool layout_frozen_ = false;  // host_constrained: promised holds what the first target offered
  // Room for operations, and for the tags of the edits they came from; the first staged_ are of this batch.
  std::vector<HostOp> ops_;
  std::vector<std::uint32_t> tags_;
  std::size_t staged_ = 0;
  std::size_t room_ = 0;  // of ops_; none while there is nobody to tell
  HostOp for_nobody_;
  std::vector<EditFailure> failures_;
  std::vector<Side> sides_;
  std::vector<IovaRange> usable_;
  static constexpr IovaRange no_window{iova_max, Iova{0}};
  mutable IovaRange window_ = no_window;  // the one of usable_ that was asked for last
  Counters counters_;
};

}  // namespace iovane::viommu

#include "viommu/shadow_granule.hpp"
