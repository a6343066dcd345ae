#include "viommu/engine_target.hpp"

#include <algorithm>
#include <new>

namespace iovane::viommu {

using engine::Operation;
using engine::OperationKind;

Result<std::unique_ptr<EngineTarget>> EngineTarget::create(AddressSpace& space, const GuestMemory& memory,
                                                           const EngineTargetConfig& config) {
  if (config.batch_max == 0)
    return make_error(Errc::invalid_argument, Stage::open, "EngineTargetConfig::batch_max must be above zero");
  try {
    std::unique_ptr<EngineTarget> target{new EngineTarget{space, config}};
    for (const Region& region : memory.regions())
      if (auto added = target->add_region(region); !added) return added.error();
    return target;
  } catch (const std::bad_alloc&) {
    return make_error(Errc::out_of_memory, Stage::open, "no memory for an EngineTarget");
  }
}

EngineTarget::EngineTarget(AddressSpace& space, const EngineTargetConfig& config)
    : space_{space},
      name_{config.name.empty() ? space.facts().backend : config.name},
      register_memory_{config.register_memory},
      operations_(config.batch_max),
      completions_(config.batch_max),
      core_{engine::DirectBatch::join(space)},
      batch_{*core_} {}

Result<void> EngineTarget::add_region(const Region& region) {
  Place place;
  place.region = region.id;
  place.base = reinterpret_cast<std::uintptr_t>(region.address);
  place.length = region.length();
  if (register_memory_) {
    auto memory =
        space_.register_memory({.address = region.address, .length = region.length(), .fd = -1, .fd_offset = 0});
    if (!memory) return memory.error();
    place.memory = std::move(*memory);
    place.base = 0;
  }
  places_.push_back(std::move(place));
  return {};
}

void EngineTarget::remove_region(RegionId region) noexcept {
  std::erase_if(places_, [&](const Place& p) { return p.region == region; });
  last_place_ = 0;
}

const EngineTarget::Place* EngineTarget::find_slowly(RegionId region) noexcept {
  for (std::size_t i = 0; i < places_.size(); ++i) {
    if (places_[i].region != region) continue;
    last_place_ = i;
    return &places_[i];
  }
  return nullptr;
}

// Writes the operations of the next piece where the engine reads them; their number. What an operation of its kind
// does not look at stays as it was.
inline std::size_t EngineTarget::fill(std::vector<OpFailure>& failures) noexcept {
  const HostOp* const ops = ops_.data();
  Operation* out = operations_.data();
  const std::size_t stop = next_ + std::min(ops_.size() - next_, operations_.size());
  const Place* place = nullptr;
  for (std::size_t i = next_; i != stop; ++i) {
    const HostOp& op = ops[i];
    out->user_data = i;
    out->start = op.range.start;
    out->last = op.range.last;
    if (op.kind == HostOp::Kind::unmap) {
      out->kind = OperationKind::unmap;
      out->memory = 0;
    } else {
      if (place == nullptr || place->region != op.region) {
        place = find(op.region);
        if (place == nullptr) [[unlikely]] {
          failures.push_back(
              {static_cast<std::uint32_t>(i),
               make_error(Errc::not_found, Stage::validate, "guest memory that this target was not told of")});
          continue;
        }
      }
      out->kind = op.kind == HostOp::Kind::map ? OperationKind::map : OperationKind::replace;
      out->placement = Placement::Kind::fixed;
      out->access = op.access;
      out->memory = place->memory.id().value;
      out->offset = op.region_offset + place->base;
      out->length.value = op.range.span() + 1;
    }
    ++out;
  }
  next_ = stop;
  return static_cast<std::size_t>(out - operations_.data());
}

void EngineTarget::take_failures(std::vector<OpFailure>& failures) const noexcept {
  if (batch_.failures() == 0) [[likely]]
    return;
  for (const Completion& c : std::span{completions_}.first(in_batch_))
    if (!c.ok()) failures.push_back({static_cast<std::uint32_t>(c.user_data), c.error});
}

Progress EngineTarget::hand_over(std::vector<OpFailure>& failures) noexcept {
  while (next_ != ops_.size()) {
    in_batch_ = fill(failures);
    if (!batch_.submit({operations_.data(), in_batch_}, {completions_.data(), in_batch_})) return Progress::pending;
    take_failures(failures);
  }
  in_batch_ = 0;
  return Progress::done;
}

Progress EngineTarget::submit(std::span<const HostOp> ops, std::vector<OpFailure>& failures) noexcept {
  ops_ = ops;
  next_ = 0;
  return hand_over(failures);
}

Progress EngineTarget::poll(std::vector<OpFailure>& failures) noexcept {
  if (!batch_.done()) return Progress::pending;
  if (in_batch_ != 0) take_failures(failures);
  return hand_over(failures);
}

void EngineTarget::wait(std::chrono::nanoseconds timeout) noexcept { (void)batch_.wait(timeout); }

}  // namespace iovane::viommu
