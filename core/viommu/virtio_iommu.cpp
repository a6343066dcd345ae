// VirtioIommu's queue: requests come in, are started in the order that their domains allow, and are answered.
#include "viommu/virtio_iommu.hpp"

#include <algorithm>
#include <bit>

#include "viommu/virtio_iommu_domain.hpp"

namespace iovane::viommu {
namespace {

using namespace std::chrono_literals;
using virtio::put;
using virtio::Status;
constexpr auto wait_slice = 1ms;

}  // namespace

VirtioIommu::VirtioIommu(const GuestMemory& memory, VirtioIommuConfig config)
    : memory_{memory},
      reader_{memory},
      config_{std::move(config)},
      granule_{config_.page_size_mask & -config_.page_size_mask},
      bypass_config_{config_.bypass_at_boot} {
  granule_ = std::clamp<std::uint64_t>(granule_, 4096, 1U << 28);
  config_.page_size_mask = (config_.page_size_mask & -granule_) | granule_;
  config_.domain.granule_shift = static_cast<unsigned>(std::countr_zero(granule_));
  config_.domain.address_bits =
      std::max(config_.domain.granule_shift + 1, static_cast<unsigned>(std::bit_width(config_.input_range.last.value)));
  slots_.resize(config_.requests_max);
  dirty_.reserve(config_.domains_max + std::size_t{1});
}

VirtioIommu::~VirtioIommu() { finish(); }

std::uint64_t VirtioIommu::features() const noexcept {
  using namespace virtio;
  return feature_input_range | feature_domain_range | feature_map_unmap | feature_probe | feature_bypass_config |
         (config_.mmio ? feature_mmio : 0);
}

std::array<std::byte, virtio::config_bytes> VirtioIommu::config_space() const noexcept {
  std::array<std::byte, virtio::config_bytes> out{};
  put(out.data(), config_.page_size_mask);
  put(out.data() + 8, config_.input_range.start.value);
  put(out.data() + 16, config_.input_range.last.value);
  put(out.data() + 24, config_.domain_first);
  put(out.data() + 28, config_.domain_last);
  put(out.data() + 32, config_.probe_size);
  out[36] = static_cast<std::byte>(bypass_config_ ? 1 : 0);
  return out;
}

Result<void> VirtioIommu::reset() {
  finish();
  count_ = next_ = open_ = taken_ = 0;
  features_ = 0;
  bypass_config_ = config_.bypass_at_boot;
  Result<void> outcome;
  for (const auto& endpoint : endpoints_) {
    if (endpoint->domain != bypass_.get())
      if (auto left = leave(*endpoint); !left) outcome = left;
    if (auto settled = settle(*endpoint); !settled) outcome = settled;
  }
  last_domain_ = nullptr;
  domains_.clear();
  return outcome;
}

std::size_t VirtioIommu::handle(std::span<const Request> requests) noexcept {
  if (taken_ == count_) count_ = next_ = open_ = taken_ = 0;
  const std::size_t n = std::min(slots_.size() - count_, requests.size());
  std::size_t i = 0;
  if (next_ == count_) i = start_common(requests.first(n));
  for (; i < n; ++i) {
    Slot& slot = slots_[count_++];
    slot.request = requests[i];
    slot.state = Slot::State::fresh;
  }
  static_cast<void>(advance());
  return n;
}

Progress VirtioIommu::advance() noexcept {
  for (;;) {
    const bool ended = !dirty_.empty() && commit_domains();
    const bool began = next_ < count_ && start_requests();
    if (dirty_.empty() && open_ == count_) return Progress::done;
    if (!ended && !began) return Progress::pending;
  }
}

// Starts what need not wait for what is before it. False: nothing could.
bool VirtioIommu::start_requests() noexcept {
  const auto view = reader_.view();
  bool any = false;
  bool passed_held = false;
  Slot* const slots = slots_.data();
  for (std::size_t i = next_; i < count_; ++i) {
    Slot& slot = slots[i];
    if (slot.state <= Slot::State::held) {
      if (slot.state == Slot::State::fresh) copy_request(slot);
      if (!start(view, slot, static_cast<std::uint32_t>(i))) break;
      any = any || slot.state != Slot::State::held;
    }
    passed_held = passed_held || slot.state == Slot::State::held;
    if (!passed_held) next_ = i + 1;
    if (i == open_ && slot.state >= Slot::State::answered) ++open_;
  }
  return any;
}

inline void VirtioIommu::copy_request(Slot& slot) noexcept {
  ++stats_.requests;
  slot.bytes[0] = std::byte{0};  // no request type; start() reads no more than it was given
  copy_from_guest(slot.bytes.data(), slot.request.readable.data(),
                  std::min(slot.request.readable.size(), slot.bytes.size()));
  slot.state = Slot::State::held;
}

// Every domain with staged edits gets its batch; where one has ended, its requests are answered. False: none has.
bool VirtioIommu::commit_domains() noexcept {
  const std::size_t before = dirty_.size();
  std::size_t pending = 0;
  for (Domain* domain : dirty_) {
    if (domain->shadow.commit() == Progress::pending) {
      dirty_[pending++] = domain;
      continue;
    }
    domain->dirty = false;
    ++stats_.batches;
    for (const EditFailure& failure : domain->shadow.failures())
      if (failure.tag < count_ && slots_[failure.tag].status == Status::ok)
        slots_[failure.tag].status = status_of(failure.error);
  }
  dirty_.resize(pending);
  if (pending == before) return false;
  Slot* const stop = slots_.data() + count_;
  for (Slot* slot = slots_.data() + open_; slot != stop; ++slot)
    if (slot->state == Slot::State::staged && !slot->domain->dirty) answer(*slot, slot->status);
  Slot* open = slots_.data() + open_;
  while (open != stop && open->state >= Slot::State::answered) ++open;
  open_ = static_cast<std::size_t>(open - slots_.data());
  return true;
}

void VirtioIommu::answer(Slot& slot, Status status) noexcept {
  std::byte* const at = slot.request.writable.data() + (slot.request.writable.size() - virtio::tail_bytes);
  if ((reinterpret_cast<std::uintptr_t>(at) & 3U) == 0) [[likely]] {
    auto tail = static_cast<std::uint32_t>(status);  // its lowest byte first
    if constexpr (std::endian::native == std::endian::big) tail = __builtin_bswap32(tail);
    __atomic_store_n(reinterpret_cast<std::uint32_t*>(at), tail, __ATOMIC_RELAXED);
  } else {
    const std::array<std::byte, virtio::tail_bytes> tail{static_cast<std::byte>(status)};
    copy_to_guest(at, tail.data(), tail.size());
  }
  slot.written = static_cast<std::uint32_t>(slot.request.writable.size());
  slot.state = Slot::State::answered;
  if (status != Status::ok) ++stats_.refused;
}

std::size_t VirtioIommu::take_answers(std::span<Answer> out) noexcept {
  std::size_t n = 0;
  bool all_before = true;  // are taken
  Slot* const stop = slots_.data() + count_;
  Slot* taken = slots_.data() + taken_;
  for (Slot* slot = taken; n < out.size() && slot != stop; ++slot) {
    if (slot->state == Slot::State::answered) {
      out[n++] = {slot->request.cookie, slot->written};
      slot->state = Slot::State::taken;
    }
    all_before = all_before && slot->state == Slot::State::taken;
    if (all_before) taken = slot + 1;
  }
  taken_ = static_cast<std::size_t>(taken - slots_.data());
  return n;
}

void VirtioIommu::wait(std::chrono::nanoseconds timeout) noexcept {
  for (Domain* domain : dirty_)
    if (domain->shadow.in_flight()) return domain->shadow.wait(timeout);
}

void VirtioIommu::finish() noexcept {
  while (advance() == Progress::pending) wait(wait_slice);
}

std::array<std::byte, virtio::fault_bytes> VirtioIommu::fault_record(virtio::FaultReason reason, std::uint32_t endpoint,
                                                                     std::uint64_t iova, bool write) noexcept {
  std::array<std::byte, virtio::fault_bytes> out{};
  out[0] = static_cast<std::byte>(reason);
  put(out.data() + 4, virtio::fault_address | (write ? virtio::fault_write : virtio::fault_read));
  put(out.data() + 8, endpoint);
  put(out.data() + 16, iova);
  return out;
}

}  // namespace iovane::viommu
