#include "engine/space_core.hpp"

#include <algorithm>
#include <new>
#include <utility>

#include "base/error_text.hpp"
#include "engine/direct_batch.hpp"
#include "engine/engine_core.hpp"
#include "engine/engine_event.hpp"
#include "engine/out_of_memory.hpp"
#include "engine/queue_core.hpp"

namespace iovane::engine {

using base::fail;

namespace {

std::atomic<std::uint64_t> next_number{1};

Error check_bounds(const AddressSpaceConfig& config) noexcept {
  if (config.unmap == UnmapMode::strict) return {};
  constexpr std::uint32_t mappings_bound = 1U << 20;
  const RelaxedBounds& bounds = config.relaxed;
  if (bounds.mappings_max == 0 || bounds.mappings_max > mappings_bound)
    return fail(Errc::invalid_argument, Stage::open, 0, "relaxed.mappings_max {} is not between 1 and {}",
                bounds.mappings_max, mappings_bound);
  if (bounds.bytes_max.value == 0 || bounds.time_max.count() <= 0)
    return make_error(Errc::invalid_argument, Stage::open,
                      "relaxed.bytes_max and relaxed.time_max must be above zero; strict mode is what zero would mean");
  return {};
}

}  // namespace

Result<std::shared_ptr<SpaceCore>> SpaceCore::create(std::shared_ptr<EngineCore> engine,
                                                     const AddressSpaceConfig& config) {
  backends::SpaceOptions options;
  options.large_iopte = config.large_iopte;
  options.dirty_tracking = config.dirty_tracking;
  options.page_faults = config.page_faults;
  options.copy_from = engine->copy_from();
  auto backend = engine->backend().create_space(options);
  if (!backend) return backend.error();
  if (const Error bad = check_bounds(config)) return bad;
  const unsigned node = engine->nodes().here();
  auto index = MappingIndex::create(config.mappings_max, engine->nodes().memory(node));
  if (!index) return index.error();
  try {
    std::shared_ptr<SpaceCore> core{
        new SpaceCore{std::move(engine), node, config, *std::move(backend), *std::move(index)}};
    if (config.unmap == UnmapMode::relaxed) {
      if (const auto started = core->start_worker(); !started) return started.error();
      core->state_.stale = std::make_unique<StaleSet>(config.relaxed, slice_operations_max);
      core->flusher_ = std::make_unique<StaleFlusher>(*core->worker_, core->lane_, core->state_, *core->executor_);
      core->state_.stale_timer = core->flusher_.get();
    }
    if (const auto ready = core->refresh_usable(); !ready) return ready.error();
    if (config.layout == LayoutPolicy::fixed && !config.promised.empty() &&
        has(core->state_.backend->facts().capabilities, backends::Capability::promise_ranges)) {
      if (const auto promised = core->state_.backend->promise(config.promised); !promised) return promised.error();
    }
    IOVANE_TRACE(base::TraceLevel::change, EngineEvent, space_opened, core->state_.number, node,
                 config.unmap == UnmapMode::relaxed, 0);
    return core;
  } catch (const std::bad_alloc&) {
    return make_error(Errc::out_of_memory, Stage::open, "no memory for an address space");
  }
}

SpaceCore::SpaceCore(std::shared_ptr<EngineCore> engine, unsigned node, const AddressSpaceConfig& config,
                     std::unique_ptr<backends::BackendSpace> backend, MappingIndex index)
    : engine_{std::move(engine)},
      node_{node},
      config_{config},
      state_{.backend = std::move(backend),
             .index = std::move(index),
             .memories = MemoryTable{config.memories_max},
             .counters = &counters_,
             .number = next_number.fetch_add(1, std::memory_order_relaxed)},  // relaxed: only told apart
      executor_{std::make_unique<BatchExecutor>(state_)},
      heir_{engine_->nodes(), state_, *executor_},
      interface_{state_.backend->facts().interface} {
  facts_.backend = engine_->backend_name();
  if (StatsPage* const page = engine_->stats_page()) {
    published_ = page->acquire(config_.name, facts_.backend);
    if (published_ != nullptr) state_.counters = &published_->counters;
  }
  refresh_facts();
  lane_.set_heir(&heir_);
}

SpaceCore::~SpaceCore() {
  (void)close();
  if (published_ != nullptr) engine_->stats_page()->release(published_);
}

CloseReport SpaceCore::close() noexcept {
  CloseReport report;
  // Without the lane: a handler may be using it.
  stop_pump();
  // Likewise: it unmaps through it.
  if (SpaceCache* const open = cache()) open->close();
  {
    const std::lock_guard recovering{recovery_lock_};
    const LaneHold held{lane_};
    if (state_.closed) return report;
    if (dirty_) (void)state_.backend->stop_dirty_tracking();  // so that unmapping everything reads no marks
    // What the kernel refuses to unmap goes when its object closes; nothing of ours names it any more.
    report.why = executor_->unmap_all(report.unmapped);
    report.mappings_given_up = state_.index.size();
    report.bytes_given_up = state_.index.bytes();
    state_.closed = true;
    state_.backend.reset();
    state_.stale_timer = nullptr;
    lane_.set_relief(nullptr);
  }
  IOVANE_TRACE(base::TraceLevel::change, EngineEvent, space_closed, state_.number, report.unmapped.value,
               report.mappings_given_up, report.bytes_given_up.value);
  // Nobody posts these any more. Outside of the lane: the worker may be waiting for it.
  if (flusher_) worker_->forget(*flusher_);
  if (relief_) worker_->forget(*relief_);
  return report;
}

Result<void> SpaceCore::start_worker() {
  const std::lock_guard held{worker_lock_};
  if (worker_ != nullptr) return {};
  const auto worker = engine_->nodes().worker(node_);
  if (!worker) return worker.error();
  auto relief = std::make_unique<Relief>(**worker, lane_, state_);
  const LaneHold lane{lane_};
  if (state_.closed) return closed_error();
  worker_ = *worker;
  relief_ = std::move(relief);
  lane_.set_relief(relief_.get());
  return {};
}

Result<std::unique_ptr<QueueCore>> SpaceCore::open_queue(const QueueConfig& config) {
  constexpr std::uint32_t depth_max = 65536;
  if (config.depth == 0 || config.depth > depth_max)
    return fail(Errc::invalid_argument, Stage::open, 0, "queue depth {} is not between 1 and {}", config.depth,
                depth_max);
  try {
    const bool needs_worker = config.submit == SubmitMode::never_block || config.hand_over.value != 0;
    expect_company();
    if (needs_worker)
      if (const auto started = start_worker(); !started) return started.error();
    auto queue = std::make_unique<QueueCore>(shared_from_this(), config, needs_worker ? worker_ : nullptr);
    IOVANE_TRACE(base::TraceLevel::change, EngineEvent, queue_opened, state_.number, config.depth,
                 config.submit == SubmitMode::never_block, 0);
    return queue;
  } catch (const std::bad_alloc&) {
    return fail(Errc::out_of_memory, Stage::open, 0, "no memory for a queue of depth {}", config.depth);
  }
}

void SpaceCore::expect_company() {
  // The second one makes it possible that one thread serves another: from here on somebody can relieve it. Without a
  // worker it is served all the same.
  if (companions_.fetch_add(1, std::memory_order_relaxed) != 0) (void)start_worker();  // relaxed: a count
}

Error SpaceCore::closed_error() const noexcept {
  return make_error(Errc::closed, Stage::validate, "the address space has been destroyed");
}

Completion SpaceCore::run_now(const Operation& operation) noexcept {
  Completion completion;
  DirectBatch call{*executor_, lane_};
  if (!call.submit({&operation, 1}, {&completion, 1})) (void)call.wait(std::chrono::nanoseconds{-1});
  return completion;
}

Result<DeviceInfo> SpaceCore::attach(const DeviceConfig& device) {
  auto attached = attach_now(device);
  if (attached) devices_came();
  SpaceCache* const open = cache();
  if (attached || attached.error().code != Errc::iova_reserved || open == nullptr) return attached;
  // A cached mapping that nobody uses may lie where the device has a hole.
  open->evict(Bytes{~std::uint64_t{0}});
  attached = attach_now(device);
  if (attached) devices_came();
  return attached;
}

Result<DeviceInfo> SpaceCore::attach_now(const DeviceConfig& device) {
  const LaneHold held{lane_};
  if (state_.closed) return closed_error();
  (void)executor_->flush_stale();  // what counts against the new device's holes is what is live
  const backends::DeviceSource source{device.pci_address, device.cdev_fd, device.group_fd};
  DeviceNames::node_type named = named_device(source);  // so that nothing can fail after the backend has it
  if (const auto expected = expect_device(source); !expected) return expected.error();
  auto attached = or_out_of_memory(Stage::attach, [&] { return state_.backend->attach(source); });
  if (!attached) {
    layout_->forget(name_of(source));
    return attached.error();
  }
  if (const auto refreshed = refresh_usable(); !refreshed) {
    (void)state_.backend->detach(attached->id);
    layout_->forget(name_of(source));
    (void)refresh_usable();
    return fail(refreshed.error().code, Stage::attach, refreshed.error().os_errno, "{} cannot be attached: {}",
                attached->name, refreshed.error().detail());
  }
  refresh_facts();
  name_device(std::move(named), attached->id);
  trace_attached(attached->id);
  return DeviceInfo{attached->id.value, std::move(attached->name), attached->device_fd, std::move(attached->reserved)};
}

Result<void> SpaceCore::detach(std::uint32_t device_id) {
  // A container drops every mapping with its last device, so none may be handed out after that.
  if (SpaceCache* const open = cache(); open != nullptr && backends::is_container(interface_)) open->drop_all();
  const LaneHold held{lane_};
  if (state_.closed) return closed_error();
  (void)executor_->flush_stale();
  if (const auto detached = release_device(backends::DeviceId{device_id}); !detached) return detached;
  if (const auto known = device_names_.find(device_id); known != device_names_.end()) {
    layout_->forget(name_of(known->second));
    device_names_.erase(known);
  }
  refresh_facts();
  // The device is gone in any case: what cannot be read now is read with the next one, but what vanished is told.
  const auto refreshed = refresh_usable();
  trace_detached(backends::DeviceId{device_id});
  return refreshed || refreshed.error().code != Errc::iova_reserved ? Result<void>{} : refreshed;
}

void SpaceCore::trace_attached(backends::DeviceId device) const noexcept {
  IOVANE_TRACE(base::TraceLevel::change, EngineEvent, device_attached, state_.number, device.value,
               state_.usable.size(), 0);
}
void SpaceCore::trace_detached(backends::DeviceId device) const noexcept {
  IOVANE_TRACE(base::TraceLevel::change, EngineEvent, device_detached, state_.number, device.value,
               state_.usable.size(), 0);
}

SpaceCore::DeviceNames::node_type SpaceCore::named_device(const backends::DeviceSource& source) {
  DeviceNames one;
  one.emplace(0, source);
  return one.extract(one.begin());
}

void SpaceCore::name_device(DeviceNames::node_type named, backends::DeviceId id) noexcept {
  named.key() = id.value;
  device_names_.insert(std::move(named));
}

// Where the kernel's answer to an unmap was lost, the backend may count as mapped what the index knows to be gone.
Result<void> SpaceCore::release_device(backends::DeviceId device) {
  auto detached = state_.backend->detach(device);
  if (detached || detached.error().code != Errc::busy || !state_.index.empty()) return detached;
  if (const auto emptied = state_.backend->unmap_all(); !emptied) return emptied.error();
  return state_.backend->detach(device);
}

backends::MemlockUse SpaceCore::memlock_use() noexcept {
  const LaneHold held{lane_};
  return state_.closed ? backends::MemlockUse{} : state_.backend->headroom().memlock_use;
}

Result<std::vector<IovaRange>> SpaceCore::usable_ranges() {
  const LaneHold held{lane_};
  if (state_.closed) return closed_error();
  return state_.usable;
}

Result<void> SpaceCore::refresh_usable() {
  const auto breaches = or_out_of_memory(Stage::attach, [&] { return read_usable(); });
  if (!breaches) return breaches.error();
  if (breaches->empty()) return {};
  if (breaches->size() == 1) return fail(Errc::iova_reserved, Stage::attach, 0, "{}", breaches->front().text);
  return fail(Errc::iova_reserved, Stage::attach, 0, "{}; and {} more like this", breaches->front().text,
              breaches->size() - 1);
}

Result<std::vector<LayoutBreach>> SpaceCore::read_usable() {
  const auto host = state_.backend->usable_ranges();
  if (!host) return host.error();
  if (!layout_) {
    auto layout = SpaceLayout::create(config_.layout, config_.promised, *host);
    if (!layout) return layout.error();
    layout_ = *std::move(layout);
  }
  auto breaches = layout_->host_says(*host, state_.index);
  auto usable = layout_->usable();
  if (config_.layout == LayoutPolicy::engine_managed && !usable.empty()) {
    if (!state_.allocator) {
      iova::IntervalAllocatorConfig allocator;
      allocator.granule = state_.backend->facts().granule;
      allocator.windows = usable;
      auto made = iova::IntervalAllocator::create(allocator);
      if (!made) return made.error();
      state_.allocator = *std::move(made);
    } else if (const auto narrowed = state_.allocator->set_usable(usable); !narrowed) {
      return narrowed.error();
    }
  }
  state_.usable = std::move(usable);
  return breaches;
}

void SpaceCore::refresh_facts() {
  const backends::SpaceFacts& facts = state_.backend->facts();
  state_.granule = facts.granule;
  state_.unmap_hole_max = facts.unmap_hole_max;
  state_.map_by_copy = has(facts.capabilities, backends::Capability::copy_reuses_pin);
  facts_.granule = facts.granule;
  facts_.page_sizes = facts.page_sizes;
  facts_.entries_max = facts.entries_max;
  facts_.replace_is_atomic = has(facts.capabilities, backends::Capability::replace_in_place);
  facts_.unmap_may_cut = has(facts.capabilities, backends::Capability::cut_on_unmap);
  facts_.register_pins = has(facts.capabilities, backends::Capability::explicit_pin);
  facts_.dirty_is_exact =
      has(facts.capabilities, backends::Capability::dirty_tracking) && !facts.dirty_reads_whole_mappings;
}

Result<MemoryId> SpaceCore::register_memory(const MemoryConfig& memory) {
  const LaneHold held{lane_};
  if (state_.closed) return closed_error();
  const auto region = state_.backend->register_memory({memory.address, memory.length, memory.fd, memory.fd_offset});
  if (!region) return region.error();
  const auto id = state_.memories.add(*region, memory.length);
  if (!id) (void)state_.backend->unregister_memory(*region);
  return id;
}

Result<Bytes> SpaceCore::memory_length(MemoryId memory) noexcept {
  const LaneHold held{lane_};
  if (state_.closed) return closed_error();
  const auto index = state_.memories.find(memory);
  if (!index) return index.error();
  // Its owner let it go; it waits for mappings that are still in use.
  if (!state_.memories.at(*index).owned)
    return make_error(Errc::stale_handle, Stage::validate, "the registered memory has been unregistered");
  return state_.memories.at(*index).length;
}

Result<void> SpaceCore::open_cache(const CacheConfig& config) {
  const std::lock_guard opening{cache_lock_};
  if (cache_) return make_error(Errc::busy, Stage::open, "this address space has a cache already");
  if (config_.layout != LayoutPolicy::engine_managed)
    return make_error(Errc::invalid_argument, Stage::open,
                      "a cache chooses IOVAs, and this address space's layout is the caller's "
                      "(AddressSpaceConfig::layout)");
  auto opened = SpaceCache::open(*this, engine_->pins(), config, config_.memories_max);
  if (!opened) return opened.error();
  cache_ = *std::move(opened);
  // R.cache - release, pairs with A.cache in cache().
  cache_published_.store(cache_.get(), std::memory_order_release);
  return {};
}

void SpaceCore::unregister_memory(MemoryId memory) noexcept {
  if (SpaceCache* const open = cache()) open->forget(memory);
  const LaneHold held{lane_};
  const auto index = state_.memories.find(memory);
  if (!index) return;
  MemoryTable::Entry& entry = state_.memories.at(*index);
  entry.owned = false;
  if (state_.closed || entry.mappings != 0) return;
  if (state_.backend->unregister_memory(entry.region)) state_.memories.forget(*index);
}

bool SpaceCore::is_stale(MappingId mapping) const noexcept {
  return state_.index.find(mapping)->state == MappingState::stale;
}

MappingInfo SpaceCore::describe(MappingId mapping) const noexcept {
  const MappingRecord& record = *state_.index.find(mapping);
  MappingInfo info;
  info.range = record.range;
  info.memory.memory = record.region != 0 ? state_.memories.id_of(record.region - 1) : MemoryId{};
  info.memory.offset = record.memory;
  info.memory.length = record.range.length();
  info.access = record.access;
  info.mapping = mapping;
  info.quarantined = record.state == MappingState::quarantined;
  return info;
}

Result<MappingInfo> SpaceCore::find(Iova iova) noexcept {
  const LaneHold held{lane_};
  if (state_.closed) return closed_error();
  const MappingId mapping = state_.index.covering(iova);
  if (!mapping || is_stale(mapping))
    return fail(Errc::not_found, Stage::query, 0, "nothing is mapped at IOVA {:#x}", iova.value);
  return describe(mapping);
}

Result<MappingInfo> SpaceCore::info(MappingId mapping) noexcept {
  const LaneHold held{lane_};
  if (state_.closed) return closed_error();
  if (state_.index.find(mapping) == nullptr || is_stale(mapping))
    return make_error(Errc::stale_handle, Stage::query, "the mapping it names is gone");
  return describe(mapping);
}

void SpaceCore::for_each(IovaRange range, const std::function<bool(const MappingInfo&)>& visit) {
  const LaneHold held{lane_};
  if (state_.closed) return;
  for (MappingId id = state_.index.first_in(range); id; id = state_.index.next(id)) {
    if (is_stale(id)) continue;
    const MappingInfo info = describe(id);
    if (!info.range.overlaps(range) || !visit(info)) break;
  }
}

Result<Bytes> SpaceCore::unmap_all() noexcept {
  const LaneHold held{lane_};
  if (state_.closed) return closed_error();
  Bytes removed{};
  if (const Error refused = executor_->unmap_all(removed)) return refused;
  return removed;
}

Result<Bytes> SpaceCore::flush() noexcept {
  const LaneHold held{lane_};
  if (state_.closed) return closed_error();
  return executor_->flush_stale();
}

Stats SpaceCore::stats() const noexcept { return stats_of(*state_.counters); }

}  // namespace iovane::engine
