// PaprTce's hypercalls: from a guest's TCEs to staged edits, and their answers.
#include "viommu/papr.hpp"

#include <algorithm>
#include <array>
#include <bit>

#include "viommu/papr_window.hpp"

namespace iovane::viommu {
namespace {

using namespace std::chrono_literals;
constexpr auto wait_slice = 1ms;
constexpr std::uint64_t list_alignment = 4096;

}  // namespace

PaprTce::PaprTce(const GuestMemory& memory, KvmTceHost* kvm) : memory_{memory}, reader_{memory}, kvm_{kvm} {}

PaprTce::~PaprTce() { finish(); }

void PaprTce::finish() noexcept {
  while (advance() == Progress::pending) wait(wait_slice);
}

PaprTce::Window* PaprTce::find_window(std::uint32_t liobn) noexcept {
  if (last_window_ != nullptr && last_window_->liobn == liobn) return last_window_->enabled() ? last_window_ : nullptr;
  for (const auto& phb : phbs_)
    for (Window& window : phb->windows)
      if (window.liobn == liobn && window.enabled()) return last_window_ = &window;
  return nullptr;
}

Progress PaprTce::call(std::uint64_t number, std::span<const std::uint64_t, 4> arguments) noexcept {
  ++stats_.hypercalls;
  answer_ = {};
  pending_ = nullptr;
  pending_window_ = nullptr;
  if (number != hcall::get_tce && number != hcall::put_tce && number != hcall::stuff_tce &&
      number != hcall::put_tce_indirect) {
    answer_.status = hcall::function;
    return Progress::done;
  }
  Window* window = arguments[0] <= 0xffff'ffff ? find_window(static_cast<std::uint32_t>(arguments[0])) : nullptr;
  if (window == nullptr) {
    ++stats_.refused;
    answer_.status = hcall::parameter;
    return Progress::done;
  }
  if (number == hcall::get_tce) {
    const auto index = window->index_of(arguments[1]);
    answer_.status = index ? hcall::success : hcall::parameter;
    if (index) answer_.value = window->load(*index);
    return Progress::done;
  }
  const auto view = reader_.view();
  switch (number) {
    case hcall::put_tce: answer_.status = put(view, *window, arguments[1], arguments[2]); break;
    case hcall::stuff_tce: answer_.status = stuff(view, *window, arguments[1], arguments[2], arguments[3]); break;
    default: answer_.status = put_list(view, *window, arguments[1], arguments[2], arguments[3]); break;
  }
  if (answer_.status != hcall::success) ++stats_.refused;
  pending_ = window->phb;
  return settle(pending_->shadow.commit());
}

// The batch of a hypercall has ended, or not yet; what a host refused reads as zero.
Progress PaprTce::settle(Progress progress) noexcept {
  if (progress == Progress::pending) return progress;
  for (const EditFailure& failure : pending_->shadow.failures()) {
    answer_.status = hcall::hardware;
    if (pending_window_ == nullptr) continue;
    for (std::uint64_t i = pending_first_; i < pending_first_ + pending_count_; ++i) {
      const std::uint64_t at = pending_window_->address + (i << pending_window_->page_shift);
      if ((pending_window_->load(i) & tce_access_bits) != 0 && !pending_->shadow.translate(at))
        pending_window_->store(i, 0);
    }
    static_cast<void>(failure);
    break;
  }
  if (pending_window_ != nullptr && pending_window_->kvm != nullptr)
    give_to_kernel(*pending_window_, pending_first_, pending_count_);
  pending_ = nullptr;
  return Progress::done;
}

// What an entry may say: a page of the window's size; of RAM when KVM has the table and hardware is behind it.
bool PaprTce::acceptable(const GuestMemory::View& view, const Window& window, std::uint64_t tce) noexcept {
  if ((tce & tce_access_bits) == 0) return true;
  if ((tce & window.page_mask() & ~std::uint64_t{0xfff}) != 0) return false;
  if (window.kvm == nullptr || window.phb->devices.empty()) return true;
  const std::uint64_t gpa = tce & ~window.page_mask();
  const Region* const region = view.find(gpa);
  return region != nullptr && region->last - gpa >= window.page_mask() &&
         !(region->read_only && may_write(static_cast<Access>(tce & tce_access_bits)));
}

// Entries that a hypercall changed here although KVM has the table: the hardware has them, and the kernel keeps the
// books.
void PaprTce::give_to_kernel(Window& window, std::uint64_t first, std::uint64_t count) noexcept {
  if (count == 0) return;
  const std::uint64_t start = window.address + (first << window.page_shift);
  const IovaRange range{Iova{start}, Iova{start + ((count << window.page_shift) - 1)}};
  for (const Phb::Device& device : window.phb->devices) kvm_->hand_to_kernel(*device.target, range);
  window.phb->shadow.abandon(range);
}

std::int64_t PaprTce::put(const GuestMemory::View& view, Window& window, std::uint64_t bus_address,
                          std::uint64_t tce) noexcept {
  const auto index = window.index_of(bus_address);
  if (!index || !acceptable(view, window, tce)) return hcall::parameter;
  window.store(*index, tce);
  ++stats_.entries_changed;
  pending_window_ = &window;
  pending_first_ = *index;
  pending_count_ = 1;
  const std::int64_t status = shadow(view, window, *index, 1, tce);
  if (status != hcall::success) window.store(*index, 0);
  return status;
}

std::int64_t PaprTce::put_list(const GuestMemory::View& view, Window& window, std::uint64_t bus_address,
                               std::uint64_t list, std::uint64_t count) noexcept {
  if (count > hcall::indirect_entries_max || (list & (list_alignment - 1)) != 0) return hcall::parameter;
  if (count == 0) return hcall::success;
  const std::uint64_t* words = view.table(list);
  const auto first = window.index_of(bus_address);
  if (words == nullptr || !first) return hcall::parameter;
  std::array<std::uint64_t, hcall::indirect_entries_max> tces;
  for (std::uint64_t i = 0; i < count; ++i) {
    tces[i] = GuestMemory::View::load(words + i);  // big endian, as a guest's hypercalls are
    if constexpr (std::endian::native == std::endian::little) tces[i] = __builtin_bswap64(tces[i]);
  }
  pending_window_ = &window;
  pending_first_ = *first;
  const DomainConfig& config = window.phb->shadow.config();
  const std::uint64_t page = window.page_mask() + 1;
  const std::uint64_t run_max = config.exact ? 1 : std::max<std::uint64_t>(1, config.merge_bytes_max.value / page);
  std::int64_t status = hcall::success;
  std::uint64_t done = 0;
  while (done < count && status == hcall::success) {
    const std::uint64_t tce = tces[done];
    const std::uint64_t access = tce & tce_access_bits;
    if (*first + done >= window.entries || !acceptable(view, window, tce)) {
      status = hcall::parameter;
      break;
    }
    // A run: entries of equal rights whose memory follows on, or entries without any.
    std::uint64_t run = 1;
    while (done + run < count && *first + done + run < window.entries && run < run_max &&
           (access == 0 ? (tces[done + run] & tce_access_bits) == 0 : tces[done + run] == tce + run * page) &&
           acceptable(view, window, tces[done + run]))
      ++run;
    for (std::uint64_t i = 0; i < run; ++i) window.store(*first + done + i, tces[done + i]);
    status = shadow(view, window, *first + done, run, tce);
    if (status != hcall::success)
      for (std::uint64_t i = 0; i < run; ++i) window.store(*first + done + i, 0);
    done += run;
  }
  pending_count_ = done;
  stats_.entries_changed += done;
  return status;
}

std::int64_t PaprTce::stuff(const GuestMemory::View& view, Window& window, std::uint64_t bus_address, std::uint64_t tce,
                            std::uint64_t count) noexcept {
  if (count > window.entries) return hcall::parameter;
  if (count == 0) return hcall::success;
  const auto first = window.index_of(bus_address);
  if (!first) return hcall::parameter;
  const bool clears = (tce & tce_access_bits) == 0;
  // Writing one live page over and over has no use; its work is bounded as H_PUT_TCE_INDIRECT's.
  if (!clears && (count > hcall::indirect_entries_max || !acceptable(view, window, tce))) return hcall::parameter;
  const std::uint64_t inside = std::min(count, window.entries - *first);
  pending_window_ = &window;
  pending_first_ = *first;
  pending_count_ = inside;
  stats_.entries_changed += inside;
  std::int64_t status = hcall::success;
  if (clears) {
    for (std::uint64_t i = 0; i < inside; ++i)
      if (tce != 0 || window.load(*first + i) != 0) window.store(*first + i, tce);  // untouched pages stay so
    status = shadow(view, window, *first, inside, 0);
  } else {
    for (std::uint64_t i = 0; i < inside && status == hcall::success; ++i) {
      window.store(*first + i, tce);
      status = shadow(view, window, *first + i, 1, tce);
      if (status != hcall::success) window.store(*first + i, 0);
    }
  }
  return status == hcall::success && inside != count ? hcall::parameter : status;
}

// Stages `count` equal-access entries from `first`, contiguous in memory, of which `tce` is the first.
std::int64_t PaprTce::shadow(const GuestMemory::View& view, Window& window, std::uint64_t first, std::uint64_t count,
                             std::uint64_t tce) noexcept {
  const std::uint64_t start = window.address + (first << window.page_shift);
  const IovaRange range{Iova{start}, Iova{start + ((count << window.page_shift) - 1)}};
  ShadowDomain& domain = window.phb->shadow;
  const auto access = static_cast<Access>(tce & tce_access_bits);
  const auto tag = static_cast<std::uint32_t>(first);
  if (access == Access::none && window.kvm != nullptr) {
    for (const Phb::Device& device : window.phb->devices)
      if (!kvm_->clear(*device.target, range)) return hcall::hardware;
    return hcall::success;
  }
  if (access == Access::none) {
    if (domain.unmap_granule(range, CutRule::cut, tag)) return hcall::success;
    return domain.unmap(view, range, CutRule::cut, tag) ? hcall::success : hcall::hardware;
  }
  const std::uint64_t gpa = tce & ~window.page_mask();
  if (domain.map_granule(view, range, gpa, access, tag)) return hcall::success;
  return domain.assign(view, range, gpa, access, tag) ? hcall::success : hcall::hardware;
}

Progress PaprTce::advance() noexcept {
  if (pending_ == nullptr) return Progress::done;
  return settle(pending_->shadow.poll());
}

void PaprTce::wait(std::chrono::nanoseconds timeout) noexcept {
  if (pending_ != nullptr) pending_->shadow.wait(timeout);
}

PaprTce::Answer PaprTce::call_and_wait(std::uint64_t number, std::span<const std::uint64_t, 4> arguments) noexcept {
  Progress progress = call(number, arguments);
  while (progress == Progress::pending) {
    wait(wait_slice);
    progress = advance();
  }
  return answer_;
}

PaprTce::Translation PaprTce::translate(std::uint32_t liobn, std::uint64_t bus_address) const noexcept {
  for (const auto& phb : phbs_)
    for (const Window& window : phb->windows) {
      if (window.liobn != liobn || !window.enabled()) continue;
      const auto index = window.index_of(bus_address);
      if (!index) return {};
      const std::uint64_t tce = window.load(*index);
      return {(tce & ~window.page_mask()) | (bus_address & window.page_mask()),
              static_cast<Access>(tce & tce_access_bits), window.page_mask()};
    }
  return {};
}

}  // namespace iovane::viommu
