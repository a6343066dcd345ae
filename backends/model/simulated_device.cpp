#include "backends/model/simulated_device.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "backends/model/event_queue.hpp"
#include "backends/model/fault_queue.hpp"
#include "base/checked_math.hpp"

namespace iovane::backends::model {
namespace {

// Answers of "try again" that a device believes for one page before it gives up.
constexpr int page_requests_max = 8;

}  // namespace

SimulatedDevice::SimulatedDevice(DeviceOptions options, const IommuOptions& iommu)
    : options_{std::move(options)}, iommu_{iommu}, iotlb_(iommu.iotlb_entries) {
  faults_.reserve(faults_kept);
}

DmaResult SimulatedDevice::dma_read(Iova from, std::span<std::byte> into) noexcept {
  return transfer(from, into.size(), Access::read, [into](std::size_t done, const std::byte* memory, std::size_t n) {
    std::memcpy(into.data() + done, memory, n);
  });
}

DmaResult SimulatedDevice::dma_write(Iova to, std::span<const std::byte> bytes) noexcept {
  return transfer(to, bytes.size(), Access::write, [bytes](std::size_t done, std::byte* memory, std::size_t n) {
    std::memcpy(memory, bytes.data() + done, n);
  });
}

template <typename Move>
DmaResult SimulatedDevice::transfer(Iova at, std::size_t bytes, Access access, Move move) noexcept {
  DmaResult result;
  int requests_left = page_requests_max;
  while (result.bytes < bytes) {
    const auto address = base::checked_add(at.value, std::uint64_t{result.bytes});
    std::unique_lock lock{mutex_};
    DmaFault fault{.address = Iova{address.value_or(0)}, .access = access, .device = this};
    if (!address) {
      fault.reason = FaultReason::outside_aperture;
    } else {
      const std::uint64_t page = base::align_down(*address, os_page_bytes);
      std::byte* memory = nullptr;
      const auto reason = translate(page, access, memory);
      if (!reason) {
        const std::uint64_t offset = *address - page;
        const std::size_t step = std::min<std::size_t>(bytes - result.bytes, os_page_bytes - offset);
        move(result.bytes, memory + offset, step);
        result.bytes += step;
        // R.idle - pairs with A.idle in invalidate(): the bytes were moved before the device looks idle.
        if (holds_nothing()) may_hold_.store(false, std::memory_order_release);
        requests_left = page_requests_max;
        continue;
      }
      fault.reason = *reason;
    }
    if (holds_nothing()) may_hold_.store(false, std::memory_order_release);  // R.idle - as above
    const bool may_ask = fault.reason == FaultReason::not_present || fault.reason == FaultReason::no_permission;
    if (may_ask && domain_->faults() != nullptr && requests_left-- > 0) {
      const std::shared_ptr<FaultQueue> faults = domain_->faults();
      const std::uint32_t id = request_id_;
      lock.unlock();  // whoever answers maps first, which invalidates
      if (faults->request(id, Iova{base::align_down(*address, os_page_bytes)}, access)) continue;
      lock.lock();
    }
    record(fault);
    record_event(fault);
    result.fault = fault;
    break;
  }
  return result;
}

// Under the mutex. On success `memory` stays usable until the mutex is let go.
std::optional<FaultReason> SimulatedDevice::translate(std::uint64_t page, Access access, std::byte*& memory) noexcept {
  stage_fault_ = StageFault::none;
  if (is_interrupt_address(page)) return FaultReason::interrupt_range;
  if (domain_ == nullptr) return FaultReason::not_attached;
  if (!domain_->aperture().contains(Iova{page})) return FaultReason::outside_aperture;

  CachedTranslation* cached = iotlb_.empty() ? nullptr : &iotlb_[(page / os_page_bytes) % iotlb_.size()];
  const bool must_mark = access == Access::write && domain_->dirty_tracking();
  if (cached != nullptr && cached->page == page && includes(cached->access, access) && (!must_mark || cached->dirty)) {
    ++statistics_.hits;
    memory = cached->memory;
    return std::nullopt;
  }
  if (runs_live_ != 0 && translate_by_run(page, access, memory)) {
    ++statistics_.hits;
    return std::nullopt;
  }
  ++statistics_.misses;
  // relaxed: ordered by the barrier below. Once announced, an invalidation waits for the mutex; no second one needed.
  if (!may_hold_.load(std::memory_order_relaxed)) {
    may_hold_.store(true, std::memory_order_relaxed);
    domain_->enter_walk();
  }
  Translation found;
  CachedTable& known = tables_[(page >> 21) % cached_tables];
  FirstStage::Walk walk;
  do {  // again only when the writer changed the entry in between; it changes each entry a bounded number of times
    walk = {.root = root_, .table = known.region == page >> 21 ? known.table : nullptr};
    found = domain_->walk(Iova{page}, walk);
    root_ = walk.root;
    if (walk.table != nullptr) {
      if (known.table == nullptr) ++tables_live_;
      known = {page >> 21, walk.table};
    }
    if (found.memory == nullptr) {
      stage_fault_ = walk.fault;
      switch (walk.fault) {
        case StageFault::permission: return FaultReason::no_permission;
        case StageFault::configuration:
        case StageFault::aborted: return FaultReason::bad_context;
        default: return FaultReason::not_present;
      }
    }
    if (!includes(found.access, access)) {
      if (domain_->nested())
        stage_fault_ = includes(walk.run.access, access) ? StageFault::second_stage : StageFault::permission;
      return FaultReason::no_permission;
    }
  } while (must_mark && !PageTable::mark_dirty(found));
  memory = found.memory;
  if (domain_->nested() && walk.run.last - walk.run.start >= os_page_bytes) {
    remember(walk.run);
  } else if (cached != nullptr) {
    if (cached->memory == nullptr) ++iotlb_live_;
    *cached = {.page = page, .memory = found.memory, .access = found.access, .dirty = must_mark};
  }
  return std::nullopt;
}

// Under the mutex. What is known of the first stage is used; the second stage is asked.
bool SimulatedDevice::translate_by_run(std::uint64_t page, Access access, std::byte*& memory) noexcept {
  for (const CachedRun& run : runs_) {
    if (run.entry_bytes == 0 || page < run.start || page > run.last || !includes(run.access, access)) continue;
    const Translation found = domain_->walk_parent(Iova{run.address + (page - run.start)});
    if (found.memory == nullptr || !includes(found.access, access)) return false;
    memory = found.memory;
    return true;
  }
  return false;
}

void SimulatedDevice::remember(const CachedRun& run) noexcept {
  if (iotlb_.empty()) return;
  CachedRun& slot = runs_[next_run_++ % cached_runs];
  if (slot.entry_bytes == 0) ++runs_live_;
  slot = run;
}

// Takes out whole entries; the rest of what a hint vouched for may stay, because hardware may hold it in any pieces.
void SimulatedDevice::drop_runs(IovaRange range) noexcept {
  for (CachedRun& run : runs_) {
    if (run.entry_bytes == 0 || run.last < range.start.value || run.start > range.last.value) continue;
    const std::uint64_t mask = run.entry_bytes - 1;
    const std::uint64_t first = std::max(run.start, range.start.value & ~mask);
    const std::uint64_t last = std::min(run.last, range.last.value | mask);
    CachedRun left = run, right = run;
    left.last = first - 1;
    right.start = last + 1;
    right.address = run.address + (right.start - run.start);
    const bool keep_left = first > run.start, keep_right = last < run.last;
    run.entry_bytes = 0;
    --runs_live_;
    if (keep_left) run = left, ++runs_live_;
    if (keep_right) remember(right);  // disjoint from `range`: seen again it stays
  }
}

// As an SMMUv3 words it: Arm IHI 0070, 7.3.
void SimulatedDevice::record_event(const DmaFault& fault) const noexcept {
  if (!virtual_id_ || domain_ == nullptr || domain_->events() == nullptr) return;
  std::uint64_t kind = 0;
  switch (stage_fault_) {
    case StageFault::translation: kind = 0x10; break;
    case StageFault::access_flag: kind = 0x12; break;
    case StageFault::permission: kind = 0x13; break;
    case StageFault::configuration: kind = 0x0a; break;
    default: return;  // the host's business, or nobody's
  }
  const std::shared_ptr<EventQueue> queue = domain_->events()->queue();
  if (queue == nullptr) return;
  EventQueue::Record record;
  record.evt[0] = kind | *virtual_id_ << 32;
  if (kind != 0x0a) {
    record.evt[1] = std::uint64_t{may_read(fault.access)} << 35 | std::uint64_t{2} << 40;
    record.evt[2] = fault.address.value;
  }
  queue->push(record);
}

bool SimulatedDevice::is_interrupt_address(std::uint64_t address) const noexcept {
  return std::any_of(options_.reserved.begin(), options_.reserved.end(), [address](const ReservedRegion& region) {
    return region.kind == ReservedKind::msi && region.range.contains(Iova{address});
  });
}

void SimulatedDevice::record(const DmaFault& fault) noexcept {
  if (faults_.size() < faults_kept) {
    faults_.push_back(fault);  // reserved in the constructor and in take_faults()
  } else {
    faults_[oldest_fault_] = fault;
    oldest_fault_ = (oldest_fault_ + 1) % faults_kept;
  }
  ++fault_count_;
}

std::vector<DmaFault> SimulatedDevice::take_faults() {
  std::vector<DmaFault> fresh;
  fresh.reserve(faults_kept);
  const std::lock_guard lock{mutex_};
  std::swap(fresh, faults_);
  std::rotate(fresh.begin(), fresh.begin() + static_cast<std::ptrdiff_t>(std::exchange(oldest_fault_, 0)), fresh.end());
  return fresh;
}

std::uint64_t SimulatedDevice::fault_count() const noexcept {
  const std::lock_guard lock{mutex_};
  return fault_count_;
}

IotlbStatistics SimulatedDevice::iotlb_statistics() const noexcept {
  const std::lock_guard lock{mutex_};
  return statistics_;
}

void SimulatedDevice::set_request_id(std::uint32_t id) noexcept {
  const std::lock_guard lock{mutex_};
  request_id_ = id;
}

void SimulatedDevice::set_virtual_id(std::optional<std::uint64_t> id) noexcept {
  const std::lock_guard lock{mutex_};
  virtual_id_ = id;
}

void SimulatedDevice::forget_context() noexcept {
  const std::lock_guard lock{mutex_};
  root_ = {};
}

void SimulatedDevice::set_domain(Domain* domain) noexcept {
  const std::lock_guard lock{mutex_};
  domain_ = domain;
  std::fill(iotlb_.begin(), iotlb_.end(), CachedTranslation{});
  iotlb_live_ = 0;
  tables_.fill({});
  tables_live_ = 0;
  runs_.fill({});
  runs_live_ = 0;
  root_ = {};
  may_hold_.store(false, std::memory_order_release);  // R.idle - pairs with A.idle in invalidate()
}

void SimulatedDevice::invalidate(IovaRange range, bool tables) noexcept {
  // A.idle - pairs with R.idle: seen idle, the device's last step happened before this.
  if (!may_hold_.load(std::memory_order_acquire)) return;
  const std::lock_guard lock{mutex_};
  ++statistics_.invalidations;
  const auto drop = [this](CachedTranslation& cached) {
    if (cached.memory == nullptr) return;
    cached = {};
    --iotlb_live_;
  };
  if (tables && tables_live_ != 0) {
    for (CachedTable& known : tables_) {
      if (known.table == nullptr || known.region < range.start.value >> 21 || known.region > range.last.value >> 21)
        continue;
      known = {};
      --tables_live_;
    }
  }
  if (runs_live_ != 0) drop_runs(range);
  const std::uint64_t first = base::align_down(range.start.value, os_page_bytes);
  if ((range.last.value - first) / os_page_bytes < iotlb_.size()) {
    for (std::uint64_t page = first;; page += os_page_bytes) {
      CachedTranslation& cached = iotlb_[(page / os_page_bytes) % iotlb_.size()];
      if (cached.page == page) drop(cached);
      if (range.last.value - page < os_page_bytes) break;
    }
  } else {
    for (CachedTranslation& cached : iotlb_) {
      if (cached.page >= first && cached.page <= range.last.value) drop(cached);
    }
  }
  if (holds_nothing()) may_hold_.store(false, std::memory_order_release);  // R.idle - for the next invalidation
}

}  // namespace iovane::backends::model
