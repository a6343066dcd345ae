#include "viommu/engine_target.hpp"

#include <algorithm>

namespace iovane::viommu {
namespace {

constexpr std::size_t completions_at_once = 64;

MemoryPiece piece_of(MemoryId memory, std::uint64_t base, std::uint64_t offset, Bytes length) noexcept {
  return {memory, base + offset, length};
}

}  // namespace

Result<std::unique_ptr<EngineTarget>> EngineTarget::create(AddressSpace& space, const GuestMemory& memory,
                                                           const EngineTargetConfig& config) {
  auto queue = space.open_queue({.depth = config.queue_depth});
  if (!queue) return queue.error();
  std::unique_ptr<EngineTarget> target{new EngineTarget{space, std::move(*queue), config}};
  for (const Region& region : memory.regions())
    if (auto added = target->add_region(region); !added) return added.error();
  return target;
}

EngineTarget::EngineTarget(AddressSpace& space, Queue queue, const EngineTargetConfig& config)
    : space_{space},
      queue_{std::move(queue)},
      name_{config.name.empty() ? space.facts().backend : config.name},
      register_memory_{config.register_memory},
      completions_(completions_at_once) {}

Result<void> EngineTarget::add_region(const Region& region) {
  Place place;
  place.region = region.id;
  place.address = reinterpret_cast<std::uintptr_t>(region.address);
  place.length = region.length();
  if (register_memory_) {
    auto memory =
        space_.register_memory({.address = region.address, .length = region.length(), .fd = -1, .fd_offset = 0});
    if (!memory) return memory.error();
    place.memory = std::move(*memory);
  }
  places_.push_back(std::move(place));
  return {};
}

void EngineTarget::remove_region(RegionId region) noexcept {
  std::erase_if(places_, [&](const Place& p) { return p.region == region; });
  last_place_ = 0;
}

const EngineTarget::Place* EngineTarget::find(RegionId region) noexcept {
  if (last_place_ < places_.size() && places_[last_place_].region == region) return &places_[last_place_];
  for (std::size_t i = 0; i < places_.size(); ++i) {
    if (places_[i].region != region) continue;
    last_place_ = i;
    return &places_[i];
  }
  return nullptr;
}

// False: the queue is full.
bool EngineTarget::stage(const HostOp& op, std::uint64_t index, std::vector<OpFailure>& failures) noexcept {
  if (op.kind == HostOp::Kind::unmap) return queue_.stage(UnmapRequest::of(op.range, index));
  const Place* place = find(op.region);
  if (place == nullptr) {
    failures.push_back({static_cast<std::uint32_t>(index),
                        make_error(Errc::not_found, Stage::validate, "guest memory that this target was not told of")});
    ++finished_;
    return true;
  }
  const MemoryPiece memory =
      piece_of(place->memory.id(), place->memory ? 0 : place->address, op.region_offset, op.range.length());
  if (op.kind == HostOp::Kind::replace) return queue_.stage(ReplaceRequest{op.range, memory, op.access, index});
  MapRequest request;
  request.memory = memory;
  request.access = op.access;
  request.placement = Placement::fixed(op.range.start);
  request.user_data = index;
  return queue_.stage(request);
}

void EngineTarget::take(std::span<const Completion> completions, std::vector<OpFailure>& failures) noexcept {
  finished_ += completions.size();
  for (const Completion& c : completions)
    if (!c.ok()) failures.push_back({static_cast<std::uint32_t>(c.user_data), c.error});
}

Progress EngineTarget::submit(std::span<const HostOp> ops, std::vector<OpFailure>& failures) noexcept {
  ops_ = ops;
  staged_ = finished_ = 0;
  return poll(failures);
}

Progress EngineTarget::poll(std::vector<OpFailure>& failures) noexcept {
  if (!early_.empty()) {
    failures.insert(failures.end(), early_.begin(), early_.end());
    early_.clear();
  }
  for (;;) {
    const std::size_t before = staged_ + finished_;
    while (staged_ < ops_.size() && stage(ops_[staged_], staged_, failures)) ++staged_;
    queue_.submit();
    for (std::size_t got = completions_at_once; got == completions_at_once;) {
      got = queue_.poll(completions_);
      take(std::span{completions_}.first(got), failures);
    }
    if (finished_ == ops_.size()) return Progress::done;
    if (staged_ + finished_ == before) return Progress::pending;  // nothing moves: another thread has the batch
  }
}

void EngineTarget::wait(std::chrono::nanoseconds timeout) noexcept {
  const std::size_t got = queue_.wait(completions_, 1, timeout);
  take(std::span{completions_}.first(got), early_);
}

}  // namespace iovane::viommu
