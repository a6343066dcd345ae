// The public handles: each is a thin shell over a core object.
#include <utility>

#include "base/error_text.hpp"
#include "engine/engine_core.hpp"
#include "engine/out_of_memory.hpp"
#include "engine/queue_core.hpp"
#include "engine/space_core.hpp"
#include "iovane/address_space.hpp"
#include "iovane/engine.hpp"
#include "iovane/queue.hpp"

namespace iovane {

using engine::Operation;
using engine::or_out_of_memory;

// --- Engine

Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;
Engine::~Engine() = default;
Engine::Engine(std::shared_ptr<engine::EngineCore> core) noexcept : core_{std::move(core)} {}
const std::string& Engine::backend() const noexcept { return core_->backend_name(); }
const std::string& Engine::reason() const noexcept { return core_->reason(); }

Result<AddressSpace> Engine::create_address_space(const AddressSpaceConfig& config) {
  auto core = or_out_of_memory(Stage::open, [&] { return engine::SpaceCore::create(core_, config); });
  if (!core) return core.error();
  return AddressSpace{*std::move(core)};
}

// --- AddressSpace

AddressSpace::AddressSpace(std::shared_ptr<engine::SpaceCore> core) noexcept : core_{std::move(core)} {}
AddressSpace::AddressSpace(AddressSpace&&) noexcept = default;
AddressSpace& AddressSpace::operator=(AddressSpace&& o) noexcept {
  if (this != &o) {
    if (core_) (void)core_->close();
    core_ = std::move(o.core_);
  }
  return *this;
}
AddressSpace::~AddressSpace() {
  if (core_) (void)core_->close();
}

CloseReport AddressSpace::close() noexcept { return core_ ? core_->close() : CloseReport{}; }
const AddressSpaceFacts& AddressSpace::facts() const noexcept { return core_->facts(); }
Result<DeviceInfo> AddressSpace::attach(const DeviceConfig& device) {
  return or_out_of_memory(Stage::attach, [&] { return core_->attach(device); });
}
Result<void> AddressSpace::detach(std::uint32_t device_id) {
  return or_out_of_memory(Stage::detach, [&] { return core_->detach(device_id); });
}
Result<DeviceInfo> AddressSpace::move_device(std::uint32_t device_id, AddressSpace& to, Gap gap) {
  return or_out_of_memory(Stage::attach, [&] { return core_->move_device(device_id, *to.core_, gap); });
}
int AddressSpace::page_fault_fd() const noexcept { return core_->page_fault_fd(); }
Result<std::size_t> AddressSpace::read_page_faults(std::span<PageFaultEvent> out) noexcept {
  return core_->read_page_faults(out);
}
Result<void> AddressSpace::answer_page_fault(const PageFaultEvent& event, PageFaultAnswer answer) noexcept {
  return core_->answer_page_fault(event, answer);
}
Result<void> AddressSpace::on_page_fault(PageFaultHandler handler) {
  return or_out_of_memory(Stage::query, [&] { return core_->on_page_fault(std::move(handler)); });
}
Result<Watch> AddressSpace::watch(int fd, std::function<bool()> readable) {
  auto task = or_out_of_memory(Stage::query, [&] { return core_->watch(fd, std::move(readable)); });
  if (!task) return task.error();
  return Watch{*std::move(task)};
}
int AddressSpace::fault_record_fd() const noexcept { return core_->fault_record_fd(); }
Result<std::size_t> AddressSpace::read_fault_records(std::span<FaultRecord> out) noexcept {
  return core_->read_fault_records(out);
}
Result<void> AddressSpace::start_dirty_tracking() {
  return or_out_of_memory(Stage::query, [&] { return core_->start_dirty_tracking(); });
}
Result<void> AddressSpace::stop_dirty_tracking() {
  return or_out_of_memory(Stage::query, [&] { return core_->stop_dirty_tracking(); });
}
Result<std::uint64_t> AddressSpace::read_dirty(const IovaRange& range, Bytes page_size,
                                               std::span<std::uint64_t> bitmap) {
  return core_->read_dirty(range, page_size, bitmap);
}
std::size_t AddressSpace::take_unmapped_dirty(std::span<DirtyRun> out) noexcept {
  return core_->take_unmapped_dirty(out);
}
DirtyStats AddressSpace::dirty_stats() const noexcept { return core_->dirty_stats(); }
Result<GuestLayout> AddressSpace::guest_layout() {
  return or_out_of_memory(Stage::query, [&] { return core_->guest_layout(); });
}
Result<std::vector<LayoutBreach>> AddressSpace::check_layout() {
  return or_out_of_memory(Stage::query, [&] { return core_->check_layout(); });
}
Result<std::vector<IovaRange>> AddressSpace::usable_ranges() const {
  return or_out_of_memory(Stage::query, [&] { return core_->usable_ranges(); });
}

Result<Memory> AddressSpace::register_memory(const MemoryConfig& config) {
  const auto id = or_out_of_memory(Stage::pin, [&] { return core_->register_memory(config); });
  if (!id) return id.error();
  Memory memory;
  memory.space_ = core_;
  memory.id_ = *id;
  memory.length_ = config.length;
  return memory;
}

Result<Queue> AddressSpace::open_queue(const QueueConfig& config) {
  auto core = or_out_of_memory(Stage::open, [&] { return core_->open_queue(config); });
  if (!core) return core.error();
  return Queue{*std::move(core)};
}

Completion AddressSpace::map(const MapRequest& request) noexcept { return core_->run_now(Operation{request}); }
Completion AddressSpace::unmap(const UnmapRequest& request) noexcept { return core_->run_now(Operation{request}); }
Completion AddressSpace::replace(const ReplaceRequest& request) noexcept { return core_->run_now(Operation{request}); }

Result<Mapping> AddressSpace::map_lease(const MapRequest& request) noexcept {
  const Completion done = map(request);
  if (!done.ok()) return done.error;
  return adopt(done.mapping);
}

Result<Mapping> AddressSpace::adopt(MappingId id) noexcept {
  const auto info = core_->info(id);
  if (!info) return info.error();
  Mapping mapping;
  mapping.space_ = core_;
  mapping.id_ = id;
  mapping.range_ = info->range;
  return mapping;
}

Result<Bytes> AddressSpace::flush() noexcept { return core_->flush(); }
Result<Bytes> AddressSpace::unmap_all() noexcept { return core_->unmap_all(); }
Result<MappingInfo> AddressSpace::find(Iova iova) const noexcept { return core_->find(iova); }
void AddressSpace::for_each(IovaRange range, const std::function<bool(const MappingInfo&)>& visit) const {
  core_->for_each(range, visit);
}
Stats AddressSpace::stats() const noexcept { return core_->stats(); }

// --- Memory

Memory::Memory(Memory&& o) noexcept
    : space_{std::move(o.space_)}, id_{std::exchange(o.id_, {})}, length_{std::exchange(o.length_, {})} {}
Memory& Memory::operator=(Memory&& o) noexcept {
  std::swap(space_, o.space_);
  std::swap(id_, o.id_);
  std::swap(length_, o.length_);
  return *this;
}
Memory::~Memory() {
  if (id_) space_->unregister_memory(id_);
}

// --- Mapping

Mapping::Mapping(Mapping&& o) noexcept
    : space_{std::move(o.space_)}, id_{std::exchange(o.id_, {})}, range_{std::exchange(o.range_, {})} {}
Mapping& Mapping::operator=(Mapping&& o) noexcept {
  std::swap(space_, o.space_);
  std::swap(id_, o.id_);
  std::swap(range_, o.range_);
  return *this;
}
Mapping::~Mapping() {
  if (id_) (void)unmap();
}

Result<Bytes> Mapping::unmap() noexcept {
  if (!id_) return make_error(Errc::stale_handle, Stage::validate, "the lease is empty");
  const Completion done = space_->run_now(Operation{UnmapRequest::of(id_)});
  (void)release();
  if (!done.ok()) return done.error;
  return done.bytes;
}

MappingId Mapping::release() noexcept {
  space_.reset();
  range_ = {};
  return std::exchange(id_, {});
}

// --- Queue

Queue::Queue(std::unique_ptr<engine::QueueCore> core) noexcept : core_{std::move(core)} {}
Queue::Queue() noexcept = default;
Queue::Queue(Queue&&) noexcept = default;
Queue& Queue::operator=(Queue&&) noexcept = default;
Queue::~Queue() = default;

bool Queue::stage(const MapRequest& request) noexcept { return core_->stage(request); }
bool Queue::stage(const UnmapRequest& request) noexcept { return core_->stage(request); }
bool Queue::stage(const ReplaceRequest& request) noexcept { return core_->stage(request); }
bool Queue::stage_fence(std::uint64_t user_data) noexcept {
  Operation fence;
  fence.user_data = user_data;
  return core_->stage(fence);
}
bool Queue::stage_flush(std::uint64_t user_data) noexcept {
  Operation flush;
  flush.kind = engine::OperationKind::flush;
  flush.user_data = user_data;
  return core_->stage(flush);
}
void Queue::submit() noexcept { core_->submit(); }
std::size_t Queue::poll(std::span<Completion> out) noexcept { return core_->poll(out); }
std::size_t Queue::wait(std::span<Completion> out, std::size_t count_min, std::chrono::nanoseconds timeout) noexcept {
  return core_->wait(out, count_min, timeout);
}
int Queue::event_fd() noexcept { return core_->event_fd(); }
Result<void> Queue::deliver_to_ring(int ring_fd, std::uint64_t user_data) noexcept {
  return core_->deliver_to_ring(ring_fd, user_data);
}
std::size_t Queue::space_left() const noexcept { return core_->space_left(); }
std::size_t Queue::outstanding() const noexcept { return core_->outstanding(); }

}  // namespace iovane
