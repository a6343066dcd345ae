// ShadowDomain's edits: from a guest's ranges to staged host operations.
#include <algorithm>
#include <new>

#include "base/checked_math.hpp"
#include "base/error_text.hpp"
#include "viommu/shadow_domain.hpp"

namespace iovane::viommu {
namespace {

Error no_memory() noexcept {
  return make_error(Errc::out_of_memory, Stage::publish, "guest domain: no memory to stage a host operation");
}

constexpr std::uint64_t backed_or_unit = LeafWord::backed | LeafWord::unit;

}  // namespace

bool ShadowDomain::stage(const HostOp& op, std::uint32_t tag) noexcept {
  if (sides_.empty()) return true;  // nobody to tell
  if (staged_ == ops_.size()) {
    try {
      tags_.resize(2 * staged_);
      ops_.resize(2 * staged_);
      room_ = ops_.size();
    } catch (const std::bad_alloc&) {
      return false;
    }
  }
  ops_[staged_] = op;
  tags_[staged_++] = tag;
  return true;
}

const IovaRange* ShadowDomain::find_usable(std::uint64_t iova) const noexcept {
  const auto place = std::upper_bound(usable_.begin(), usable_.end(), iova,
                                      [](std::uint64_t a, const IovaRange& r) { return a < r.start.value; });
  if (place == usable_.begin() || !std::prev(place)->contains(Iova{iova})) return nullptr;
  window_ = *std::prev(place);
  return &window_;
}

// The first usable address above `iova`, or 0 when there is none.
std::uint64_t ShadowDomain::next_usable(std::uint64_t iova) const noexcept {
  const auto place = std::upper_bound(usable_.begin(), usable_.end(), iova,
                                      [](std::uint64_t a, const IovaRange& r) { return a < r.start.value; });
  return place == usable_.end() ? 0 : place->start.value;
}

Result<void> ShadowDomain::check_range(const IovaRange& range, std::uint64_t gpa, Access access) const noexcept {
  using base::fail;
  if (!range.well_formed() || access == Access::none ||
      ((range.start.value | gpa | (range.last.value + 1)) & granule_mask_) != 0)
    return fail(Errc::invalid_argument, Stage::validate, 0,
                "{}: {:#x}..{:#x} to {:#x}: must be a range of {:#x}-byte granules with some access", config_.name,
                range.start.value, range.last.value, gpa, granule_mask_ + 1);
  if (range.last > index_.everything().last)
    return fail(Errc::iova_reserved, Stage::validate, 0, "{}: {:#x} is beyond its last address {:#x}", config_.name,
                range.last.value, index_.everything().last.value);
  if (range.span() > iova_max.value - gpa)
    return fail(Errc::overflow, Stage::validate, 0, "{}: guest memory {:#x} of {:#x}..{:#x} passes 2^64", config_.name,
                gpa, range.start.value, range.last.value);
  return {};
}

Result<void> ShadowDomain::map(const View& view, IovaRange range, std::uint64_t gpa, Access access,
                               std::uint32_t tag) noexcept {
  if (map_granule(view, range, gpa, access, tag)) return {};
  begin_edit();
  if (auto checked = check_range(range, gpa, access); !checked) return checked;
  if (!index_.is_free(range))
    return base::fail(Errc::iova_busy, Stage::validate, 0, "{}: something is mapped in {:#x}..{:#x}", config_.name,
                      range.start.value, range.last.value);
  return map_pieces(view, range, gpa, access, true, tag);
}

// A range becomes one index run and at most one host mapping per piece; pieces end where RAM or usable IOVAs do.
Result<void> ShadowDomain::map_pieces(const View& view, IovaRange range, std::uint64_t gpa, Access access, bool head,
                                      std::uint32_t tag) noexcept {
  const std::size_t staged_before = staged_;
  std::uint64_t at = range.start.value;
  std::uint64_t first_flags = head ? LeafWord::head : 0;
  std::uint32_t leaves = 0;
  for (;;) {
    const std::uint64_t left = range.last.value - at;  // bytes to go, less one
    const Region* region = view.find(gpa);
    const IovaRange* usable = usable_at(at);
    const bool allowed = region != nullptr && usable != nullptr && !(region->read_only && may_write(access));
    std::uint64_t piece = left;
    bool backed = allowed;
    if (allowed) {
      piece = std::min({left, region->last - gpa, usable->last.value - at});
      if (piece != left) {
        const std::uint64_t whole = (piece + 1) & ~granule_mask_;
        backed = whole != 0;
        piece = backed ? whole - 1 : granule_mask_;
      }
    } else if (region != nullptr && usable != nullptr) {
      piece = std::min(left, (region->last - gpa) | granule_mask_);
    } else {
      // Skip to the nearer of what is missing; a granule that is only partly there counts as missing.
      std::uint64_t skip = left;
      if (region == nullptr)
        if (const auto next = view.next_region_start(gpa); next) skip = std::min(skip, *next - gpa - 1);
      if (usable == nullptr) {
        const std::uint64_t next = next_usable(at);
        if (next != 0) skip = std::min(skip, next - at - 1);
      }
      piece = std::min(left, skip | granule_mask_);
    }
    const IovaRange here{Iova{at}, Iova{at + piece}};
    const std::uint64_t word = LeafWord::make(gpa, access) | (backed ? LeafWord::backed : 0);
    const auto filled = index_.fill(here, word, first_flags | (backed ? LeafWord::unit : 0));
    bool staged = filled.has_value();
    if (staged && backed) staged = stage({here, gpa - region->gpa, region->id, HostOp::Kind::map, access}, tag);
    if (!staged) {
      static_cast<void>(index_.clear({range.start, here.last}));
      staged_ = staged_before;
      return filled ? no_memory() : filled.error();
    }
    leaves += *filled;
    if (backed) {
      add(counters_.merged_leaves, *filled - 1);
    } else {
      add(counters_.unbacked_bytes, piece + 1);
    }
    first_flags = 0;
    if (piece == left) break;
    at += piece + 1;
    gpa += piece + 1;
  }
  add(counters_.leaves_mapped, leaves);
  return {};
}

// True when no unit (or guest mapping, by `flag`) reaches across the border between iova - 1 and iova.
bool ShadowDomain::border_is_clean(std::uint64_t iova, std::uint64_t flag) const noexcept {
  if ((iova & granule_mask_) != 0) return !index_.at(iova);  // inside a granule
  std::uint64_t word = 0;
  if (const std::uint64_t* slots = index_.leaf_slots(iova); slots != nullptr) {
    word = slots[(iova >> index_.granule_shift()) & (ShadowIndex::fan - 1)];
  } else if (const auto leaf = index_.at(iova); leaf) {
    if (leaf->range.start.value != iova) return false;
    word = leaf->word;
  }
  if (word == 0 || (word & flag) != 0) return true;
  return flag == LeafWord::unit && (word & LeafWord::backed) == 0;
}

// The unit that covers `iova`, which is backed.
IovaRange ShadowDomain::unit_around(std::uint64_t iova) const noexcept {
  auto leaf = index_.at(iova);
  IovaRange unit = leaf->range;
  while ((leaf->word & LeafWord::unit) == 0) {
    leaf = index_.at(unit.start.value - 1);  // exists: a leaf without the flag continues the one before it
    unit.start = leaf->range.start;
  }
  while (unit.last < index_.everything().last) {
    leaf = index_.at(unit.last.value + 1);
    if (!leaf || (leaf->word & LeafWord::unit) != 0 || (leaf->word & LeafWord::backed) == 0) break;
    unit.last = leaf->range.last;
  }
  return unit;
}

// Maps what is left of a unit that was unmapped for a cut. The index still has it.
bool ShadowDomain::stage_remainder(const View& view, IovaRange range, std::uint32_t tag) noexcept {
  const auto leaf = index_.at(range.start.value);
  const std::uint64_t gpa = LeafWord::gpa(leaf->word) + (range.start.value - leaf->range.start.value);
  const Region* region = view.find(gpa);
  index_.mark(range.start.value, LeafWord::unit | LeafWord::head);
  add(counters_.gap_bytes, range.span() + 1);
  if (region == nullptr) return false;  // taken out of RAM without withdraw_region()
  return stage({range, gpa - region->gpa, region->id, HostOp::Kind::map, LeafWord::access(leaf->word)}, tag);
}

Result<std::uint32_t> ShadowDomain::unmap(const View& view, IovaRange range, CutRule rule, std::uint32_t tag) noexcept {
  if (unmap_granule(range, rule, tag)) return 1U;
  begin_edit();
  if (!range.well_formed() || range.start > index_.everything().last) return 0U;
  range.last = std::min(range.last, index_.everything().last);
  if (rule == CutRule::cut) {  // a granule is the smallest thing there is
    range.start.value &= ~granule_mask_;
    range.last.value |= granule_mask_;
  }
  const bool reaches_top = range.last == index_.everything().last;
  const std::uint64_t after = range.last.value + 1;
  const std::uint64_t flag = rule == CutRule::refuse ? LeafWord::head : LeafWord::unit;
  const bool clean_left = border_is_clean(range.start.value, flag);
  const bool clean_right = reaches_top || border_is_clean(after, flag);
  if (rule == CutRule::refuse && !(clean_left && clean_right))
    return base::fail(Errc::would_bisect, Stage::validate, 0, "{}: unmap of {:#x}..{:#x} would cut a mapping",
                      config_.name, range.start.value, range.last.value);
  std::optional<IovaRange> left;  // remainders of cut units
  std::optional<IovaRange> right;
  if (!(clean_left && clean_right)) {
    if (auto split = index_.split_at(range.start.value); !split) return split.error();
    if (!reaches_top)
      if (auto split = index_.split_at(after); !split) return split.error();
    const auto at_start = index_.at(range.start.value);
    if (!clean_left && at_start && (at_start->word & backed_or_unit) == LeafWord::backed) {
      const IovaRange unit = unit_around(range.start.value);
      if (unit.start < range.start) left = IovaRange{unit.start, Iova{range.start.value - 1}};
    }
    if (!clean_right) {
      const auto at_after = index_.at(after);
      if (at_after && (at_after->word & backed_or_unit) == LeafWord::backed) {
        const IovaRange unit = unit_around(after);
        right = IovaRange{Iova{after}, unit.last};
      }
    }
  }
  const ShadowIndex::Cleared cleared = index_.clear(range);
  if (cleared.leaves == 0) return 0U;
  add(counters_.leaves_unmapped, cleared.leaves);
  bool staged = true;
  if (cleared.any_backed) {
    HostOp op{{Iova{cleared.first_backed}, Iova{cleared.last_backed}}, 0, {}, HostOp::Kind::unmap, Access::none};
    if (!cut_in_place_) {
      if (left) op.range.start = left->start;
      if (right) op.range.last = right->last;
    }
    staged = stage(op, tag);
    if (left || right) {
      add(counters_.cuts, 1);
      if (cut_in_place_) {
        if (right) index_.mark(right->start.value, LeafWord::unit | LeafWord::head);
      } else {
        if (left) staged = stage_remainder(view, *left, tag) && staged;
        if (right) staged = stage_remainder(view, *right, tag) && staged;
      }
    }
  }
  // The guest's mapping is gone either way; without memory to say so the host's side is not, and that is an error.
  if (!staged) return no_memory();
  return cleared.leaves;
}

Result<bool> ShadowDomain::assign(const View& view, IovaRange range, std::uint64_t gpa, Access access,
                                  std::uint32_t tag) noexcept {
  if (map_granule(view, range, gpa, access, tag)) return true;  // there was nothing, and it is as simple as can be
  begin_edit();
  if (auto checked = check_range(range, gpa, access); !checked) return checked.error();
  switch (index_.match(range, LeafWord::make(gpa, access))) {
    case ShadowIndex::Match::equal: return false;
    case ShadowIndex::Match::empty: break;
    case ShadowIndex::Match::different: {
      const auto leaf = index_.at(range.start.value);
      const Region* region = view.find(gpa);
      const bool own_unit =
          leaf && leaf->range == range && (leaf->word & backed_or_unit) == backed_or_unit &&
          (range.last == index_.everything().last || border_is_clean(range.last.value + 1, LeafWord::unit));
      if (own_unit && region != nullptr && region->last - gpa >= range.span() &&
          !(region->read_only && may_write(access))) {
        static_cast<void>(index_.clear(range));
        // Cannot fail: the node was just emptied there, and the leaf has the size it had.
        static_cast<void>(
            index_.fill(range, LeafWord::make(gpa, access) | LeafWord::backed, LeafWord::unit | LeafWord::head));
        add(counters_.replaces, 1);
        if (!stage({range, gpa - region->gpa, region->id, HostOp::Kind::replace, access}, tag)) return no_memory();
        return true;
      }
      if (auto gone = unmap(view, range, CutRule::cut, tag); !gone) return gone.error();
      break;
    }
  }
  if (auto mapped = map_pieces(view, range, gpa, access, true, tag); !mapped) return mapped.error();
  return true;
}

void ShadowDomain::abandon(IovaRange range) noexcept {
  begin_edit();
  add(counters_.leaves_unmapped, index_.clear(range).leaves);
}

Result<void> ShadowDomain::refresh_backing(const View& view) noexcept {
  begin_edit();
  std::uint64_t at = 0;
  for (auto leaf = index_.next(0, iova_max.value); leaf; leaf = index_.next(at, iova_max.value)) {
    const std::uint64_t gpa = LeafWord::gpa(leaf->word);
    // Any RAM in it, any usable IOVA in it?
    const auto ram = view.find(gpa) != nullptr ? std::optional{gpa} : view.next_region_start(gpa);
    const bool has_ram = ram && *ram - gpa <= leaf->range.span();
    const std::uint64_t usable =
        usable_at(leaf->range.start.value) != nullptr ? leaf->range.start.value : next_usable(leaf->range.start.value);
    const bool has_usable = usable >= leaf->range.start.value && usable <= leaf->range.last.value;
    if ((leaf->word & LeafWord::backed) == 0 && has_ram && has_usable) {
      static_cast<void>(index_.clear(leaf->range));
      if (auto mapped =
              map_pieces(view, leaf->range, gpa, LeafWord::access(leaf->word), (leaf->word & LeafWord::head) != 0, 0);
          !mapped)
        return mapped;
    }
    if (leaf->range.last >= index_.everything().last) break;
    at = leaf->range.last.value + 1;
  }
  return {};
}

Result<void> ShadowDomain::withdraw_region(const Region& region) noexcept {
  begin_edit();
  std::optional<IovaRange> span;  // adjoining leaves leave the host as one operation
  bool staged = true;
  const auto flush = [&] {
    if (span) staged = stage({*span, 0, {}, HostOp::Kind::unmap, Access::none}, 0) && staged;
    span.reset();
  };
  std::uint64_t at = 0;
  for (auto leaf = index_.next(0, iova_max.value); leaf; leaf = index_.next(at, iova_max.value)) {
    if ((leaf->word & LeafWord::backed) != 0 && region.contains(LeafWord::gpa(leaf->word))) {
      index_.unmark(leaf->range.start.value, backed_or_unit);
      add(counters_.unbacked_bytes, leaf->range.span() + 1);
      if (span && span->precedes_directly(leaf->range)) {
        span->last = leaf->range.last;
      } else {
        flush();
        span = leaf->range;
      }
    }
    if (leaf->range.last >= index_.everything().last) break;
    at = leaf->range.last.value + 1;
  }
  flush();
  if (!staged) return no_memory();
  return {};
}

}  // namespace iovane::viommu
