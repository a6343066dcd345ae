// ShadowDomain's short way: one granule of RAM, mapped where nothing is or unmapped where it is a host mapping of its
// own. No search, no allocation, and no error: what is any different goes the long way (shadow_edit.cpp).
#pragma once

#include "viommu/shadow_domain.hpp"

namespace iovane::viommu {

// Where the next operation is written and stays; null: no room without an allocation.
[[gnu::always_inline]] inline HostOp* ShadowDomain::stage_in_place(std::uint32_t tag) noexcept {
  if (staged_ == room_) [[unlikely]]
    return sides_.empty() ? &for_nobody_ : nullptr;
  tags_[staged_] = tag;
  return &ops_[staged_++];
}

[[gnu::always_inline]] inline bool ShadowDomain::map_slot(const View& view, std::uint64_t* slot, std::uint64_t iova,
                                                          std::uint64_t gpa, Access access,
                                                          std::uint32_t tag) noexcept {
  begin_edit();
  const IovaRange range{Iova{iova}, Iova{iova + granule_mask_}};
  if (*slot != 0 || !window_.contains(range)) return false;
  const Region* const region = view.find(gpa);
  if (region == nullptr || region->last - gpa < granule_mask_ || (region->read_only && may_write(access))) return false;
  HostOp* const op = stage_in_place(tag);
  if (op == nullptr) return false;
  op->range.start = range.start;
  op->range.last = range.last;
  op->region_offset = gpa - region->gpa;
  op->region = region->id;
  op->kind = HostOp::Kind::map;
  op->access = access;
  index_.fill_granule(slot, LeafWord::make(gpa, access) | LeafWord::backed | LeafWord::unit | LeafWord::head);
  add(counters_.leaves_mapped, 1);
  return true;
}

[[gnu::always_inline]] inline bool ShadowDomain::unmap_slot(std::uint64_t* slot, std::uint64_t iova, CutRule rule,
                                                            std::uint32_t tag) noexcept {
  begin_edit();
  if (index_.is_last_of_node(slot)) return false;
  // The granule is a host mapping of its own: it begins one, and what follows begins another, or is none.
  const std::uint64_t begins = rule == CutRule::refuse ? LeafWord::unit | LeafWord::head : LeafWord::unit;
  const std::uint64_t after = slot[1];
  if ((*slot & (begins | LeafWord::backed)) != (begins | LeafWord::backed)) return false;
  if (after != 0 && (after & begins) != begins) return false;
  HostOp* const op = stage_in_place(tag);
  if (op == nullptr) return false;
  op->range.start.value = iova;
  op->range.last.value = iova + granule_mask_;
  op->kind = HostOp::Kind::unmap;
  op->access = Access::none;
  index_.clear_granule(slot);
  add(counters_.leaves_unmapped, 1);
  return true;
}

[[gnu::always_inline]] inline bool ShadowDomain::map_granule(const View& view, const IovaRange& range,
                                                             std::uint64_t gpa, Access access,
                                                             std::uint32_t tag) noexcept {
  if (range.span() != granule_mask_ || ((range.start.value | gpa) & granule_mask_) != 0 || access == Access::none)
    return false;
  std::uint64_t* const slot = index_.granule_slot(range.start.value);
  return slot != nullptr && map_slot(view, slot, range.start.value, gpa, access, tag);
}

[[gnu::always_inline]] inline bool ShadowDomain::unmap_granule(const IovaRange& range, CutRule rule,
                                                               std::uint32_t tag) noexcept {
  if (range.span() != granule_mask_ || (range.start.value & granule_mask_) != 0) return false;
  std::uint64_t* const slot = index_.granule_slot(range.start.value);
  return slot != nullptr && unmap_slot(slot, range.start.value, rule, tag);
}

}  // namespace iovane::viommu
