#include "viommu/recording_target.hpp"

namespace iovane::viommu {

const RecordingTarget::Held* RecordingTarget::find(std::uint64_t iova) const noexcept {
  auto place = held_.upper_bound(iova);
  if (place == held_.begin()) return nullptr;
  --place;
  return place->second.range.contains(Iova{iova}) ? &place->second : nullptr;
}

bool RecordingTarget::device_writes(std::uint64_t iova) {
  const Held* held = find(iova);
  if (held == nullptr || !may_write(held->access)) return false;
  const std::uint64_t offset = held->region_offset + (iova - held->range.start.value);
  if (tracks_dirty_) dirty_.emplace(held->region, offset & ~(granule_bytes.value - 1));
  return true;
}

Result<void> RecordingTarget::track_dirty(bool on) {
  tracks_dirty_ = on;
  dirty_.clear();
  return {};
}

Result<void> RecordingTarget::take_dirty(const VisitDirty& visit) {
  if (!tracks_dirty_) return make_error(Errc::invalid_argument, Stage::query, "dirty tracking is off");
  for (const auto& [region, offset] : dirty_) visit({region, offset, granule_bytes});
  dirty_.clear();
  return {};
}

Progress RecordingTarget::submit(std::span<const HostOp> ops, std::vector<OpFailure>& failures) noexcept {
  ++batches_;
  operations_ += ops.size();
  pending_ = ops;
  return poll(failures);
}

Progress RecordingTarget::poll(std::vector<OpFailure>& failures) noexcept {
  if (asynchronous && !std::exchange(may_finish_, false) && !pending_.empty()) return Progress::pending;
  for (std::uint32_t i = 0; i < pending_.size(); ++i) {
    Error error = fault ? fault(pending_[i]) : Error{};
    if (error.ok()) error = apply(pending_[i]);
    if (!error.ok()) failures.push_back({i, error});
  }
  pending_ = {};
  return Progress::done;
}

Error RecordingTarget::apply(const HostOp& op) {
  if (op.kind == HostOp::Kind::unmap) return unmap(op.range);
  if (((op.range.start.value | (op.range.last.value + 1)) & (granule_bytes.value - 1)) != 0)
    return make_error(Errc::invalid_argument, Stage::validate, "misaligned");
  bool inside = false;
  for (const IovaRange& range : usable) inside = inside || range.contains(op.range);
  if (!inside) return make_error(Errc::iova_reserved, Stage::reserve, "reserved");
  if (op.kind == HostOp::Kind::replace) {
    const auto place = held_.find(op.range.start.value);
    if (place == held_.end() || place->second.range != op.range)
      return make_error(Errc::not_found, Stage::validate, "replace of no mapping");
    held_.erase(place);
  }
  auto after = held_.upper_bound(op.range.last.value);
  if (after != held_.begin() && std::prev(after)->second.range.last >= op.range.start)
    return make_error(Errc::iova_busy, Stage::reserve, "overlaps a live mapping");
  held_.emplace(op.range.start.value, Held{op.range, op.region, op.region_offset, op.access});
  return {};
}

Error RecordingTarget::unmap(const IovaRange& range) {
  auto first = held_.lower_bound(range.start.value);
  if (first != held_.begin() && std::prev(first)->second.range.last >= range.start) --first;
  auto stop = held_.upper_bound(range.last.value);
  if (first == stop) return make_error(Errc::not_found, Stage::unmap, "nothing mapped");
  const Held head = first->second;
  const Held tail = std::prev(stop)->second;
  const bool cuts = head.range.start < range.start || tail.range.last > range.last;
  if (cuts && !may_cut) return make_error(Errc::would_bisect, Stage::validate, "would cut a mapping");
  held_.erase(first, stop);
  if (head.range.start < range.start) {
    Held left = head;
    left.range.last = Iova{range.start.value - 1};
    held_.emplace(left.range.start.value, left);
  }
  if (tail.range.last > range.last) {
    Held right = tail;
    right.range.start = Iova{range.last.value + 1};
    right.region_offset += right.range.start.value - tail.range.start.value;
    held_.emplace(right.range.start.value, right);
  }
  return {};
}

}  // namespace iovane::viommu
