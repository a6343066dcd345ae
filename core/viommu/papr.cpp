#include "viommu/papr.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <new>

#include "base/error_text.hpp"
#include "viommu/papr_window.hpp"

namespace iovane::viommu {
namespace {

using namespace std::chrono_literals;
constexpr auto wait_slice = 1ms;
constexpr std::uint64_t access_bits = 3;
constexpr std::uint64_t list_alignment = 4096;

std::uint32_t lopar_page_sizes(std::uint64_t sizes) noexcept {
  constexpr std::array<std::pair<unsigned, std::uint32_t>, 9> codes{
      {{12, 0x01}, {16, 0x02}, {24, 0x04}, {25, 0x08}, {26, 0x10}, {27, 0x20}, {28, 0x40}, {34, 0x80}, {21, 0x100}}};
  std::uint32_t out = 0;
  for (const auto& [shift, code] : codes)
    if ((sizes >> shift & 1U) != 0) out |= code;
  return out;
}

}  // namespace

PaprTce::PaprTce(const GuestMemory& memory, KvmTceHost* kvm) : memory_{memory}, kvm_{kvm} {}

PaprTce::~PaprTce() { finish(); }

void PaprTce::finish() noexcept {
  while (advance() == Progress::pending) wait(wait_slice);
}

PaprTce::Phb* PaprTce::find_phb(std::uint64_t buid) noexcept {
  for (const auto& phb : phbs_)
    if (phb->config.buid == buid) return phb.get();
  return nullptr;
}

const PaprTce::Phb* PaprTce::find_phb(std::uint64_t buid) const noexcept {
  return const_cast<PaprTce*>(this)->find_phb(buid);
}

PaprTce::Window* PaprTce::find_window(std::uint32_t liobn) noexcept {
  if (last_window_ != nullptr && last_window_->liobn == liobn) return last_window_->enabled() ? last_window_ : nullptr;
  for (const auto& phb : phbs_)
    for (Window& window : phb->windows)
      if (window.liobn == liobn && window.enabled()) return last_window_ = &window;
  return nullptr;
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
    if ((window.load(i) & access_bits) != 0) failed = shadow(view, window, i, 1, window.load(i)) != 0 || failed;
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

// Stages `count` equal-access entries from `first`, contiguous in memory, of which `tce` is the first.
std::int64_t PaprTce::shadow(const GuestMemory::View& view, Window& window, std::uint64_t first, std::uint64_t count,
                             std::uint64_t tce) noexcept {
  const std::uint64_t start = window.address + (first << window.page_shift);
  const IovaRange range{Iova{start}, Iova{start + ((count << window.page_shift) - 1)}};
  ShadowDomain& domain = window.phb->shadow;
  const auto access = static_cast<Access>(tce & access_bits);
  const auto tag = static_cast<std::uint32_t>(first);
  if (access == Access::none && window.kvm != nullptr) {
    for (const Phb::Device& device : window.phb->devices)
      if (!kvm_->clear(*device.target, range)) return hcall::hardware;
    return hcall::success;
  }
  if (access == Access::none) return domain.unmap(view, range, CutRule::cut, tag) ? hcall::success : hcall::hardware;
  return domain.assign(view, range, tce & ~window.page_mask(), access, tag) ? hcall::success : hcall::hardware;
}

// What an entry may say: a page of the window's size; of RAM when KVM has the table and hardware is behind it.
bool PaprTce::acceptable(const GuestMemory::View& view, const Window& window, std::uint64_t tce) noexcept {
  if ((tce & access_bits) == 0) return true;
  if ((tce & window.page_mask() & ~std::uint64_t{0xfff}) != 0) return false;
  if (window.kvm == nullptr || window.phb->devices.empty()) return true;
  const std::uint64_t gpa = tce & ~window.page_mask();
  const Region* const region = view.find(gpa);
  return region != nullptr && region->last - gpa >= window.page_mask() &&
         !(region->read_only && may_write(static_cast<Access>(tce & access_bits)));
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
    const std::uint64_t access = tce & access_bits;
    if (*first + done >= window.entries || !acceptable(view, window, tce)) {
      status = hcall::parameter;
      break;
    }
    // A run: entries of equal rights whose memory follows on, or entries without any.
    std::uint64_t run = 1;
    while (done + run < count && *first + done + run < window.entries && run < run_max &&
           (access == 0 ? (tces[done + run] & access_bits) == 0 : tces[done + run] == tce + run * page) &&
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
  const bool clears = (tce & access_bits) == 0;
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
  const auto view = memory_.view();
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
      if ((pending_window_->load(i) & access_bits) != 0 && !pending_->shadow.translate(at))
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

PaprTce::Translation PaprTce::translate(std::uint32_t liobn, std::uint64_t bus_address) const noexcept {
  for (const auto& phb : phbs_)
    for (const Window& window : phb->windows) {
      if (window.liobn != liobn || !window.enabled()) continue;
      const auto index = window.index_of(bus_address);
      if (!index) return {};
      const std::uint64_t tce = window.load(*index);
      return {(tce & ~window.page_mask()) | (bus_address & window.page_mask()), static_cast<Access>(tce & access_bits),
              window.page_mask()};
    }
  return {};
}

Progress PaprTce::memory_added() noexcept {
  finish();
  const auto view = memory_.view();
  for (const auto& phb : phbs_) {
    static_cast<void>(phb->shadow.refresh_backing(view));
    phb->shadow.commit_and_wait();
  }
  return Progress::done;
}

Progress PaprTce::memory_removing(const Region& region) noexcept {
  finish();
  for (const auto& phb : phbs_) {
    static_cast<void>(phb->shadow.withdraw_region(region));
    phb->shadow.commit_and_wait();
  }
  return Progress::done;
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
