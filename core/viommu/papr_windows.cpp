// PaprTce's host bridges: their windows, where each window's table lives, and the devices that come and go.
#include <algorithm>
#include <array>
#include <new>

#include "base/error_text.hpp"
#include "viommu/papr.hpp"
#include "viommu/papr_window.hpp"

namespace iovane::viommu {
namespace {

std::uint32_t lopar_page_sizes(std::uint64_t sizes) noexcept {
  constexpr std::array<std::pair<unsigned, std::uint32_t>, 9> codes{
      {{12, 0x01}, {16, 0x02}, {24, 0x04}, {25, 0x08}, {26, 0x10}, {27, 0x20}, {28, 0x40}, {34, 0x80}, {21, 0x100}}};
  std::uint32_t out = 0;
  for (const auto& [shift, code] : codes)
    if ((sizes >> shift & 1U) != 0) out |= code;
  return out;
}

}  // namespace

PaprTce::Phb* PaprTce::find_phb(std::uint64_t buid) noexcept {
  for (const auto& phb : phbs_)
    if (phb->config.buid == buid) return phb.get();
  return nullptr;
}

const PaprTce::Phb* PaprTce::find_phb(std::uint64_t buid) const noexcept {
  return const_cast<PaprTce*>(this)->find_phb(buid);
}

Result<void> PaprTce::add_phb(const PhbConfig& config) {
  using base::fail;
  if (find_phb(config.buid) != nullptr)
    return fail(Errc::busy, Stage::validate, 0, "PAPR: buid {:#x} is there already", config.buid);
  for (const auto& phb : phbs_)
    if (phb->config.liobn <= config.liobn + 1 && config.liobn <= phb->config.liobn + 1)
      return fail(Errc::busy, Stage::validate, 0, "PAPR: liobn {:#x} or the next one is taken", config.liobn);
  if (config.page_sizes == 0 || (config.page_sizes & 0xfff) != 0 || (config.dma32_bytes & 0xfff) != 0 ||
      config.dma32_bytes == 0)
    return fail(Errc::invalid_argument, Stage::validate, 0,
                "PAPR: buid {:#x}: needs page sizes from 4 KiB and a default window of whole pages", config.buid);
  DomainConfig domain = config.domain;
  domain.name = fmt::format("PHB {:#x}", config.buid);
  domain.granule_shift = 12;
  domain.address_bits = 64;
  auto phb = std::make_unique<Phb>(config, domain);
  for (std::uint32_t i = 0; i < phb->windows.size(); ++i) {
    phb->windows[i].liobn = config.liobn + i;
    phb->windows[i].phb = phb.get();
  }
  if (!enable(*phb, phb->windows[0], 12, config.dma32_address, config.dma32_bytes >> 12))
    return fail(Errc::out_of_memory, Stage::reserve, 0, "PAPR: buid {:#x}: no memory for its default window's table",
                config.buid);
  phbs_.push_back(std::move(phb));
  return {};
}

bool PaprTce::enable(Phb& phb, Window& window, std::uint32_t page_shift, std::uint64_t address, std::uint64_t entries) {
  auto table = UserTable::make(entries);
  if (!table) return false;
  window.page_shift = page_shift;
  window.address = address;
  window.entries = entries;
  window.user = std::move(*table);
  window.table = window.user.entries();
  static_cast<void>(place(phb, window));  // stays in userspace if KVM does not want it
  return true;
}

void PaprTce::disable(Phb& phb, Window& window) noexcept {
  if (!window.enabled()) return;
  const auto view = memory_.view();
  static_cast<void>(phb.shadow.unmap(view, window.range(), CutRule::cut));
  phb.shadow.commit_and_wait();
  if (window.kvm != nullptr)  // what KVM made, the shadow does not know
    for (const Phb::Device& device : phb.devices) static_cast<void>(kvm_->clear(*device.target, window.range()));
  window.table = {};
  window.kvm.reset();
  window.user = {};
  if (last_window_ == &window) last_window_ = nullptr;
}

// Puts a window's table where it can be now.
Result<void> PaprTce::place(Phb& phb, Window& window) {
  if (kvm_ == nullptr || !window.enabled()) return {};
  const bool possible = std::all_of(phb.devices.begin(), phb.devices.end(),
                                    [&](const Phb::Device& d) { return kvm_->can_couple(*d.target); });
  if (possible == (window.kvm != nullptr)) return {};
  return possible ? to_kvm(phb, window) : to_user(phb, window);
}

// Order: the kernel's table has every entry, then the host groups are coupled, then the shadow lets go. Devices never
// see a difference, because the hardware's entries stay.
Result<void> PaprTce::to_kvm(Phb& phb, Window& window) {
  auto made = kvm_->create(window);
  if (!made) return made.error();
  const std::span<std::uint64_t> entries = (*made)->entries();
  for (std::uint64_t i = 0; i < window.entries; ++i)
    if (const std::uint64_t tce = window.load(i); tce != 0)
      __atomic_store_n(&entries[i], tce, __ATOMIC_RELAXED);  // relaxed: coupling orders it
  for (const Phb::Device& device : phb.devices)
    if (auto coupled = (*made)->couple(*device.target); !coupled)
      return coupled;  // the new table closes; nothing changed
  for (const Phb::Device& device : phb.devices) kvm_->hand_to_kernel(*device.target, window.range());
  phb.shadow.abandon(window.range());
  window.kvm = std::move(*made);
  window.table = entries;
  window.user = {};
  ++stats_.moves_to_kvm;
  return {};
}

// Order: copy, close (hypercalls come here from now on), shadow every entry. On a host address space whose hardware
// has the entry already, that writes the same entry again.
Result<void> PaprTce::to_user(Phb& phb, Window& window) {
  auto table = UserTable::make(window.entries);
  if (!table)
    return base::fail(Errc::out_of_memory, Stage::reserve, 0, "PAPR: liobn {:#x}: no memory for its table",
                      window.liobn);
  for (std::uint64_t i = 0; i < window.entries; ++i)
    if (const std::uint64_t tce = window.load(i); tce != 0) table->entries()[i] = tce;
  window.user = std::move(*table);
  window.table = window.user.entries();
  window.kvm.reset();
  ++stats_.moves_to_user;
  const auto view = memory_.view();
  bool failed = false;
  for (std::uint64_t i = 0; i < window.entries; ++i)
    if ((window.load(i) & tce_access_bits) != 0) failed = shadow(view, window, i, 1, window.load(i)) != 0 || failed;
  phb.shadow.commit_and_wait();
  if (!phb.shadow.failures().empty()) return phb.shadow.failures().front().error;
  if (failed)
    return base::fail(Errc::limit_reached, Stage::map, 0, "PAPR: liobn {:#x}: not every entry could be shadowed",
                      window.liobn);
  return {};
}

Result<void> PaprTce::add_device(std::uint64_t buid, ShadowTarget* target) {
  Phb* phb = find_phb(buid);
  if (phb == nullptr) return base::fail(Errc::not_found, Stage::attach, 0, "PAPR: no PHB with buid {:#x}", buid);
  if (target == nullptr) return {};
  finish();
  for (Phb::Device& device : phb->devices)
    if (device.target == target) {
      ++device.count;
      return {};
    }
  const auto view = memory_.view();
  if (auto attached = phb->shadow.attach(view, *target); !attached) return attached;
  phb->devices.push_back({target, 1});
  Result<void> outcome;
  for (Window& window : phb->windows) {
    if (!outcome || !window.enabled()) continue;
    if (window.kvm != nullptr && kvm_->can_couple(*target)) {
      // Its hardware table is empty: have the kernel see every entry again after coupling.
      outcome = to_user(*phb, window);
    }
    if (outcome) outcome = place(*phb, window);
  }
  if (!outcome) static_cast<void>(remove_device(buid, target));
  return outcome;
}

Result<void> PaprTce::remove_device(std::uint64_t buid, ShadowTarget* target) {
  Phb* phb = find_phb(buid);
  if (phb == nullptr) return base::fail(Errc::not_found, Stage::detach, 0, "PAPR: no PHB with buid {:#x}", buid);
  if (target == nullptr) return {};
  finish();
  const auto place_of =
      std::find_if(phb->devices.begin(), phb->devices.end(), [&](const Phb::Device& d) { return d.target == target; });
  if (place_of == phb->devices.end())
    return base::fail(Errc::not_found, Stage::detach, 0, "PAPR: {} is not behind buid {:#x}", target->name(), buid);
  if (--place_of->count != 0) return {};
  // What KVM put into its hardware table comes back to us first, or nobody could take it out.
  Result<void> outcome;
  for (Window& window : phb->windows)
    if (window.kvm != nullptr)
      if (auto moved = to_user(*phb, window); !moved) outcome = moved;
  phb->devices.erase(place_of);
  if (auto left = phb->shadow.detach(*target); !left) outcome = left;
  for (Window& window : phb->windows)
    if (auto placed = place(*phb, window); !placed && outcome) outcome = placed;
  return outcome;
}

PaprTce::WindowQuery PaprTce::query_window(std::uint64_t buid) const noexcept {
  const Phb* phb = find_phb(buid);
  if (phb == nullptr || !phb->config.dynamic_windows) return {};
  const auto active = static_cast<std::uint32_t>(
      std::count_if(phb->windows.begin(), phb->windows.end(), [](const Window& w) { return w.enabled(); }));
  return {rtas::success, static_cast<std::uint32_t>(phb->windows.size()) - active,
          static_cast<std::uint32_t>(std::min<std::uint64_t>(phb->config.window_entries_max, 0xffff'ffff)),
          lopar_page_sizes(phb->config.page_sizes)};
}

PaprTce::WindowMade PaprTce::create_window(std::uint64_t buid, std::uint32_t page_shift,
                                           std::uint32_t window_shift) noexcept {
  Phb* phb = find_phb(buid);
  if (phb == nullptr || !phb->config.dynamic_windows || page_shift >= 64 || window_shift >= 64 ||
      (phb->config.page_sizes >> page_shift & 1U) == 0 || window_shift < page_shift)
    return {};
  const bool none = !phb->windows[0].enabled() && !phb->windows[1].enabled();
  const auto free =
      std::find_if(phb->windows.begin(), phb->windows.end(), [](const Window& w) { return !w.enabled(); });
  const std::uint64_t entries = std::uint64_t{1} << (window_shift - page_shift);
  const std::uint64_t address = none ? phb->config.dma32_address : phb->config.dma64_address;
  const IovaRange range{Iova{address}, Iova{address + ((std::uint64_t{1} << window_shift) - 1)}};
  bool collides = range.last < range.start;
  for (const Window& window : phb->windows) collides = collides || (window.enabled() && window.range().overlaps(range));
  if (free == phb->windows.end() || collides || entries > phb->config.window_entries_max ||
      entries > phb->config.table_bytes_max / 8)
    return {rtas::hardware_error, 0, 0};
  try {
    if (!enable(*phb, *free, page_shift, address, entries)) return {rtas::hardware_error, 0, 0};
  } catch (const std::bad_alloc&) {
    return {rtas::hardware_error, 0, 0};
  }
  return {rtas::success, free->liobn, address};
}

std::int32_t PaprTce::remove_window(std::uint32_t liobn) noexcept {
  finish();
  Window* window = find_window(liobn);
  if (window == nullptr || !window->phb->config.dynamic_windows) return rtas::parameter_error;
  try {
    // What KVM put into hardware tables comes back first, or nobody could take it out.
    if (window->kvm != nullptr && !to_user(*window->phb, *window)) return rtas::hardware_error;
  } catch (const std::bad_alloc&) {
    return rtas::hardware_error;
  }
  disable(*window->phb, *window);
  return rtas::success;
}

std::int32_t PaprTce::reset_windows(std::uint64_t buid) noexcept {
  finish();
  Phb* phb = find_phb(buid);
  if (phb == nullptr || !phb->config.dynamic_windows) return rtas::parameter_error;
  try {
    return to_default(*phb) ? rtas::success : rtas::hardware_error;
  } catch (const std::bad_alloc&) {
    return rtas::hardware_error;
  }
}

Result<void> PaprTce::clear_windows(Phb& phb) {
  for (Window& window : phb.windows) {
    // What KVM put into hardware tables comes back first, or nobody could take it out.
    if (window.kvm != nullptr)
      if (auto moved = to_user(phb, window); !moved) return moved;
    disable(phb, window);
  }
  return {};
}

Result<void> PaprTce::to_default(Phb& phb) {
  if (auto cleared = clear_windows(phb); !cleared) return cleared;
  if (enable(phb, phb.windows[0], 12, phb.config.dma32_address, phb.config.dma32_bytes >> 12)) return {};
  return base::fail(Errc::out_of_memory, Stage::reserve, 0,
                    "PAPR: buid {:#x}: no memory for its default window's table", phb.config.buid);
}

Result<void> PaprTce::memory_added() noexcept {
  finish();
  const auto view = memory_.view();
  Result<void> outcome;
  for (const auto& phb : phbs_)
    if (const auto done = phb->shadow.commit_after(phb->shadow.refresh_backing(view)); outcome) outcome = done;
  return outcome;
}

Result<void> PaprTce::memory_removing(const Region& region) noexcept {
  finish();
  Result<void> outcome;
  for (const auto& phb : phbs_)
    if (const auto done = phb->shadow.commit_after(phb->shadow.withdraw_region(region)); outcome) outcome = done;
  return outcome;
}

bool PaprTce::in_kvm(std::uint32_t liobn) const noexcept {
  const Window* window = const_cast<PaprTce*>(this)->find_window(liobn);
  return window != nullptr && window->kvm != nullptr;
}

const ShadowDomain* PaprTce::domain(std::uint64_t buid) const noexcept {
  const Phb* phb = find_phb(buid);
  return phb == nullptr ? nullptr : &phb->shadow;
}

}  // namespace iovane::viommu
