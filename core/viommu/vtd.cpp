#include "viommu/vtd.hpp"

#include <algorithm>
#include <array>
#include <bit>

#include "base/error_text.hpp"
#include "viommu/vtd_path.hpp"

namespace iovane::viommu {
namespace {

using namespace std::chrono_literals;
constexpr auto wait_slice = 1ms;
constexpr IovaRange interrupt_range{Iova{0xfee0'0000}, Iova{0xfeef'ffff}};
// Tasks that may wait: more descriptors are not read from the queue until these are done.
constexpr std::size_t tasks_max = 4096;

}  // namespace

struct Vtd::Domain {
  Domain(const DomainConfig& config, const VtdBinding& of, const VtdCapabilities& capabilities)
      : shadow{config}, binding{of}, rules{of.table, capabilities}, inputs{input_ranges(of.table, capabilities)} {}
  ShadowDomain shadow;
  VtdBinding binding;  // kind, domain and table are the key
  VtdEntryRules rules;
  VtdInputRanges inputs;
  VtdPath path;
  std::uint32_t users = 0;
  bool dirty = false;
  bool failed = false;  // emptied; only an invalidation of all of it starts again

  bool is_for(const VtdBinding& b) const noexcept {
    if (b.kind != binding.kind) return false;
    return b.kind == VtdBinding::Kind::pass_through || (b.domain == binding.domain && b.table == binding.table);
  }
};

Vtd::Vtd(const GuestMemory& memory, VtdConfig config, VtdEvents& events)
    : memory_{memory}, config_{std::move(config)}, events_{events} {
  config_.domain.granule_shift = 12;
  // Nothing is mapped at the interrupt range, whatever the tables say there: DMA to it is an interrupt request.
  config_.domain.reserved = {interrupt_range};
  config_.descriptors.scalable = config_.capabilities.scalable;
  // What the data path pushes to is never longer than this, so it never allocates.
  tasks_.reserve(tasks_max + 2 * (config_.domains_max + std::size_t{1}));
  dirty_.reserve(config_.domains_max + std::size_t{1});
}

Vtd::~Vtd() { finish(); }

Vtd::Endpoint* Vtd::find(std::uint16_t source, std::optional<std::uint32_t> pasid) noexcept {
  for (Endpoint& e : endpoints_)
    if (e.source == source && e.pasid == pasid) return &e;
  return nullptr;
}

const Vtd::Endpoint* Vtd::find(std::uint16_t source, std::optional<std::uint32_t> pasid) const noexcept {
  return const_cast<Vtd*>(this)->find(source, pasid);
}

VtdBinding Vtd::binding_of(const GuestMemory::View& view, const Endpoint& endpoint) const noexcept {
  if (enabled_) return resolve_binding(view, config_.capabilities, rtaddr_, endpoint.source, endpoint.pasid);
  VtdBinding off;  // translation disabled: requests without PASID pass through
  off.kind = endpoint.pasid ? VtdBinding::Kind::blocked : VtdBinding::Kind::pass_through;
  return off;
}

Result<void> Vtd::add_endpoint(std::uint16_t source, std::optional<std::uint32_t> pasid, ShadowTarget* target) {
  if (find(source, pasid) != nullptr)
    return base::fail(Errc::busy, Stage::attach, 0, "VT-d: source {:#x} is there already", source);
  finish();
  endpoints_.push_back({source, pasid, target, {}, nullptr, false});
  const auto view = memory_.view();
  Endpoint& endpoint = endpoints_.back();
  const auto moved = move_endpoint(view, endpoint, binding_of(view, endpoint));
  if (!moved) {
    endpoints_.pop_back();
    drop_unused_domains();
    return moved;
  }
  busy_ = true;
  finish();
  return {};
}

Result<void> Vtd::remove_endpoint(std::uint16_t source, std::optional<std::uint32_t> pasid) {
  finish();
  Endpoint* endpoint = find(source, pasid);
  if (endpoint == nullptr)
    return base::fail(Errc::not_found, Stage::detach, 0, "VT-d: source {:#x} is not there", source);
  Result<void> outcome;
  if (endpoint->domain != nullptr) {
    if (endpoint->target != nullptr) outcome = endpoint->domain->shadow.detach(*endpoint->target);
    --endpoint->domain->users;
  }
  endpoints_.erase(endpoints_.begin() + (endpoint - endpoints_.data()));
  drop_unused_domains();
  return outcome;
}

void Vtd::drop_unused_domains() noexcept {
  std::erase_if(domains_, [&](const std::unique_ptr<Domain>& d) {
    if (d->users != 0) return false;
    std::erase(dirty_, d.get());
    std::erase_if(tasks_, [&](const Task& t) { return t.domain == d.get(); });
    return true;
  });
}

// A domain for a table: the one there is, or a new one that already holds what the table says.
Result<Vtd::Domain*> Vtd::domain_for(const GuestMemory::View& view, const VtdBinding& binding) noexcept {
  for (const auto& d : domains_)
    if (d->is_for(binding)) return d.get();
  if (domains_.size() >= config_.domains_max)
    return base::fail(Errc::limit_reached, Stage::attach, 0, "VT-d: the guest uses more than {} page tables",
                      config_.domains_max);
  Domain* made_at = nullptr;
  try {
    made_at = &make_domain(binding);
  } catch (const std::bad_alloc&) {
    return make_error(Errc::out_of_memory, Stage::attach, "VT-d: no memory for another guest domain");
  }
  Domain& made = *made_at;
  if (binding.kind == VtdBinding::Kind::pass_through) {
    for (const Region& region : view.regions()) {
      const auto mapped = made.shadow.map(view, {Iova{region.gpa}, Iova{region.last}}, region.gpa,
                                          region.read_only ? Access::read : Access::read_write);
      if (!mapped) return mapped.error();
    }
    mark_dirty(made);
  } else {
    compare(made, made.inputs.low);
    if (made.inputs.high) compare(made, *made.inputs.high);
  }
  return &made;
}

Vtd::Domain& Vtd::make_domain(const VtdBinding& binding) {
  DomainConfig config = config_.domain;
  config.name = binding.kind == VtdBinding::Kind::pass_through ? "VT-d pass-through"
                                                               : fmt::format("VT-d domain {}", binding.domain);
  config.address_bits =
      binding.kind == VtdBinding::Kind::pass_through || binding.table.stage == VtdPageTable::Stage::first
          ? 64
          : std::min<unsigned>(12 + 9 * binding.table.levels, 57);
  auto made = std::make_unique<Domain>(config, binding, config_.capabilities);
  const auto place = std::upper_bound(domains_.begin(), domains_.end(), binding.domain,
                                      [](std::uint16_t id, const auto& d) { return id < d->binding.domain; });
  return **domains_.insert(place, std::move(made));
}

// The endpoint leaves its old table at once: from here on the device sees the new one, or nothing.
Result<void> Vtd::move_endpoint(const GuestMemory::View& view, Endpoint& endpoint, const VtdBinding& binding) noexcept {
  Domain* next = nullptr;
  Result<void> outcome;
  if (binding.kind != VtdBinding::Kind::blocked) {
    auto found = domain_for(view, binding);
    if (found) {
      next = *found;
    } else {
      outcome = found.error();
    }
  }
  endpoint.binding = binding;
  if (next == endpoint.domain && outcome) return {};
  ++stats_.moved_endpoints;
  if (next != nullptr) ++next->users;
  if (endpoint.domain != nullptr) {
    --endpoint.domain->users;
    if (endpoint.target != nullptr)
      if (auto left = endpoint.domain->shadow.detach(*endpoint.target); !left) outcome = left;
  }
  endpoint.domain = next;
  if (next != nullptr && endpoint.target != nullptr) {
    if (!next->shadow.idle()) next->shadow.commit_and_wait();
    if (auto joined = next->shadow.attach(view, *endpoint.target); !joined) {
      outcome = joined;
      --next->users;
      endpoint.domain = nullptr;
    }
  }
  return outcome;
}

void Vtd::move_stale_endpoints(const GuestMemory::View& view) noexcept {
  for (Endpoint& endpoint : endpoints_) {
    if (!std::exchange(endpoint.stale, false)) continue;
    const VtdBinding binding = binding_of(view, endpoint);
    static_cast<void>(budget_.take(1));
    if (binding == endpoint.binding && (endpoint.domain != nullptr || binding.kind == VtdBinding::Kind::blocked))
      continue;
    // What it leaves is unmapped, what it joins is mapped on its host: work that its guest caused.
    const auto leaves = [&] { return endpoint.domain == nullptr ? 0 : endpoint.domain->shadow.index().leaves(); };
    static_cast<void>(budget_.take(leaves()));
    if (auto moved = move_endpoint(view, endpoint, binding); !moved)
      events_.shadow_failed(binding.domain, moved.error());
    static_cast<void>(budget_.take(leaves()));
  }
  any_stale_ = false;
  drop_unused_domains();
}

void Vtd::mark_endpoints(const VtdDescriptor& d) noexcept {
  using Kind = VtdDescriptor::Kind;
  using Scope = VtdDescriptor::Scope;
  constexpr std::array<std::uint16_t, 4> function_bits{0, 4, 6, 7};
  for (Endpoint& e : endpoints_) {
    bool hit = true;
    if (d.kind == Kind::context_cache && d.scope == Scope::device) {
      const auto ignore = static_cast<std::uint16_t>(~function_bits[d.function_mask]);
      hit = (e.source & ignore) == (d.source & ignore);
    } else if (d.scope == Scope::domain || d.scope == Scope::pasid) {
      // Blocked ones may become unblocked: with caching mode a guest names domain 0 for entries that were not present.
      hit = e.binding.kind == VtdBinding::Kind::blocked || e.binding.domain == d.domain;
      if (d.scope == Scope::pasid)
        hit = (hit && e.binding.pasid == d.pasid) || e.binding.kind == VtdBinding::Kind::blocked;
    }
    if (!hit) continue;
    e.stale = true;
    any_stale_ = true;
  }
}

void Vtd::compare(Domain& domain, const IovaRange& range) noexcept { tasks_.push_back({&domain, range}); }

void Vtd::mark_dirty(Domain& domain) noexcept {
  if (std::exchange(domain.dirty, true)) return;
  dirty_.push_back(&domain);
}

std::span<const std::unique_ptr<Vtd::Domain>> Vtd::domains_named(const VtdDescriptor& d) const noexcept {
  if (d.scope == VtdDescriptor::Scope::global) return domains_;
  const auto first = std::lower_bound(domains_.begin(), domains_.end(), d.domain,
                                      [](const auto& owned, std::uint16_t id) { return owned->binding.domain < id; });
  auto last = first;
  while (last != domains_.end() && (*last)->binding.domain == d.domain) ++last;
  return {first, last};
}

// Turns a descriptor into tasks, waits, or endpoints to look up again.
void Vtd::apply(const GuestMemory::View& view, const VtdDescriptor& d) noexcept {
  using Kind = VtdDescriptor::Kind;
  ++stats_.descriptors;
  switch (d.kind) {
    case Kind::context_cache:
    case Kind::pasid_cache: mark_endpoints(d); return;
    case Kind::iotlb:
    case Kind::pasid_iotlb: invalidate(view, d); return;
    case Kind::interrupt_cache: events_.interrupt_cache_invalidated(d); return;
    case Kind::wait:
      ++stats_.waits;
      waits_.push_back({d.write_status, d.interrupt, d.status_address, d.status_data});
      return;
    case Kind::device_iotlb:
    case Kind::pasid_device_iotlb: return;  // the host invalidates its devices' caches when it unmaps
  }
}

void Vtd::invalidate(const GuestMemory::View& view, const VtdDescriptor& d) noexcept {
  using Scope = VtdDescriptor::Scope;
  const auto named_domains = domains_named(d);
  static_cast<void>(budget_.take(named_domains.size()));
  for (const auto& owned : named_domains) {
    Domain& domain = *owned;
    if (domain.binding.kind != VtdBinding::Kind::paging) continue;
    // PASID-based invalidation concerns first-level tables only, the other one second-level tables; a guest that
    // invalidates more than it must is not wrong, so the IOTLB kind is taken for both.
    if (d.kind == VtdDescriptor::Kind::pasid_iotlb && !domain.rules.first()) continue;
    if (d.scope != Scope::page) {
      domain.failed = false;
      compare(domain, domain.inputs.low);
      if (domain.inputs.high) compare(domain, *domain.inputs.high);
      continue;
    }
    if (domain.failed) continue;
    const IovaRange named{Iova{d.first_address()}, Iova{d.last_address()}};
    const bool nothing_waits = task_next_ == tasks_.size();
    if (nothing_waits && compare_run(view, domain, named)) [[likely]]
      continue;
    if (const auto low = domain.inputs.low.intersection(named); low) {
      if (nothing_waits) {  // do it now
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
}

// The common invalidation, cut short: a few pages of one level-1 table. False: take the long way.
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

// Every domain with staged edits gets its batch; true when all of them are in effect.
bool Vtd::commit_domains() noexcept {
  if (dirty_.empty()) return true;
  std::erase_if(dirty_, [&](Domain* domain) {
    if (domain->shadow.commit() == Progress::pending) return false;
    domain->dirty = false;
    for (const EditFailure& failure : domain->shadow.failures())
      events_.shadow_failed(domain->binding.domain, failure.error);
    return true;
  });
  return dirty_.empty();
}

// Everything that was read is in effect: the guest may know.
void Vtd::finish_round(const GuestMemory::View& view) noexcept {
  done_head_ = head_;
  for (const PendingWait& w : waits_) {
    // A status address that is not RAM is the guest's own loss.
    if (w.write_status) static_cast<void>(view.write_le32(w.address, w.data));
    if (w.interrupt) events_.wait_completed();
  }
  waits_.clear();
  if (queue_error_ && !std::exchange(error_reported_, true)) events_.queue_error(head());
}

// True when there is nothing more to read. Stops at a descriptor that moves endpoints.
bool Vtd::read_descriptors(const GuestMemory::View& view) noexcept {
  if (!queue_on_ || queue_error_) return true;
  const std::uint64_t* page = nullptr;  // of the queue, that holds descriptors from page_first on
  std::uint32_t page_first = 0;
  const std::uint32_t page_entries = 4096 / entry_bytes_;
  while (head_ != tail_) {
    if (budget_.left == 0 || any_stale_ || tasks_.size() - task_next_ >= tasks_max || waits_.size() >= queue_entries_)
      return false;
    if (page == nullptr || head_ - page_first >= page_entries) {
      page_first = head_ & ~(page_entries - 1);
      page = view.table(queue_gpa_ + std::uint64_t{page_first} * entry_bytes_);
    }
    const auto descriptor = page == nullptr
                                ? std::optional<VtdDescriptor>{}
                                : decode_descriptor(load_descriptor(page, head_ - page_first), config_.descriptors);
    if (!descriptor) {
      queue_error_ = true;
      ++stats_.queue_errors;
      return true;
    }
    head_ = head_ + 1 == queue_entries_ ? 0 : head_ + 1;
    static_cast<void>(budget_.take(1));
    apply(view, *descriptor);
  }
  return true;
}

// Each word of it once.
VtdRawDescriptor Vtd::load_descriptor(const std::uint64_t* page, std::uint32_t index) const noexcept {
  const std::uint64_t* words = page + std::size_t{index} * (entry_bytes_ / 8);
  VtdRawDescriptor raw{GuestMemory::View::load(words), GuestMemory::View::load(words + 1), 0, 0};
  if (entry_bytes_ == 32) raw[2] = GuestMemory::View::load(words + 2), raw[3] = GuestMemory::View::load(words + 3);
  if constexpr (std::endian::native == std::endian::big)
    for (std::uint64_t& word : raw) word = __builtin_bswap64(word);
  return raw;
}

Progress Vtd::begin() noexcept {
  if (busy_) return Progress::pending;  // advance() takes it along
  busy_ = true;
  return advance();
}

// A round: read descriptors and do their tasks; commit; complete the waits. Endpoints move between rounds, when nothing
// is in flight and everything before the move is in effect. What a call could not finish is committed before it yields,
// so a long comparison never stages more than one call's work.
Progress Vtd::advance() noexcept {
  if (!busy_) return Progress::done;
  const auto view = memory_.view();
  budget_.left = config_.work_per_call;
  for (;;) {
    if (!commit_domains()) return Progress::pending;
    bool tasks_done = task_next_ == tasks_.size();
    if (tasks_done) finish_round(view);
    if (tasks_done && any_stale_) move_stale_endpoints(view);
    const bool read_all = read_descriptors(view);
    tasks_done = run_tasks(view);
    if (!commit_domains()) return Progress::pending;
    if (!tasks_done || (budget_.left == 0 && !read_all)) {
      ++stats_.yields;
      return Progress::pending;
    }
    finish_round(view);
    if (read_all && !any_stale_) break;
  }
  busy_ = false;
  return Progress::done;
}

bool Vtd::set_queue(std::uint64_t iqa) noexcept {
  finish();
  const std::uint64_t size = iqa & 7;
  const bool wide = (iqa >> 11 & 1) != 0;
  queue_on_ = (iqa & 0x7f8) == 0 && (!wide || config_.capabilities.scalable);
  iqa_ = iqa;
  queue_gpa_ = iqa & ~std::uint64_t{0xfff};
  entry_bytes_ = wide ? 32 : 16;
  queue_entries_ = (4096U << size) / entry_bytes_;
  head_ = done_head_ = tail_ = 0;
  queue_error_ = error_reported_ = false;
  waits_.reserve(queue_entries_);
  return queue_on_;
}

Progress Vtd::write_tail(std::uint64_t iqt) noexcept {
  // The tail's unit is the descriptor's size; a 256-bit queue has one bit less (bit 4 reserved).
  const auto tail = static_cast<std::uint32_t>((iqt & 0x7fff0) / entry_bytes_);
  if (!queue_on_) return busy_ ? Progress::pending : Progress::done;
  if (tail >= queue_entries_) {  // beyond the queue: an invalid tail
    queue_error_ = error_reported_ = true;
    ++stats_.queue_errors;
    events_.queue_error(head());
    return busy_ ? Progress::pending : Progress::done;
  }
  tail_ = tail;
  return begin();
}

Progress Vtd::clear_queue_error() noexcept {
  queue_error_ = error_reported_ = false;
  return begin();
}

std::uint64_t Vtd::head() const noexcept { return std::uint64_t{done_head_} * entry_bytes_; }

Progress Vtd::execute(const VtdDescriptor& descriptor) noexcept {
  finish();
  busy_ = true;
  const auto view = memory_.view();
  budget_.left = config_.work_per_call;
  apply(view, descriptor);
  return advance();
}

Progress Vtd::set_root_table(std::uint64_t rtaddr) noexcept {
  rtaddr_ = rtaddr;
  return execute({VtdDescriptor::Kind::context_cache, VtdDescriptor::Scope::global});
}

Progress Vtd::set_translation(bool enabled) noexcept {
  enabled_ = enabled;
  return execute({VtdDescriptor::Kind::context_cache, VtdDescriptor::Scope::global});
}

void Vtd::wait(std::chrono::nanoseconds timeout) noexcept {
  for (Domain* domain : dirty_)
    if (domain->shadow.in_flight()) return domain->shadow.wait(timeout);
}

void Vtd::finish() noexcept {
  while (advance() == Progress::pending) wait(wait_slice);
}

Vtd::State Vtd::save_state() const noexcept {
  return {1,
          enabled_ ? 1U : 0U,
          rtaddr_,
          queue_on_ ? iqa_ : 0,
          head(),
          std::uint64_t{tail_} * entry_bytes_,
          queue_error_ ? 1U : 0U};
}

Result<void> Vtd::restore_state(const State& state) noexcept {
  const auto bad = [](const char* what) { return make_error(Errc::bad_format, Stage::validate, what); };
  if (state.version != 1) return bad("VT-d state: of a version this program does not know");
  if (state.iqa != 0 && !set_queue(state.iqa)) return bad("VT-d state: its queue address is not one");
  const std::uint64_t bytes = std::uint64_t{queue_entries_} * entry_bytes_;
  if (state.iqa != 0 && (state.head >= bytes || state.tail >= bytes || (state.head | state.tail) % entry_bytes_ != 0))
    return bad("VT-d state: its queue's head or tail is outside the queue");
  if (state.iqa != 0) {
    head_ = done_head_ = static_cast<std::uint32_t>(state.head / entry_bytes_);
    tail_ = static_cast<std::uint32_t>(state.tail / entry_bytes_);
  }
  queue_error_ = error_reported_ = state.queue_error != 0;
  rtaddr_ = state.rtaddr;
  static_cast<void>(set_translation(state.enabled != 0));
  finish();
  return {};
}

Progress Vtd::memory_added() noexcept {
  finish();
  const auto view = memory_.view();
  for (const auto& owned : domains_) {
    if (owned->binding.kind == VtdBinding::Kind::pass_through) {
      for (const Region& region : view.regions())
        if (owned->shadow.index().is_free({Iova{region.gpa}, Iova{region.last}}))
          static_cast<void>(owned->shadow.map(view, {Iova{region.gpa}, Iova{region.last}}, region.gpa,
                                              region.read_only ? Access::read : Access::read_write));
    }
    if (auto refreshed = owned->shadow.refresh_backing(view); !refreshed)
      events_.shadow_failed(owned->binding.domain, refreshed.error());
    mark_dirty(*owned);
  }
  return begin();
}

Progress Vtd::memory_removing(const Region& region) noexcept {
  finish();
  const auto view = memory_.view();
  for (const auto& owned : domains_) {
    Result<void> withdrawn;
    if (owned->binding.kind == VtdBinding::Kind::pass_through) {
      if (auto gone = owned->shadow.unmap(view, {Iova{region.gpa}, Iova{region.last}}, CutRule::cut); !gone)
        withdrawn = gone.error();
    } else {
      withdrawn = owned->shadow.withdraw_region(region);
    }
    if (!withdrawn) events_.shadow_failed(owned->binding.domain, withdrawn.error());
    mark_dirty(*owned);
  }
  return begin();
}

std::optional<std::pair<std::uint64_t, Access>> Vtd::translate(std::uint16_t source, std::optional<std::uint32_t> pasid,
                                                               std::uint64_t iova) const noexcept {
  const Endpoint* endpoint = find(source, pasid);
  if (endpoint == nullptr || endpoint->domain == nullptr) return std::nullopt;
  return endpoint->domain->shadow.translate(iova);
}

Vtd::FaultReport Vtd::fault_of(std::uint16_t source, std::optional<std::uint32_t> pasid, std::uint64_t iova,
                               bool write) const noexcept {
  const auto view = memory_.view();
  Endpoint endpoint;
  endpoint.source = source;
  endpoint.pasid = pasid;
  const VtdBinding binding = binding_of(view, endpoint);
  if (binding.kind == VtdBinding::Kind::pass_through) return {};
  VtdFault reason = binding.fault;
  if (binding.kind == VtdBinding::Kind::paging)
    reason = translate_address(view, binding.table, config_.capabilities, iova, write).fault;
  return {reason, !(binding.faults_disabled && is_qualified(reason))};
}

const ShadowDomain* Vtd::domain_of(std::uint16_t source, std::optional<std::uint32_t> pasid) const noexcept {
  const Endpoint* endpoint = find(source, pasid);
  return endpoint == nullptr || endpoint->domain == nullptr ? nullptr : &endpoint->domain->shadow;
}

}  // namespace iovane::viommu
