#include "backends/model/spapr.hpp"

#include <algorithm>
#include <bit>
#include <mutex>
#include <new>
#include <utility>

#include "backends/model/argument.hpp"
#include "base/checked_math.hpp"

namespace iovane::backends::model {

namespace vfio = uapi::vfio;

namespace {
constexpr int would_crash = -ENOTRECOVERABLE;
constexpr long bad_parameter = 1;  // the kernel's parameter check answers "true"
constexpr std::size_t info_bytes_v1 = IOVANE_UP_TO(vfio::SpaprTceInfo, dma32_window_size);
}  // namespace

long SpaprContainerFile::ioctl(unsigned long request, std::uint64_t argument) noexcept {
  switch (request) {
    case vfio::get_api_version: return vfio::api_version;
    case vfio::check_extension: return check_extension(argument);
    case vfio::set_iommu: return set_iommu(argument);
    default: break;
  }
  if (!has_driver()) return -EINVAL;
  const bool v2 = driver_ == Driver::v2;
  switch (request) {
    case vfio::Type1DmaMap::request: return map(argument);
    case vfio::Type1DmaUnmap::request: return unmap(argument);
    case vfio::SpaprTceInfo::request: return info(argument);
    case vfio::SpaprRegisterMemory::request: return v2 ? register_memory(argument) : -ENOTTY;
    case vfio::SpaprRegisterMemory::unregister_request: return v2 ? unregister_memory(argument) : -ENOTTY;
    case vfio::spapr_enable: return v2 ? -ENOTTY : enable();
    case vfio::spapr_disable: return v2 ? -ENOTTY : disable();
    case vfio::SpaprTceCreate::request: return v2 ? create(argument) : -ENOTTY;
    case vfio::SpaprTceRemove::request: return v2 ? remove(argument) : -ENOTTY;
    case vfio::EehPeOp::request: return eeh(argument);
    default: return -ENOTTY;
  }
}

bool SpaprContainerFile::enabled() const noexcept {
  const std::shared_lock lock{mutex_};
  return enabled_;
}

bool SpaprContainerFile::has_driver() const noexcept {
  const std::shared_lock lock{mutex_};
  return driver_ != Driver::none;
}

long SpaprContainerFile::check_extension(std::uint64_t extension) const noexcept {
  switch (extension) {
    case vfio::spapr_tce_iommu:
    case vfio::spapr_tce_v2_iommu: return 1;
    case vfio::eeh: return platform().eeh ? 1 : 0;
    default: return 0;
  }
}

long SpaprContainerFile::set_iommu(std::uint64_t type) noexcept {
  const std::lock_guard vfio_lock{host_.vfio_mutex};
  const std::unique_lock lock{mutex_};
  if (groups_.empty() || driver_ != Driver::none) return -EINVAL;
  if (type != vfio::spapr_tce_iommu && type != vfio::spapr_tce_v2_iommu) return -ENODEV;
  if (type == vfio::spapr_tce_iommu && groups_.size() > 1) return -EBUSY;
  driver_ = type == vfio::spapr_tce_iommu ? Driver::v1 : Driver::v2;
  default_pending_ = driver_ == Driver::v2;
  try {
    domain_ = std::make_unique<Domain>(groups_.front()->iommu(), windows_);
    for (IommuGroup* group : groups_) group->join(*domain_);
  } catch (const std::bad_alloc&) {
    drop_all();
    return -ENOMEM;
  }
  // Version 1 has the firmware's window from the start; nothing is charged before ENABLE.
  if (driver_ == Driver::v1) {
    auto table = TceTable::make(platform().default_window, 12, 1);
    if (!table) {
      for (IommuGroup* group : groups_) group->leave(*domain_);
      drop_all();
      return -ENOMEM;
    }
    windows_.set(0, table.release());
  }
  return 0;
}

int SpaprContainerFile::attach(IommuGroup& group) noexcept {
  const std::unique_lock lock{mutex_};
  if (!groups_.empty() && (driver_ == Driver::v1 || !platform().several_groups)) return -EBUSY;
  if (const int rc = group.claim(&group); rc != 0) return rc;
  try {
    groups_.reserve(groups_.size() + 1);
    if (domain_) group.join(*domain_);
    groups_.push_back(&group);
    return 0;
  } catch (const std::bad_alloc&) {
    group.disclaim();
    return -ENOMEM;
  }
}

void SpaprContainerFile::detach(IommuGroup& group) noexcept {
  const std::unique_lock lock{mutex_};
  if (domain_) group.leave(*domain_);
  std::erase(groups_, &group);
  group.disclaim();
  if (groups_.empty()) return drop_all();
  // As Linux since 6.9 does: the leaving group's windows are cleared first, although the others share them.
  for (std::size_t slot = 0; slot < TceWindows::windows_max; ++slot)
    if (TceTable* const table = windows_.at(slot)) clear(*table, 0, table->count());
  if (domain_) domain_->invalidate(IovaRange::everything());
}

void SpaprContainerFile::drop_all() noexcept {
  if (enabled_ && driver_ == Driver::v1)
    host_.accounting.unpin(Ledger::process, platform().default_window.length().value / os_page_bytes, usage_);
  for (std::size_t slot = 0; slot < TceWindows::windows_max; ++slot) drop_window(slot);
  for (SpaprMemory::Region* region : registered_) host_.spapr_memory.release(region, host_.accounting, usage_);
  registered_.clear();
  domain_.reset();
  windows_.freeze(false);
  pe_ = Pe::normal;
  enabled_ = false;
  default_pending_ = false;
  driver_ = Driver::none;
}

void SpaprContainerFile::add_usage(SpaceUsage& usage, std::size_t& mappings) const noexcept {
  const std::shared_lock lock{mutex_};
  usage += usage_;
  for (std::size_t slot = 0; slot < TceWindows::windows_max; ++slot) {
    const TceTable* const table = windows_.at(slot);
    for (std::uint64_t i = 0; table != nullptr && i < table->count(); ++i) mappings += table->at(i) != 0 ? 1 : 0;
  }
}

// ---- windows ----

long SpaprContainerFile::info(std::uint64_t argument) noexcept {
  const std::shared_lock lock{mutex_};
  vfio::SpaprTceInfo info;
  if (const int rc = read_vfio(argument, info_bytes_v1, info); rc != 0) return rc;
  const std::uint32_t room = info.argsz;
  info = {};
  info.argsz = room;
  info.dma32_window_start = static_cast<std::uint32_t>(platform().default_window.start.value);
  info.dma32_window_size = static_cast<std::uint32_t>(platform().default_window.length().value);
  if (driver_ == Driver::v2) {
    info.flags = vfio::spapr_info_ddw;
    info.ddw = {.pgsizes = platform().page_sizes,
                .max_dynamic_windows_supported = platform().windows_max,
                .levels = platform().levels_max};
  }
  write_vfio(argument, info, room >= sizeof info ? sizeof info : info_bytes_v1);
  return 0;
}

int SpaprContainerFile::make_window(std::size_t slot, IovaRange range, unsigned page_shift,
                                    std::uint32_t levels) noexcept {
  auto table = TceTable::make(range, page_shift, levels);
  if (!table) return -ENOMEM;
  if (!host_.accounting.pin(Ledger::process, table->charged_bytes() / os_page_bytes, usage_)) return -ENOMEM;
  windows_.set(slot, table.release());
  return 0;
}

int SpaprContainerFile::make_default_window() noexcept {
  if (!default_pending_) return 0;
  const int rc = make_window(0, platform().default_window, 12, 1);
  if (rc == 0) default_pending_ = false;
  return rc;
}

int SpaprContainerFile::ready_window() noexcept {
  {
    const std::shared_lock lock{mutex_};
    if (!default_pending_) return 0;
  }
  const std::unique_lock lock{mutex_};
  return make_default_window();
}

void SpaprContainerFile::drop_window(std::size_t slot) noexcept {
  const std::unique_ptr<TceTable> table{windows_.at(slot)};
  if (!table) return;
  clear(*table, 0, table->count());
  windows_.set(slot, nullptr);
  if (domain_) domain_->invalidate(table->range());
  if (driver_ == Driver::v2) host_.accounting.unpin(Ledger::process, table->charged_bytes() / os_page_bytes, usage_);
}

long SpaprContainerFile::create(std::uint64_t argument) noexcept {
  vfio::SpaprTceCreate c;
  if (const int rc = read_vfio(argument, sizeof c, c); rc != 0) return rc;
  if (c.flags != 0) return -EINVAL;
  const std::unique_lock lock{mutex_};
  if (const int rc = make_default_window(); rc != 0) return rc;
  std::size_t slot = 0;
  while (slot < TceWindows::windows_max && windows_.at(slot) != nullptr) ++slot;
  if (slot >= std::min<std::size_t>(TceWindows::windows_max, platform().windows_max)) return -ENOSPC;
  if (c.page_shift >= 64 || (platform().page_sizes >> c.page_shift & 1U) == 0 || c.levels == 0 ||
      c.levels > platform().levels_max || !std::has_single_bit(c.window_size) ||
      c.window_size < std::uint64_t{1} << c.page_shift)
    return -EINVAL;
  const unsigned entry_bits = static_cast<unsigned>(std::countr_zero(c.window_size)) - c.page_shift;
  if (entry_bits > c.levels * static_cast<unsigned>(std::countr_zero(platform().level_entries_max))) return -ENOMEM;
  const Iova start = windows_.at(0) == nullptr ? Iova{0} : platform().high_window;
  const auto range = IovaRange::from_length(start, Bytes{c.window_size});
  if (!range) return -EINVAL;
  if (const int rc = make_window(slot, *range, c.page_shift, c.levels); rc != 0) return rc;
  c.start_addr = start.value;
  write_vfio(argument, c, sizeof c);
  return 0;
}

long SpaprContainerFile::remove(std::uint64_t argument) noexcept {
  vfio::SpaprTceRemove c;
  if (const int rc = read_vfio(argument, sizeof c, c); rc != 0) return rc;
  if (c.flags != 0) return -EINVAL;
  const std::unique_lock lock{mutex_};
  if (default_pending_ && c.start_addr == 0) {
    default_pending_ = false;
    return 0;
  }
  for (std::size_t slot = 0; slot < TceWindows::windows_max; ++slot) {
    const TceTable* const table = windows_.at(slot);
    // The kernel looks for the table that has the address, and then wants its first.
    if (table == nullptr || !table->range().contains(Iova{c.start_addr})) continue;
    if (table->range().start.value != c.start_addr) return -EINVAL;
    drop_window(slot);
    return 0;
  }
  return -EINVAL;
}

// ---- memory ----

long SpaprContainerFile::register_memory(std::uint64_t argument) noexcept {
  vfio::SpaprRegisterMemory c;
  if (const int rc = read_vfio(argument, sizeof c, c); rc != 0) return rc;
  if (c.flags != 0 || !base::is_aligned(c.vaddr | c.size, os_page_bytes) || c.vaddr + c.size < c.vaddr) return -EINVAL;
  const std::unique_lock lock{mutex_};
  SpaprMemory::Region* region = host_.spapr_memory.find(c.vaddr, c.size);
  if (region != nullptr && std::find(registered_.begin(), registered_.end(), region) != registered_.end())
    return -EBUSY;
  try {
    registered_.reserve(registered_.size() + 1);
    const long rc = host_.spapr_memory.acquire(c.vaddr, c.size, host_.memory, host_.accounting, usage_, region);
    if (rc == 0) {
      registered_.push_back(region);
      enabled_ = true;
    }
    return rc;
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
}

long SpaprContainerFile::unregister_memory(std::uint64_t argument) noexcept {
  vfio::SpaprRegisterMemory c;
  if (const int rc = read_vfio(argument, sizeof c, c); rc != 0) return rc;
  if (c.flags != 0 || !base::is_aligned(c.vaddr | c.size, os_page_bytes)) return -EINVAL;
  const std::unique_lock lock{mutex_};
  const auto at = std::find_if(registered_.begin(), registered_.end(),
                               [&](const SpaprMemory::Region* r) { return r->start == c.vaddr && r->bytes == c.size; });
  if (at == registered_.end()) return -ENOENT;
  SpaprMemory::Region* const region = *at;
  registered_.erase(at);
  host_.spapr_memory.release(region, host_.accounting, usage_);
  return 0;
}

long SpaprContainerFile::enable() noexcept {
  const std::unique_lock lock{mutex_};
  if (enabled_) return -EBUSY;
  const std::uint64_t pages = platform().default_window.length().value / os_page_bytes;
  if (!host_.accounting.pin(Ledger::process, pages, usage_)) return -ENOMEM;
  enabled_ = true;
  return 0;
}

long SpaprContainerFile::disable() noexcept {
  const std::unique_lock lock{mutex_};
  if (!enabled_) return 0;
  host_.accounting.unpin(Ledger::process, platform().default_window.length().value / os_page_bytes, usage_);
  enabled_ = false;
  return 0;
}

// ---- TCEs ----

int SpaprContainerFile::enter(TceTable& table, std::uint64_t index, std::uint64_t address,
                              std::uint64_t access) noexcept {
  if (driver_ == Driver::v2) {
    try {
      address = host_.spapr_memory.map(address, table.page());
    } catch (const std::bad_alloc&) {
      return -ENOMEM;
    }
    if (address == 0) return -EINVAL;
    if (!platform().huge_backing && table.page() > os_page_bytes) {
      host_.spapr_memory.unmap(address);
      return -EPERM;
    }
  } else if (const int rc = host_.memory.check(address, table.page(), true); rc != 0) {
    return rc;  // version 1 pins for writing, whatever the device may do (seen on Linux 6.12)
  }
  if (const std::uint64_t old = table.exchange(index, address | access); old != 0 && driver_ == Driver::v2)
    host_.spapr_memory.unmap(old & ~std::uint64_t{3});
  return 0;
}

void SpaprContainerFile::clear(TceTable& table, std::uint64_t first, std::uint64_t count) noexcept {
  for (std::uint64_t i = first; i < first + count; ++i)
    if (const std::uint64_t old = table.at(i) != 0 ? table.exchange(i, 0) : 0; old != 0 && driver_ == Driver::v2)
      host_.spapr_memory.unmap(old & ~std::uint64_t{3});
}

long SpaprContainerFile::map(std::uint64_t argument) noexcept {
  vfio::Type1DmaMap c;
  if (!enabled()) return -EPERM;
  if (const int rc = read_vfio(argument, sizeof c, c); rc != 0) return rc;
  constexpr std::uint32_t rights = vfio::dma_map_flag_read | vfio::dma_map_flag_write;
  if ((c.flags & ~rights) != 0) return -EINVAL;
  if (const int rc = ready_window(); rc != 0) return rc;
  const std::shared_lock lock{mutex_};
  TceTable* const table = windows_.find(c.iova);
  if (table == nullptr) return -ENXIO;
  if (!base::is_aligned(c.size | c.vaddr, table->page()) || (c.flags & rights) == 0) return -EINVAL;
  if (!base::is_aligned(c.iova, table->page())) return bad_parameter;
  const std::uint64_t first = (c.iova - table->range().start.value) >> table->page_shift();
  const std::uint64_t count = c.size >> table->page_shift();
  if (count > table->count() - first) return would_crash;
  int rc = 0;
  std::uint64_t done = 0;
  for (; rc == 0 && done < count; ++done) rc = enter(*table, first + done, c.vaddr + done * table->page(), c.flags);
  if (rc != 0) clear(*table, first, done - 1);
  // One flush per call, also for what was replaced.
  if (count != 0) domain_->invalidate({Iova{c.iova}, Iova{c.iova + (c.size - 1)}});
  return rc;
}

long SpaprContainerFile::unmap(std::uint64_t argument) noexcept {
  vfio::Type1DmaUnmap c;
  if (!enabled()) return -EPERM;
  if (const int rc = read_vfio(argument, sizeof c, c); rc != 0) return rc;
  if (c.flags != 0) return -EINVAL;
  if (const int rc = ready_window(); rc != 0) return rc;
  const std::shared_lock lock{mutex_};
  TceTable* const table = windows_.find(c.iova);
  if (table == nullptr) return -ENXIO;
  if (!base::is_aligned(c.size, table->page())) return -EINVAL;
  if (!base::is_aligned(c.iova, table->page())) return bad_parameter;
  const std::uint64_t first = (c.iova - table->range().start.value) >> table->page_shift();
  const std::uint64_t count = c.size >> table->page_shift();
  if (count > table->count() - first) return would_crash;
  clear(*table, first, count);
  if (count != 0) domain_->invalidate({Iova{c.iova}, Iova{c.iova + (c.size - 1)}});
  return 0;  // and `size` stays what was asked for
}

void SpaprContainerFile::pages_left() {
  const std::unique_lock lock{mutex_};
  if (driver_ != Driver::v2) return;
  for (std::size_t slot = 0; slot < TceWindows::windows_max; ++slot) {
    TceTable* const table = windows_.at(slot);
    for (std::uint64_t i = 0; table != nullptr && i < table->count(); ++i) {
      const std::uint64_t entry = table->at(i);
      if (entry == 0) continue;
      constexpr std::uint64_t rights = 3;
      table->exchange(i, host_.spapr_memory.moved(entry & ~rights, table->page()) | (entry & rights));
    }
  }
  domain_->invalidate(IovaRange::everything());
}

// ---- error handling ----

void SpaprContainerFile::set_pe(Pe state) noexcept {
  pe_ = state;
  windows_.freeze(state != Pe::normal);
  domain_->invalidate(IovaRange::everything());
}

long SpaprContainerFile::eeh(std::uint64_t argument) noexcept {
  vfio::EehPeOp c;
  constexpr std::size_t minimum = IOVANE_UP_TO(vfio::EehPeOp, op);
  if (const int rc = read_vfio(argument, minimum, c); rc != 0) return rc;
  if (c.flags != 0) return -EINVAL;
  const std::unique_lock lock{mutex_};
  if (!platform().eeh) return -ENODEV;
  switch (c.op) {
    case vfio::eeh_pe_disable:
    case vfio::eeh_pe_enable:
    case vfio::eeh_pe_configure: return 0;
    case vfio::eeh_pe_unfreeze_io:
      if (pe_ == Pe::stopped) set_pe(Pe::stopped_dma);
      return 0;
    case vfio::eeh_pe_unfreeze_dma:
      if (pe_ == Pe::stopped || pe_ == Pe::stopped_dma) set_pe(Pe::normal);
      return 0;
    case vfio::eeh_pe_get_state: return static_cast<long>(pe_);
    case vfio::eeh_pe_reset_hot:
    case vfio::eeh_pe_reset_fundamental: set_pe(Pe::reset); return 0;
    case vfio::eeh_pe_reset_deactivate: set_pe(Pe::normal); return 0;
    case vfio::eeh_pe_inject_err:
      if (c.argsz < sizeof c) return -EINVAL;
      set_pe(Pe::stopped);
      return 0;
    default: return -EINVAL;
  }
}

}  // namespace iovane::backends::model
