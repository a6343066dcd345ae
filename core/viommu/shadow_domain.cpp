// ShadowDomain's life: batches and their failures, targets that come and go.
#include "viommu/shadow_domain.hpp"

#include <algorithm>

#include "base/error_text.hpp"

namespace iovane::viommu {
namespace {

using namespace std::chrono_literals;

// How long one wait inside a control-plane call sleeps before it looks again: targets without an event are polled.
constexpr auto wait_slice = 1ms;
// Operations of one replay batch: large enough to merge, small enough to keep the target's own structures small.
constexpr std::size_t replay_ops = 1024;
// Operations of one batch that a domain has room for from the start.
constexpr std::size_t staged_at_first = 1024;

std::vector<IovaRange> intersect(const std::vector<IovaRange>& a, const std::vector<IovaRange>& b) {
  std::vector<IovaRange> out;
  for (std::size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    if (const auto both = a[i].intersection(b[j]); both) out.push_back(*both);
    if (a[i].last < b[j].last) {
      ++i;
    } else {
      ++j;
    }
  }
  return out;
}

std::vector<IovaRange> subtract(const std::vector<IovaRange>& from, const std::vector<IovaRange>& holes) {
  std::vector<IovaRange> out;
  for (IovaRange range : from) {
    bool alive = true;
    for (const IovaRange& hole : holes) {
      if (!hole.overlaps(range)) continue;
      if (hole.start > range.start) out.push_back({range.start, Iova{hole.start.value - 1}});
      alive = hole.last < range.last;
      if (!alive) break;
      range.start = Iova{hole.last.value + 1};
    }
    if (alive) out.push_back(range);
  }
  return out;
}

bool covers(const std::vector<IovaRange>& ranges, const IovaRange& wanted) noexcept {
  return std::any_of(ranges.begin(), ranges.end(), [&](const IovaRange& r) { return r.contains(wanted); });
}

}  // namespace

ShadowDomain::ShadowDomain(DomainConfig config)
    : config_{std::move(config)},
      index_{config_.granule_shift, config_.address_bits, config_.nodes_max},
      granule_mask_{(std::uint64_t{1} << config_.granule_shift) - 1},
      layout_frozen_{config_.layout == LayoutPolicy::fixed} {
  ops_.resize(staged_at_first);
  tags_.resize(staged_at_first);
  recompute_usable();
}

ShadowDomain::~ShadowDomain() {
  while (!sides_.empty()) static_cast<void>(detach(*sides_.back().target));
}

void ShadowDomain::recompute_usable() {
  std::vector<IovaRange> usable{index_.everything()};
  for (const Side& side : sides_) usable = intersect(usable, side.usable);
  usable_ = subtract(usable, config_.reserved);
  window_ = no_window;
  room_ = sides_.empty() ? 0 : ops_.size();
  cut_in_place_ = !sides_.empty() &&
                  std::all_of(sides_.begin(), sides_.end(), [](const Side& s) { return s.target->unmap_may_cut(); });
  // relaxed: a gauge.
  counters_.targets.store(sides_.size(), std::memory_order_relaxed);
}

Progress ShadowDomain::commit() noexcept {
  if (state_ != State::idle) return poll();
  if (staged_ == 0) {
    finish_batch();
    return Progress::done;
  }
  add(counters_.host_ops, staged_);
  add(counters_.batches, 1);
  bool all_well = true;
  for (Side& side : sides_) {
    side.progress = side.target->submit({ops_.data(), staged_}, side.failures);
    all_well = all_well && side.progress == Progress::done && side.failures.empty();
  }
  if (all_well) [[likely]] {
    finish_batch();
    return Progress::done;
  }
  state_ = State::in_flight;
  return advance();
}

Progress ShadowDomain::poll() noexcept {
  if (state_ == State::idle) return Progress::done;
  for (Side& side : sides_)
    if (side.progress == Progress::pending) side.progress = side.target->poll(side.failures);
  return advance();
}

Progress ShadowDomain::advance() noexcept {
  for (;;) {
    for (const Side& side : sides_)
      if (side.progress == Progress::pending) return Progress::pending;
    bool any_failure = false;
    for (const Side& side : sides_) any_failure = any_failure || !side.failures.empty();
    if (state_ == State::rolling_back) {
      // A failed rollback leaves a mapping on that target that the guest does not have: the engine has quarantined it.
      for (Side& side : sides_) {
        for (const OpFailure& failure : side.failures)
          if (failure.error.code != Errc::not_found) add(counters_.failed_unmaps, 1);
        side.failures.clear();
        side.rollback.clear();
      }
      break;
    }
    if (!any_failure || !handle_failures()) break;
    state_ = State::rolling_back;
    for (Side& side : sides_)
      if (!side.rollback.empty()) side.progress = side.target->submit(side.rollback, side.failures);
  }
  state_ = State::idle;
  finish_batch();
  return Progress::done;
}

void ShadowDomain::finish_batch() noexcept {
  staged_ = 0;
  // relaxed: gauges.
  counters_.live_leaves.store(index_.leaves(), std::memory_order_relaxed);
  counters_.index_nodes.store(index_.nodes_in_use(), std::memory_order_relaxed);
}

// Turns per-target failures into per-edit errors and the operations that take successes back. True: there are some.
// Quadratic in failures times operations, on the path where a kernel call failed for each.
bool ShadowDomain::handle_failures() noexcept {
  bool roll_back = false;
  std::vector<std::uint32_t> failed_maps;
  for (Side& side : sides_)
    for (const OpFailure& failure : side.failures)
      if (ops_[failure.op].kind != HostOp::Kind::unmap) failed_maps.push_back(failure.op);
  std::sort(failed_maps.begin(), failed_maps.end());
  failed_maps.erase(std::unique(failed_maps.begin(), failed_maps.end()), failed_maps.end());

  for (Side& side : sides_) {
    for (const OpFailure& failure : side.failures) {
      const HostOp& op = ops_[failure.op];
      if (op.kind == HostOp::Kind::unmap && failure.error.code == Errc::not_found) {
        // Nothing was there: expected where a map of it failed earlier in this batch.
        const bool explained = std::any_of(failed_maps.begin(), failed_maps.end(), [&](std::uint32_t m) {
          return m < failure.op && ops_[m].range.overlaps(op.range);
        });
        if (explained) continue;
      }
      if (op.kind == HostOp::Kind::unmap) add(counters_.failed_unmaps, 1);
      add(counters_.failed_edits, 1);
      failures_.push_back({tags_[failure.op], failure.error});
    }
  }
  for (const std::uint32_t m : failed_maps) {
    const HostOp& op = ops_[m];
    bool overtaken = false;  // a later operation of the batch took the range already
    for (std::size_t later = m + 1; later < staged_ && !overtaken; ++later)
      overtaken = ops_[later].range.overlaps(op.range);
    if (overtaken) continue;
    const ShadowIndex::Cleared cleared = index_.clear(op.range);
    add(counters_.leaves_unmapped, cleared.leaves);
    add(counters_.lost_bytes, op.range.span() + 1);
    for (Side& side : sides_) {
      const bool failed_here =
          std::any_of(side.failures.begin(), side.failures.end(), [&](const OpFailure& f) { return f.op == m; });
      if (failed_here && op.kind == HostOp::Kind::map) continue;
      side.rollback.push_back({op.range, 0, {}, HostOp::Kind::unmap, Access::none});
      add(counters_.rollbacks, 1);
      roll_back = true;
    }
  }
  for (Side& side : sides_) side.failures.clear();
  return roll_back;
}

void ShadowDomain::wait(std::chrono::nanoseconds timeout) noexcept {
  for (Side& side : sides_)
    if (side.progress == Progress::pending) return side.target->wait(timeout);
}

void ShadowDomain::commit_and_wait() noexcept {
  Progress progress = commit();
  while (progress == Progress::pending) {
    wait(wait_slice);
    progress = poll();
  }
}

Result<void> ShadowDomain::commit_after(const Result<void>& before) noexcept {
  commit_and_wait();
  if (!before) return before;
  if (!failures_.empty()) return failures_.front().error;
  return {};
}

bool ShadowDomain::attached(const ShadowTarget& target) const noexcept {
  return std::any_of(sides_.begin(), sides_.end(), [&](const Side& s) { return s.target == &target; });
}

Result<void> ShadowDomain::check_layout(const ShadowTarget& target, const std::vector<IovaRange>& usable) const {
  using base::fail;
  if (target.granule().value > granule_mask_ + 1)
    return fail(Errc::unsupported, Stage::attach, 0,
                "{}: {} maps granules of {:#x} bytes, the guest's are {:#x}: offer the guest larger pages",
                config_.name, target.name(), target.granule().value, granule_mask_ + 1);
  if (layout_frozen_)
    for (const IovaRange& promised : config_.promised)
      if (!covers(usable, promised))
        return fail(Errc::iova_reserved, Stage::attach, 0,
                    "{}: {} cannot offer all of {:#x}..{:#x}, which was promised to the guest", config_.name,
                    target.name(), promised.start.value, promised.last.value);
  Result<void> verdict;
  for_each_unit(nullptr, [&](const HostOp& unit) {
    if (covers(usable, unit.range)) return true;
    verdict = fail(Errc::iova_reserved, Stage::attach, 0,
                   "{}: {} reserves IOVAs inside {:#x}..{:#x}, which the guest has mapped", config_.name, target.name(),
                   unit.range.start.value, unit.range.last.value);
    return false;
  });
  return verdict;
}

// Visits every unit in address order until `visit` says false. Without a view the memory fields stay empty.
void ShadowDomain::for_each_unit(const View* view, const std::function<bool(const HostOp&)>& visit) const {
  HostOp unit;
  bool open = false;
  std::uint64_t at = 0;
  for (auto leaf = index_.next(0, iova_max.value); leaf; leaf = index_.next(at, iova_max.value)) {
    const bool backed = (leaf->word & LeafWord::backed) != 0;
    if (open && backed && (leaf->word & LeafWord::unit) == 0 && unit.range.precedes_directly(leaf->range)) {
      unit.range.last = leaf->range.last;
    } else {
      if (open && !visit(unit)) return;
      open = backed;
      unit = {leaf->range, 0, {}, HostOp::Kind::map, LeafWord::access(leaf->word)};
      if (backed && view != nullptr) {
        const std::uint64_t gpa = LeafWord::gpa(leaf->word);
        if (const Region* region = view->find(gpa); region != nullptr)
          unit.region = region->id, unit.region_offset = gpa - region->gpa;
      }
    }
    if (leaf->range.last >= index_.everything().last) break;
    at = leaf->range.last.value + 1;
  }
  if (open) visit(unit);
}

Result<void> ShadowDomain::run_and_wait(Side& side, std::span<const HostOp> ops) noexcept {
  side.failures.clear();
  Progress progress = side.target->submit(ops, side.failures);
  while (progress == Progress::pending) {
    side.target->wait(wait_slice);
    progress = side.target->poll(side.failures);
  }
  if (side.failures.empty()) return {};
  return side.failures.front().error;
}

Result<void> ShadowDomain::attach(const View& view, ShadowTarget& target) {
  if (state_ != State::idle || staged_ != 0)
    return base::fail(Errc::busy, Stage::attach, 0, "{}: a batch is not finished; poll() until it is", config_.name);
  if (attached(target))
    return base::fail(Errc::busy, Stage::attach, 0, "{}: {} is attached already", config_.name, target.name());
  auto usable = target.usable_ranges();
  if (!usable) return usable.error();
  if (auto checked = check_layout(target, *usable); !checked) return checked;

  Side side;
  side.target = &target;
  side.usable = std::move(*usable);
  std::vector<HostOp> ops;
  ops.reserve(replay_ops);
  Result<void> outcome;
  std::optional<IovaRange> told;  // what the target may hold by now
  for_each_unit(&view, [&](const HostOp& unit) {
    ops.push_back(unit);
    told = told ? IovaRange{told->start, unit.range.last} : unit.range;
    if (ops.size() < replay_ops) return true;
    outcome = run_and_wait(side, ops);
    ops.clear();
    return outcome.has_value();
  });
  if (outcome && !ops.empty()) outcome = run_and_wait(side, ops);
  if (!outcome) {
    const HostOp undo{*told, 0, {}, HostOp::Kind::unmap, Access::none};
    static_cast<void>(run_and_wait(side, {&undo, 1}));  // nothing mapped at all answers not_found
    return outcome;
  }
  sides_.push_back(std::move(side));
  recompute_usable();
  if (config_.layout == LayoutPolicy::host_constrained && !layout_frozen_) {
    config_.promised = usable_;
    layout_frozen_ = true;
  }
  return {};
}

Result<void> ShadowDomain::detach(ShadowTarget& target) {
  while (state_ != State::idle) {
    wait(wait_slice);
    static_cast<void>(poll());
  }
  if (staged_ != 0) commit_and_wait();
  const auto place = std::find_if(sides_.begin(), sides_.end(), [&](const Side& s) { return s.target == &target; });
  if (place == sides_.end())
    return base::fail(Errc::not_found, Stage::detach, 0, "{}: {} is not attached", config_.name, target.name());
  std::optional<IovaRange> told;
  for_each_unit(nullptr, [&](const HostOp& unit) {
    told = told ? IovaRange{told->start, unit.range.last} : unit.range;
    return true;
  });
  Result<void> outcome;
  if (told) {
    const HostOp withdraw{*told, 0, {}, HostOp::Kind::unmap, Access::none};
    outcome = run_and_wait(*place, {&withdraw, 1});
  }
  sides_.erase(place);
  recompute_usable();
  return outcome;
}

void ShadowDomain::for_each_mapping(const std::function<void(IovaRange, std::uint64_t, Access)>& visit) const {
  std::optional<IovaRange> open;
  std::uint64_t word = 0;
  std::uint64_t at = 0;
  for (auto leaf = index_.next(0, iova_max.value); leaf; leaf = index_.next(at, iova_max.value)) {
    const std::uint64_t guest = leaf->word & LeafWord::guest_mask;
    const bool continues = open && (leaf->word & LeafWord::head) == 0 && open->precedes_directly(leaf->range) &&
                           guest == word + (leaf->range.start.value - open->start.value);
    if (continues) {
      open->last = leaf->range.last;
    } else {
      if (open) visit(*open, LeafWord::gpa(word), LeafWord::access(word));
      open = leaf->range;
      word = guest;
    }
    if (leaf->range.last >= index_.everything().last) break;
    at = leaf->range.last.value + 1;
  }
  if (open) visit(*open, LeafWord::gpa(word), LeafWord::access(word));
}

DomainStats ShadowDomain::stats() const noexcept {
  // relaxed: each counter stands for itself.
  const auto get = [](const std::atomic<std::uint64_t>& c) { return c.load(std::memory_order_relaxed); };
  const Counters& c = counters_;
  return {get(c.leaves_mapped),  get(c.leaves_unmapped), get(c.host_ops),    get(c.batches),
          get(c.merged_leaves),  get(c.replaces),        get(c.cuts),        get(c.gap_bytes),
          get(c.lost_bytes),     get(c.failed_edits),    get(c.rollbacks),   get(c.failed_unmaps),
          get(c.unbacked_bytes), get(c.live_leaves),     get(c.index_nodes), get(c.targets)};
}

}  // namespace iovane::viommu
