// Vtd's registers, and the rounds in which it works its queue off.
#include "viommu/vtd.hpp"

#include <algorithm>
#include <utility>

#include "viommu/vtd_domain.hpp"

namespace iovane::viommu {
namespace {

using namespace std::chrono_literals;
constexpr auto wait_slice = 1ms;
constexpr IovaRange interrupt_range{Iova{0xfee0'0000}, Iova{0xfeef'ffff}};
// Tasks that may wait: more descriptors are not read from the queue until these are done.
constexpr std::size_t tasks_max = 4096;

}  // namespace

Vtd::Vtd(const GuestMemory& memory, VtdConfig config, VtdEvents& events)
    : memory_{memory}, reader_{memory}, config_{std::move(config)}, events_{events} {
  config_.domain.granule_shift = 12;
  // Nothing is mapped at the interrupt range, whatever the tables say there: DMA to it is an interrupt request.
  config_.domain.reserved = {interrupt_range};
  config_.descriptors.scalable = config_.capabilities.scalable;
  // What the data path pushes to is never longer than this, so it never allocates.
  tasks_.reserve(tasks_max + 2 * (config_.domains_max + std::size_t{1}));
  dirty_.reserve(config_.domains_max + std::size_t{1});
  waits_.resize(1);  // of execute()
}

Vtd::~Vtd() { finish(); }

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
  const auto view = reader_.view();
  budget_.left = config_.work_per_call;
  for (;;) {
    if (!dirty_.empty() && !commit_domains()) return Progress::pending;
    if (tasks_.empty()) {  // the round that an earlier call left is over
      if (waits_pending_ != 0) finish_round(view);
      if (any_stale_) move_stale_endpoints(view);
    }
    const bool read_all = read_descriptors(view);
    const bool tasks_done = tasks_.empty() || run_tasks(view);
    if (!dirty_.empty() && !commit_domains()) return Progress::pending;
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

inline bool Vtd::may_read() const noexcept {
  return budget_.left != 0 && !any_stale_ && waits_pending_ != waits_.size() &&
         !(tasks_wait() && tasks_.size() - task_next_ >= tasks_max);
}

// True when there is nothing more to read. Stops at a descriptor that moves endpoints.
bool Vtd::read_descriptors(const GuestMemory::View& view) noexcept {
  if (!queue_.on() || queue_error_) return true;
  while (!queue_.all_read()) {
    if (!may_read()) return false;
    VtdQueue::Run run = queue_.unread(view);
    if (const std::uint32_t read = read_common(view, run); read != 0) {
      queue_.skip(read);
      continue;
    }
    const auto descriptor = run.count != 0 ? decode_descriptor(run.first(), config_.descriptors) : std::nullopt;
    if (!descriptor) {
      queue_error_ = true;
      ++stats_.queue_errors;
      return true;
    }
    queue_.skip(1);
    static_cast<void>(budget_.take(1));
    apply(view, *descriptor);
  }
  return true;
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
    case Kind::wait:  // by execute(): from a queue they never come here, and none is pending
      waits_[waits_pending_++] = {encode_wait_flags(d), d.status_address};
      return;
    case Kind::device_iotlb:
    case Kind::pasid_device_iotlb: return;  // the host invalidates its devices' caches when it unmaps
  }
}

// Every domain with staged edits gets its batch; true when all of them are in effect.
bool Vtd::commit_domains() noexcept {
  std::size_t pending = 0;
  for (Domain* domain : dirty_) {
    if (domain->shadow.commit() == Progress::pending) {
      dirty_[pending++] = domain;
      continue;
    }
    domain->dirty = false;
    for (const EditFailure& failure : domain->shadow.failures())
      events_.shadow_failed(domain->binding.domain, failure.error);
  }
  dirty_.resize(pending);
  return pending == 0;
}

// Everything that was read is in effect: the guest may know.
void Vtd::finish_round(const GuestMemory::View& view) noexcept {
  queue_.complete();
  stats_.waits += waits_pending_;
  for (const PendingWait& w : std::span{waits_}.first(waits_pending_)) {
    VtdDescriptor wait;
    decode_wait({w.flags_and_data, w.status_address, 0, 0}, wait);
    // A status address that is not RAM is the guest's own loss.
    if (wait.write_status) static_cast<void>(view.write_le32(wait.status_address, wait.status_data));
    if (wait.interrupt) events_.wait_completed();
  }
  waits_pending_ = 0;
  if (queue_error_ && !std::exchange(error_reported_, true)) events_.queue_error(head());
}

bool Vtd::set_queue(std::uint64_t iqa) noexcept {
  finish();
  const bool is_one = queue_.set(iqa, config_.capabilities.scalable);
  queue_error_ = error_reported_ = false;
  waits_.resize(queue_.entries());
  return is_one;
}

Progress Vtd::write_tail(std::uint64_t iqt) noexcept {
  if (!queue_.on()) return busy_ ? Progress::pending : Progress::done;
  if (!queue_.set_tail(iqt)) {
    queue_error_ = error_reported_ = true;
    ++stats_.queue_errors;
    events_.queue_error(head());
    return busy_ ? Progress::pending : Progress::done;
  }
  return begin();
}

Progress Vtd::clear_queue_error() noexcept {
  queue_error_ = error_reported_ = false;
  return begin();
}

std::uint64_t Vtd::head() const noexcept { return queue_.head(); }

Progress Vtd::execute(const VtdDescriptor& descriptor) noexcept {
  finish();
  busy_ = true;
  const auto view = reader_.view();
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
  return {1, enabled_ ? 1U : 0U, rtaddr_, queue_.iqa(), queue_.head(), queue_.tail(), queue_error_ ? 1U : 0U};
}

Result<void> Vtd::restore_state(const State& state) noexcept {
  const auto bad = [](const char* what) { return make_error(Errc::bad_format, Stage::validate, what); };
  if (state.version != 1) return bad("VT-d state: of a version this program does not know");
  if (state.iqa != 0 && !set_queue(state.iqa)) return bad("VT-d state: its queue address is not one");
  if (state.iqa != 0 && !queue_.restore(state.head, state.tail))
    return bad("VT-d state: its queue's head or tail is outside the queue");
  queue_error_ = error_reported_ = state.queue_error != 0;
  rtaddr_ = state.rtaddr;
  static_cast<void>(set_translation(state.enabled != 0));
  finish();
  return {};
}

}  // namespace iovane::viommu
