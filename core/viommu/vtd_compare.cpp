// Vtd's comparisons: from an invalidation to staged edits of the domains it names, within a budget of work.
#include <algorithm>

#include "viommu/vtd.hpp"
#include "viommu/vtd_domain.hpp"

namespace iovane::viommu {

// PASID-based invalidation concerns first-level tables only, the other one second-level tables; a guest that
// invalidates more than it must is not wrong, so the IOTLB kind is taken for both.
bool Vtd::is_named(const VtdDescriptor& d, const Domain& domain) noexcept {
  return domain.binding.kind == VtdBinding::Kind::paging &&
         (d.kind == VtdDescriptor::Kind::iotlb || domain.rules.first());
}

void Vtd::invalidate(const GuestMemory::View& view, const VtdDescriptor& d) noexcept {
  if (d.scope == VtdDescriptor::Scope::page) return invalidate_pages(view, d);
  const auto named_domains = domains_named(d);
  static_cast<void>(budget_.take(named_domains.size()));
  for (const auto& owned : named_domains) {
    Domain& domain = *owned;
    if (!is_named(d, domain)) continue;
    domain.failed = false;
    compare(domain, domain.inputs.low);
    if (domain.inputs.high) compare(domain, *domain.inputs.high);
  }
}

// The most common invalidation, cut short: one page, whose table is the one of the last invalidation. False: take the
// long way.
inline bool Vtd::compare_page(const GuestMemory::View& view, Domain& domain, std::uint64_t iova) noexcept {
  if (iova > domain.inputs.low.last.value) return false;
  Access inherited = Access::none;
  const std::uint64_t* entry = domain.path.find(view, iova, inherited);
  if (entry == nullptr) return false;
  bool reserved = false;
  Error error;
  if (!sync_entry(view, domain.shadow, domain.rules, iova, entry, inherited, 0, reserved, error)) return false;
  static_cast<void>(budget_.take(1));
  ++stats_.entries_compared;
  if (domain.shadow.staged() != 0) mark_dirty(domain);
  if (reserved) [[unlikely]]
    ++stats_.reserved_entries;
  if (!error.ok()) [[unlikely]] {
    fail_domain(domain, error);
    tasks_.push_back(emptying(domain));
  }
  return true;
}

// The domain that the last page invalidation named, where it is the only one of its number and pages of it can be
// compared at once; or null.
inline Vtd::Domain* Vtd::domain_named_last() const noexcept {
  if (named_.count != 1 || tasks_wait()) return nullptr;
  Domain& domain = *domains_[named_.first];
  return domain.binding.kind == VtdBinding::Kind::paging && !domain.failed ? &domain : nullptr;
}

// Page invalidations and waits, which are nearly all there is; stops at anything else, and where may_read() must be
// asked again. The number of descriptors read. One page of the domain named last takes no call: what compare_page()
// does for one, this does for all of them.
std::uint32_t Vtd::read_common(const GuestMemory::View& view, VtdQueue::Run run) noexcept {
  std::uint32_t read = 0;
  std::uint32_t compared = 0;
  std::uint64_t budget = budget_.left;
  Domain* domain = domain_named_last();
  const std::uint64_t last = domain != nullptr ? domain->inputs.low.last.value : 0;
  const auto id = static_cast<std::uint16_t>(named_.id);
  for (; read != run.count && budget != 0; ++read, --budget, run.step()) {
    const VtdRawDescriptor raw = run.first();
    if (is_wait(raw)) {
      if (waits_pending_ == waits_.size()) break;
      waits_[waits_pending_++] = {raw[0], raw[1]};
      continue;
    }
    const std::uint64_t iova = raw[1] & ~std::uint64_t{0xfff};
    if (domain != nullptr && is_invalidation_of_one_page(raw, id) && iova <= last) [[likely]] {
      Access inherited = Access::none;
      bool reserved = false;
      Error error;
      const std::uint64_t* const entry = domain->path.find(view, iova, inherited);
      if (entry != nullptr &&
          sync_entry(view, domain->shadow, domain->rules, iova, entry, inherited, 0, reserved, error)) [[likely]] {
        ++compared;
        if (budget != 1) --budget;
        if (reserved) [[unlikely]]
          ++stats_.reserved_entries;
        if (error.ok()) [[likely]]
          continue;
        fail_domain(*domain, error);
        tasks_.push_back(emptying(*domain));
        ++read, --budget;
        break;
      }
    }
    if (!is_page_invalidation(raw, config_.descriptors)) break;
    budget_.left = budget;
    VtdDescriptor pages;
    decode_page_invalidation(raw, pages);
    invalidate_pages(view, pages);
    budget = std::max<std::uint64_t>(budget_.left, 1);
    if (tasks_wait() || domain_named_last() != domain) {  // another one, for the next run
      ++read, --budget;
      break;
    }
  }
  budget_.left = budget;
  if (compared != 0 && domain->shadow.staged() != 0) mark_dirty(*domain);
  stats_.entries_compared += compared;
  stats_.descriptors += read;
  return read;
}

void Vtd::invalidate_pages(const GuestMemory::View& view, const VtdDescriptor& d) noexcept {
  const auto named_domains = domains_named(d);
  static_cast<void>(budget_.take(named_domains.size()));
  for (const auto& owned : named_domains) {
    Domain& domain = *owned;
    if (!is_named(d, domain) || domain.failed) continue;
    const bool now = !tasks_wait();
    if (now && d.address_mask == 0 && compare_page(view, domain, d.address)) continue;
    const IovaRange named{Iova{d.first_address()}, Iova{d.last_address()}};
    if (now && compare_run(view, domain, named)) continue;
    compare_pages(view, domain, named, now);
  }
}

void Vtd::compare_pages(const GuestMemory::View& view, Domain& domain, const IovaRange& named, bool now) noexcept {
  if (const auto low = domain.inputs.low.intersection(named); low) {
    if (now) {
      Task task{&domain, *low};
      run_task(view, task);
      if (task.domain != nullptr) tasks_.push_back(task);
    } else {
      compare(domain, *low);
    }
  }
  if (domain.inputs.high)
    if (const auto high = domain.inputs.high->intersection(named); high) compare(domain, *high);
}

inline std::span<const std::unique_ptr<Vtd::Domain>> Vtd::domains_named(const VtdDescriptor& d) noexcept {
  if (d.scope == VtdDescriptor::Scope::global) return domains_;
  if (named_.id == d.domain) [[likely]]
    return std::span{domains_}.subspan(named_.first, named_.count);
  const auto first = std::lower_bound(domains_.begin(), domains_.end(), d.domain,
                                      [](const auto& owned, std::uint16_t id) { return owned->binding.domain < id; });
  auto last = first;
  while (last != domains_.end() && (*last)->binding.domain == d.domain) ++last;
  named_ = {d.domain, static_cast<std::size_t>(first - domains_.begin()), static_cast<std::size_t>(last - first)};
  return std::span{domains_}.subspan(named_.first, named_.count);
}

// The common ones: some pages of one level-1 table. False: take the long way.
bool Vtd::compare_run(const GuestMemory::View& view, Domain& domain, const IovaRange& range) noexcept {
  const std::uint64_t iova = range.start.value;
  if (range.span() > VtdPath::span || ((iova ^ range.last.value) & ~VtdPath::span) != 0) return false;
  if (!domain.inputs.low.contains(range) && !(domain.inputs.high && domain.inputs.high->contains(range))) return false;
  Access inherited = Access::none;
  const std::uint64_t* entries = domain.path.find(view, iova, inherited);
  if (entries == nullptr) entries = domain.path.follow(view, domain.binding.table, domain.rules, iova, inherited);
  if (entries == nullptr) return false;
  const auto count = static_cast<unsigned>(range.span() >> 12) + 1;
  if (!note(domain, sync_entries(view, domain.shadow, domain.rules, iova, entries, count, inherited, budget_, 0)))
    tasks_.push_back(emptying(domain));
  return true;
}

// False: the domain has failed just now, and must be emptied.
bool Vtd::note(Domain& domain, const SyncOutcome& outcome) noexcept {
  stats_.entries_compared += outcome.entries;
  stats_.reserved_entries += outcome.reserved_entries;
  if (domain.shadow.staged() != 0) mark_dirty(domain);
  if (outcome.error.ok()) [[likely]]
    return true;
  fail_domain(domain, outcome.error);
  return false;
}

// Runs a task until it is finished (task.domain becomes null) or the budget is.
void Vtd::run_task(const GuestMemory::View& view, Task& task) noexcept {
  Domain& domain = *task.domain;
  if (task.empties) return empty_some(view, task);
  if (domain.failed) {
    task.domain = nullptr;
    return;
  }
  const SyncOutcome outcome =
      sync_range(view, domain.shadow, domain.binding.table, domain.rules, task.range, budget_, 0);
  if (!note(domain, outcome)) {
    task = emptying(domain);
  } else if (outcome.resume) {
    task.range.start = Iova{*outcome.resume};
  } else {
    task.domain = nullptr;
  }
}

void Vtd::fail_domain(Domain& domain, const Error& error) noexcept {
  ++stats_.failed_domains;
  domain.failed = true;
  events_.shadow_failed(domain.binding.domain, error);
}

Vtd::Task Vtd::emptying(Domain& domain) noexcept { return {&domain, IovaRange::everything(), true}; }

// Takes mappings away, a level-1 table's worth at a time, for as long as the budget lasts.
void Vtd::empty_some(const GuestMemory::View& view, Task& task) noexcept {
  Domain& domain = *task.domain;
  ShadowDomain& shadow = domain.shadow;
  while (budget_.left != 0) {
    const auto leaf = shadow.index().next(task.range.start.value, task.range.last.value);
    if (!leaf) {
      task.domain = nullptr;
      break;
    }
    const Iova last{std::max(leaf->range.last.value, leaf->range.start.value | VtdPath::span)};
    const auto gone = shadow.unmap(view, {leaf->range.start, last}, CutRule::cut);
    if (!gone) events_.shadow_failed(domain.binding.domain, gone.error());
    static_cast<void>(budget_.take(1 + gone.value_or(0U)));
    if (last == task.range.last) {
      task.domain = nullptr;
      break;
    }
    task.range.start = Iova{last.value + 1};
  }
  if (shadow.staged() != 0) mark_dirty(domain);
}

bool Vtd::run_tasks(const GuestMemory::View& view) noexcept {
  while (task_next_ < tasks_.size()) {
    if (budget_.left == 0) return false;
    Task& task = tasks_[task_next_];
    run_task(view, task);
    if (task.domain == nullptr) ++task_next_;
  }
  tasks_.clear();
  task_next_ = 0;
  return true;
}

void Vtd::compare(Domain& domain, const IovaRange& range) noexcept { tasks_.push_back({&domain, range}); }

}  // namespace iovane::viommu
