#include "backends/model/simulated_device.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

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
    result.fault = fault;
    break;
  }
  return result;
}

// Under the mutex. On success `memory` stays usable until the mutex is let go.
std::optional<FaultReason> SimulatedDevice::translate(std::uint64_t page, Access access, std::byte*& memory) noexcept {
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
  ++statistics_.misses;
  // relaxed: published by the RMW below. Once announced, an invalidation waits for the mutex; no second RMW needed.
  if (!may_hold_.load(std::memory_order_relaxed)) {
    may_hold_.store(true, std::memory_order_relaxed);
    domain_->enter_walk();
  }
  Translation found;
  CachedTable& known = tables_[(page >> 21) % cached_tables];
  do {  // again only when the writer changed the entry in between; it changes each entry a bounded number of times
    const std::byte* table = known.region == page >> 21 ? known.table : nullptr;
    found = domain_->walk(Iova{page}, table);
    if (table != nullptr) {
      if (known.table == nullptr) ++tables_live_;
      known = {page >> 21, table};
    }
    if (found.memory == nullptr) return FaultReason::not_present;
    if (!includes(found.access, access)) return FaultReason::no_permission;
  } while (must_mark && !PageTable::mark_dirty(found));
  memory = found.memory;
  if (cached != nullptr) {
    if (cached->memory == nullptr) ++iotlb_live_;
    *cached = {.page = page, .memory = found.memory, .access = found.access, .dirty = must_mark};
  }
  return std::nullopt;
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

void SimulatedDevice::set_domain(Domain* domain) noexcept {
  const std::lock_guard lock{mutex_};
  domain_ = domain;
  std::fill(iotlb_.begin(), iotlb_.end(), CachedTranslation{});
  iotlb_live_ = 0;
  tables_.fill({});
  tables_live_ = 0;
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
