#include "backends/stage1/stage1_space.hpp"

#include <cerrno>
#include <utility>

#include "backends/iommufd/ioas_calls.hpp"
#include "backends/kernel_error.hpp"
#include "base/checked_math.hpp"
#include "base/error_text.hpp"

namespace iovane::backends::stage1 {
namespace {

/// Entries stored before it are visible to the IOMMU before anything the caller does next (a doorbell, above all). On
/// Arm a store to a device may pass earlier stores to memory; on x86 it may not, and only the compiler is held back.
void publish() noexcept {
#if defined(__aarch64__)
  asm volatile("dsb ishst" ::: "memory");
#else
  asm volatile("" ::: "memory");
#endif
}

}  // namespace

Stage1Space::Stage1Space(SharedNesting& shared, const SpaceOptions& options)
    : shared_{shared}, options_{options}, own_pins_{shared.parent()} {
  facts_.interface = Interface::stage1;
  facts_.capabilities = Capability::explicit_pin | Capability::copy_reuses_pin | Capability::parallel_map |
                        Capability::span_unmap | Capability::unmap_all | Capability::cut_on_unmap |
                        Capability::nesting | Capability::map_is_store;
  if (shared.descriptor().map_file()) facts_.capabilities = facts_.capabilities | Capability::file_memory;
  facts_.granule = Bytes{page_bytes};
}

Stage1Space::~Stage1Space() {
  while (!devices_.empty()) {
    if (detach(devices_.back().bound.id)) continue;
    shared_.route_faults(devices_.back().bound.id, nullptr);
    shared_.unbind(devices_.back());  // closing its descriptor detaches it
    devices_.pop_back();
  }
  const bool clean = targets_.empty() || invalidate_all();
  for (const Nested& nested : tables_) iommufd::destroy(shared_.kernel(), shared_.fd(), nested.table);
  own_pins_.let_go_all();
  if (pool_room_) {
    const int why = shared_.parent().unmap_at(*pool_room_);  // every chunk in it
    if (why == 0 || why == ENOENT) shared_.parent().release(*pool_room_);
  }
  for (const iommufd::StagedMemory* staged : regions_)
    if (staged != nullptr) shared_.parent().drop(staged);
  if (asid_ != 0 && clean) shared_.give_asid(asid_);
}

int Stage1Space::pin(std::uint64_t address, std::byte* memory, std::uint64_t bytes) noexcept {
  // Before the first touch, which is the pinning.
  shared_.prefer_node(memory, Bytes{bytes}, table_node_);
  return shared_.parent().map_at(Iova{address}, reinterpret_cast<std::uintptr_t>(memory), Bytes{bytes}, true);
}

bool Stage1Space::forget(IovaRange range) noexcept {
  publish();
  const bool everything = range.span() + 1 > (std::uint64_t{1} << 40);
  bool done = true;
  for (const InvalidationTarget& target : targets_)
    done = invalidate(shared_.kernel(), shared_.fd(), target, {&range, 1}, everything, false) && done;
  return done;
}

bool Stage1Space::invalidate_all() noexcept { return forget(IovaRange{Iova{0}, last_address(levels_max)}); }

bool Stage1Space::pay_debt() noexcept {
  if (!invalidate_all()) return false;
  debt_.store(false, std::memory_order_relaxed);  // relaxed: whoever still sees it pays again
  own_pins_.let_go_held();
  return true;
}

Error Stage1Space::owing() const noexcept {
  return make_error(Errc::io_error, Stage::unmap, EIO,
                    "the IOMMU did not take the invalidation (HWPT_INVALIDATE) of an unmap; nothing is mapped or "
                    "unmapped here until it does");
}

void Stage1Space::execute(std::span<const BackendOp> ops, std::span<BackendOpResult> results) noexcept {
  if (!editor_) {
    for (std::size_t i = 0; i < ops.size(); ++i)
      results[i] = ops[i].kind == OpKind::unmap
                       ? BackendOpResult{}
                       : BackendOpResult{make_error(Errc::no_device, Stage::map,
                                                    "the form of first-stage tables depends on the device's IOMMU: "
                                                    "attach a device first"),
                                         {}};
    return;
  }
  // relaxed: set by a batch whose caller was told; other threads' batches may still be under way.
  if (debt_.load(std::memory_order_relaxed) && !pay_debt()) [[unlikely]] {
    for (std::size_t i = 0; i < ops.size(); ++i) results[i] = {owing(), {}};
    return;
  }
  Batch batch{*editor_};
  bool mapped = false;
  for (std::size_t i = 0; i < ops.size(); ++i) {
    const BackendOp& op = ops[i];
    switch (op.kind) {
      case OpKind::map:
      case OpKind::copy:
        if (batch.pending.touches(op.range)) [[unlikely]]
          settle(batch, ops, results, i);
        mapped = true;
        if (const std::uint64_t leaf = batch.run.leaf_for(op);
            leaf != 0 && batch.is_page_nearby(op.range) && editor_->map_page(batch.session, op.range.start.value, leaf))
            [[likely]]
          results[i] = {{}, Bytes{page_bytes}};
        else
          results[i] = map(op, batch);
        break;
      case OpKind::unmap:
        if (batch.is_page_nearby(op.range) && editor_->unmap_page(batch.session, op.range.start.value)) [[likely]] {
          batch.pending.add(op.range);
          results[i] = {{}, Bytes{page_bytes}};
        } else {
          results[i] = unmap(op.range, batch);
        }
        break;
      case OpKind::replace:
        results[i] = {base::fail(Errc::unsupported, Stage::map, 0,
                                 "the architecture forbids changing a valid entry to another; unmap and map again"),
                      {}};
        break;
    }
  }
  batch.session.leave();
  if (mapped) publish();
  if (!batch.pending.empty()) settle(batch, ops, results, ops.size());
}

void Stage1Space::settle(Batch& batch, std::span<const BackendOp> ops, std::span<BackendOpResult> results,
                         std::size_t count) noexcept {
  publish();
  const bool done =
      invalidate_leaves(batch.pending.spans(), batch.pending.everything()) ||
      settle_each(batch.pending, ops.subspan(batch.first, count - batch.first), results.subspan(batch.first));
  batch.pending.clear();
  if (!done) [[unlikely]] {
    own_pins_.hold(batch.dying);
    debt_.store(true, std::memory_order_relaxed);  // relaxed: as in execute()
  } else if (!batch.dying.empty()) {
    own_pins_.let_go(batch.dying);
  }
  batch.first = count;
}

bool Stage1Space::invalidate_leaves(std::span<const IovaRange> spans, bool everything) noexcept {
  bool done = true;
  for (const InvalidationTarget& target : targets_)
    done = invalidate(shared_.kernel(), shared_.fd(), target, spans, everything, true) && done;
  return done;
}

// What the IOMMU did not take together it may take run by run, so that each unmap gets a verdict of its own. After a
// few refusals in a row it is not asked any more: it may take a second for each.
bool Stage1Space::settle_each(const PendingRanges& pending, std::span<const BackendOp> ops,
                              std::span<BackendOpResult> results) noexcept {
  constexpr int refusals_max = 4;
  const IovaRange everything = IovaRange::everything();
  const bool one = pending.everything() || pending.spans().size() == 1;  // it was alone already
  int refusals = 0;
  bool done = true;
  for (const IovaRange& span : pending.everything() ? std::span{&everything, 1} : pending.spans()) {
    if (!one && refusals < refusals_max && invalidate_leaves({&span, 1}, false)) {
      refusals = 0;
      continue;
    }
    ++refusals;
    done = false;
    for (std::size_t i = 0; i < ops.size(); ++i)
      if (ops[i].kind == OpKind::unmap && !results[i].error && results[i].bytes.value != 0 &&
          ops[i].range.overlaps(span))
        results[i] = {owing(), {}};
  }
  return done;
}

const IovaRange* Stage1Space::window_of(IovaRange range) const noexcept {
  for (const IovaRange& window : usable_)  // a handful
    if (window.contains(range)) return &window;
  return nullptr;
}

const iommufd::StagedMemory* Stage1Space::region_of(const BackendOp& op) const noexcept {
  if (op.region.value > regions_.size()) return nullptr;
  const iommufd::StagedMemory* const staged = regions_[op.region.value - 1];
  if (staged == nullptr || op.range.span() > staged->staged.span()) return nullptr;
  return op.memory <= staged->staged.span() - op.range.span() ? staged : nullptr;
}

Error Stage1Space::map_error(int os_errno, const BackendOp& op) noexcept {
  const MapFailure failure{.call = "first-stage map",
                           .os_errno = os_errno,
                           .range = op.range,
                           .memory = op.memory,
                           .access = op.access,
                           .account = MemlockAccount::user_pinned};
  return explain_map(shared_.kernel(), failure, usable_);
}

// Where the operation's memory lies in the nesting parent.
Result<std::uint64_t> Stage1Space::intermediate(const BackendOp& op, std::uint64_t& mark) noexcept {
  if (op.region.value != 0) [[likely]] {
    const iommufd::StagedMemory* const staged = region_of(op);
    if (staged == nullptr)
      return base::fail(Errc::invalid_argument, Stage::map, 0, "{} bytes at offset {:#x} are not inside region {}",
                        op.range.length().value, op.memory, op.region.value);
    if (may_write(op.access) && !staged->writable)
      return base::fail(Errc::permission, Stage::map, EPERM,
                        "[{:#x}, {:#x}]: region {} was registered while this process could only read it",
                        op.range.start.value, op.range.last.value, op.region.value);
    return staged->staged.start.value + op.memory;
  }
  if (op.kind == OpKind::copy)
    return base::fail(Errc::invalid_argument, Stage::map, 0, "a copy needs a registered region");
  const auto pinned = own_pins_.take(op.memory, op.range.length(), may_write(op.access));
  if (!pinned) return pinned.error().os_errno != 0 ? map_error(pinned.error().os_errno, op) : pinned.error();
  mark = TableFormat::own_pin_bit;
  return pinned->start.value;
}

BackendOpResult Stage1Space::map(const BackendOp& op, Batch& batch) noexcept {
  const bool aligned = ((op.range.start.value | (op.range.last.value + 1) | op.memory) & (page_bytes - 1)) == 0;
  const IovaRange* const window = window_of(op.range);
  if (!aligned || op.access == Access::none || window == nullptr) [[unlikely]]
    return {map_error(EINVAL, op), {}};
  batch.window = *window;
  std::uint64_t mark = 0;
  const auto address = intermediate(op, mark);
  if (!address) [[unlikely]]
    return {address.error(), {}};
  std::uint64_t written = 0;
  const MapVerdict verdict =
      editor_->map(batch.session, op.range, *address, op.access, mark, options_.large_iopte, written);
  if (verdict == MapVerdict::done) [[likely]] {
    if (first_stage_.invalidate_after_map) [[unlikely]]
      batch.pending.add(op.range);
    else if (mark == 0)
      batch.run.start(op.region, op.access, regions_[op.region.value - 1]->staged.length().value,
                      first_stage_.format.leaf(0, *address - op.memory, op.access, 0));
    return {{}, Bytes{written}};
  }
  if (mark != 0) own_pins_.unmapped(*address + written, op.range.length().value - written, batch.dying);
  if (written != 0) {
    std::uint64_t bytes = 0;
    (void)clear({op.range.start, Iova{op.range.start.value + (written - 1)}}, batch, bytes);
  } else if (mark != 0 && batch.pending.empty()) {
    own_pins_.let_go(batch.dying);
  }
  if (verdict == MapVerdict::occupied) return {map_error(EEXIST, op), {}};
  const int why = pool_.last_errno();
  if (why == ENOSPC)
    return {
        base::fail(Errc::limit_reached, Stage::map, why,
                   "all {} first-stage tables of this address space are in use; unmap something. Empty ones above the "
                   "lowest level come back when memory is registered or unregistered, or everything is unmapped",
                   pool_.pages_max()),
        {}};
  return {no_table_memory(Stage::map), {}};
}

// Tables are pinned, so they count against RLIMIT_MEMLOCK like what they lead to.
Error Stage1Space::no_table_memory(Stage stage) noexcept {
  if (pool_.last_errno() == ENOMEM)
    return explain_no_memory(shared_.kernel(), MemlockAccount::user_pinned, stage, "pinning first-stage tables",
                             Bytes{TablePool::chunk_pages * page_bytes});
  return explain_call(stage, "pinning first-stage tables (IOAS_MAP)", pool_.last_errno());
}

bool Stage1Space::clear(IovaRange range, Batch& batch, std::uint64_t& bytes) noexcept {
  return editor_->unmap(batch.session, range, [&](std::uint64_t iova, std::uint64_t length, std::uint64_t entry) {
    bytes += length;
    batch.pending.add({Iova{iova}, Iova{iova + (length - 1)}});
    if ((entry & TableFormat::own_pin_bit) != 0)
      own_pins_.unmapped(first_stage_.format.address(entry), length, batch.dying);
  });
}

BackendOpResult Stage1Space::unmap(IovaRange range, Batch& batch) noexcept {
  std::uint64_t bytes = 0;
  for (const IovaRange& window : usable_) {
    const auto part = window.intersection(range);
    if (!part) continue;
    batch.window = window;
    if (((part->start.value | (part->last.value + 1)) & (page_bytes - 1)) != 0)
      return {base::fail(Errc::would_bisect, Stage::unmap, EINVAL,
                         "an unmap of [{:#x}, {:#x}] would cut a granule of {} bytes", range.start.value,
                         range.last.value, page_bytes),
              {}};
    if (!clear(*part, batch, bytes))
      return {base::fail(Errc::out_of_memory, Stage::unmap, ENOMEM,
                         "an unmap of [{:#x}, {:#x}] cuts a large entry, and there is no table for its rest",
                         range.start.value, range.last.value),
              Bytes{bytes}};
  }
  return {{}, Bytes{bytes}};
}

Result<Bytes> Stage1Space::unmap_all() noexcept {
  const BackendOp op{.kind = OpKind::unmap, .range = IovaRange::everything()};
  BackendOpResult result;
  execute({&op, 1}, {&result, 1});
  if (result.error) return result.error;
  if (editor_) editor_->sweep();
  return result.bytes;
}

Result<RegionId> Stage1Space::register_memory(const MemoryRange& memory) {
  const auto address = reinterpret_cast<std::uintptr_t>(memory.address);
  if (memory.length.value == 0 || !base::is_aligned(memory.length.value | address | memory.fd_offset, page_bytes))
    return base::fail(Errc::invalid_argument, Stage::pin, 0,
                      "memory at {:#x} (file offset {:#x}) of {} bytes cannot be registered: all three must be "
                      "multiples of {}, and the length not 0",
                      address, memory.fd_offset, memory.length.value, page_bytes);
  if (memory.address == nullptr && (memory.fd < 0 || !shared_.descriptor().map_file()))
    return base::fail(Errc::unsupported, Stage::pin, 0,
                      "memory without a process address needs a file descriptor and IOAS_MAP_FILE (Linux 6.13); map "
                      "the file into the process and register its address");
  if (editor_) editor_->sweep();  // nobody is in the tables
  regions_.reserve(regions_.size() + 1);
  const auto staged = shared_.parent().acquire(memory);
  if (!staged) return staged.error();
  regions_.push_back(*staged);
  return RegionId{static_cast<std::uint32_t>(regions_.size())};
}

Result<void> Stage1Space::unregister_memory(RegionId region) {
  if (region.value == 0 || region.value > regions_.size() || regions_[region.value - 1] == nullptr)
    return base::fail(Errc::not_found, Stage::unpin, 0, "region {} is not registered with this space", region.value);
  shared_.parent().drop(std::exchange(regions_[region.value - 1], nullptr));
  if (editor_) editor_->sweep();  // nobody is in the tables
  return {};
}

Result<void> Stage1Space::promise(std::span<const IovaRange>) {
  return make_error(Errc::unsupported, Stage::reserve,
                    "the kernel does not know first-stage addresses, so it cannot keep promises about them");
}

int Stage1Space::fault_record_fd() const noexcept { return hears_faults_ ? inbox_.poll_fd() : -1; }

Result<std::size_t> Stage1Space::read_fault_records(std::span<FaultRecord> out) noexcept {
  if (!hears_faults_)
    return make_error(tables_.empty() ? Errc::no_device : Errc::unsupported, Stage::query,
                      tables_.empty() ? "there are no fault records before the first device"
                                      : "this IOMMU's faults are only in the kernel's log: its driver or this kernel "
                                        "has no event queues (VEVENTQ_ALLOC; Arm SMMUv3, Linux 6.15)");
  // Not more than is wanted: the kernel's queue is the larger one.
  std::size_t taken = inbox_.take(out);
  for (bool any = true; any && taken < out.size();) {
    any = false;
    const int why = shared_.collect_faults(any);
    taken += inbox_.take(out.subspan(taken));
    if (why != 0 && taken == 0) return explain_call(Stage::query, "read of fault records", why);
    if (why != 0) break;
  }
  return taken;
}

Headroom Stage1Space::headroom() noexcept { return memlock_headroom(shared_.kernel(), MemlockAccount::user_pinned); }

}  // namespace iovane::backends::stage1
