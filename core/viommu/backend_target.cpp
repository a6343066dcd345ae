#include "viommu/backend_target.hpp"

#include <algorithm>
#include <array>

#include "base/error_text.hpp"

namespace iovane::viommu {

using backends::BackendOp;
using backends::BackendOpResult;
using backends::Capability;
using backends::OpKind;

namespace {

constexpr std::size_t batch_max = 64;
// Pieces of memory behind mappings that are gone, kept until they are asked for.
constexpr std::size_t dirty_pieces_max = 1U << 16;

}  // namespace

BackendTarget::BackendTarget(std::string name, backends::BackendSpace& space, Dirty dirty)
    : name_{std::move(name)}, space_{space} {
  if (dirty == Dirty::tracked) dirty_ = std::make_unique<BackendDirtyLog>(granule(), dirty_pieces_max);
}

BackendTarget::~BackendTarget() {
  if (tracking_) (void)space_.stop_dirty_tracking().has_value();
  for (const auto& [ours, known] : regions_) (void)space_.unregister_memory(known.id).has_value();
}

bool BackendTarget::replace_is_atomic() const noexcept {
  return has(space_.facts().capabilities, Capability::replace_in_place);
}
bool BackendTarget::unmap_may_cut() const noexcept {
  return has(space_.facts().capabilities, Capability::cut_on_unmap);
}

Result<void> BackendTarget::add_region(const Region& region) {
  const auto made = space_.register_memory(
      {.address = region.address, .length = region.length(), .fd = region.fd, .fd_offset = region.fd_offset});
  if (!made) return made.error();
  regions_[region.id.value] = {region, *made};
  return {};
}

void BackendTarget::remove_region(RegionId region) noexcept {
  const auto at = regions_.find(region.value);
  if (at == regions_.end()) return;
  (void)space_.unregister_memory(at->second.id).has_value();
  regions_.erase(at);
  if (dirty_) dirty_->forget(region);
}

Progress BackendTarget::submit(std::span<const HostOp> ops, std::vector<OpFailure>& failures) noexcept {
  const bool in_place = replace_is_atomic();
  for (std::size_t done = 0; done < ops.size();) {
    const auto number = static_cast<std::uint32_t>(done);
    const HostOp::Kind kind = ops[done].kind;
    if (kind == HostOp::Kind::replace && !in_place) {
      HostOp part = ops[done++];
      part.kind = HostOp::Kind::unmap;
      const std::size_t failed = failures.size();
      execute({&part, 1}, number, failures);
      part.kind = HostOp::Kind::map;
      if (failures.size() == failed) execute({&part, 1}, number, failures);
      continue;
    }
    // With dirty tracking the kernel is asked for the marks of what an unmap removes while it removes it, and what is
    // known of the mappings must be as it is at that moment: only operations of one kind go together.
    const std::size_t most = std::min(batch_max, ops.size() - done);
    std::size_t count = 1;
    while (count < most && (dirty_ ? ops[done + count].kind == kind && kind != HostOp::Kind::replace
                                   : in_place || ops[done + count].kind != HostOp::Kind::replace))
      ++count;
    execute(ops.subspan(done, count), number, failures);
    done += count;
  }
  return Progress::done;
}

// At most batch_max of them.
void BackendTarget::execute(std::span<const HostOp> ops, std::uint32_t first,
                            std::vector<OpFailure>& failures) noexcept {
  std::array<BackendOp, batch_max> batch;
  std::array<BackendOpResult, batch_max> results;
  const bool copies = has(space_.facts().capabilities, Capability::copy_reuses_pin);
  for (std::size_t i = 0; i < ops.size(); ++i) {
    const HostOp& op = ops[i];
    batch[i] = {.kind = OpKind::unmap, .range = op.range};
    if (op.kind == HostOp::Kind::unmap) continue;
    const auto known = regions_.find(op.region.value);
    batch[i].kind = op.kind == HostOp::Kind::replace ? OpKind::replace : copies ? OpKind::copy : OpKind::map;
    batch[i].access = op.access;
    batch[i].memory = op.region_offset;
    // A region that is not known is one that the space does not know either, and says so.
    batch[i].region = known == regions_.end() ? backends::RegionId{~0U} : known->second.id;
  }
  space_.execute({batch.data(), ops.size()}, {results.data(), ops.size()});
  for (std::size_t i = 0; i < ops.size(); ++i) {
    if (results[i].error) {
      failures.push_back({first + static_cast<std::uint32_t>(i), results[i].error});
    } else if (dirty_) {
      if (ops[i].kind != HostOp::Kind::map) dirty_->unmapped(ops[i].range);
      if (ops[i].kind != HostOp::Kind::unmap) dirty_->mapped(ops[i].range, ops[i].region, ops[i].region_offset);
    }
  }
}

Result<void> BackendTarget::track_dirty(bool on) {
  if (!dirty_) return ShadowTarget::track_dirty(on);
  if (on) {
    if (const auto started = space_.start_dirty_tracking(*dirty_); !started) return started;
    dirty_->start();
    tracking_ = true;
    return {};
  }
  if (!tracking_) return make_error(Errc::invalid_argument, Stage::query, "dirty tracking is off");
  tracking_ = false;
  return space_.stop_dirty_tracking();
}

Result<void> BackendTarget::take_dirty(const VisitDirty& visit) {
  if (!dirty_) return ShadowTarget::take_dirty(visit);
  if (!tracking_) return make_error(Errc::invalid_argument, Stage::query, "dirty tracking is off");
  std::vector<Region> regions;
  for (const auto& [ours, known] : regions_) regions.push_back(known.region);
  return dirty_->take(space_, regions, visit);
}

}  // namespace iovane::viommu
