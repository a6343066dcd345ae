#include "backends/model/type1.hpp"

#include <algorithm>
#include <bit>
#include <new>
#include <utility>

#include "backends/model/argument.hpp"
#include "backends/model/capability_chain.hpp"
#include "base/checked_math.hpp"
#include "base/fault_point.hpp"

namespace iovane::backends::model {

namespace vfio = uapi::vfio;

namespace {

// What the kernel's 32-bit page counts leave room for.
constexpr std::uint64_t dirty_bitmap_bytes_max = std::uint64_t{1} << 28;
constexpr std::uint64_t u64_max = ~std::uint64_t{0};

int check_bitmap(std::uint64_t pages, std::uint64_t bytes) noexcept {
  if (pages == 0 || bytes == 0 || bytes > dirty_bitmap_bytes_max || bytes < (pages + 63) / 64 * 8) return -EINVAL;
  return 0;
}

// A container cannot know what plain devices wrote: everything mapped counts as dirty.
void mark_all(std::uint64_t data, std::uint64_t first_page, std::uint64_t pages) noexcept {
  for (std::uint64_t bit = first_page; bit < first_page + pages; ++bit) {
    std::uint64_t word = 0;
    std::byte* const at = writable_bytes_at(data) + bit / 64 * sizeof word;
    std::memcpy(&word, at, sizeof word);
    word |= std::uint64_t{1} << (bit % 64);
    std::memcpy(at, &word, sizeof word);
  }
}

std::vector<IovaRange> without(const std::vector<IovaRange>& ranges, IovaRange hole) {
  std::vector<IovaRange> rest;
  for (const IovaRange& r : ranges) {
    if (!r.overlaps(hole)) {
      rest.push_back(r);
      continue;
    }
    if (r.start < hole.start) rest.push_back({r.start, Iova{hole.start.value - 1}});
    if (hole.last < r.last) rest.push_back({Iova{hole.last.value + 1}, r.last});
  }
  return rest;
}

}  // namespace

ContainerFile::~ContainerFile() {
  while (free_ != nullptr) delete std::exchange(free_, free_->next_free);
}

long ContainerFile::ioctl(unsigned long request, std::uint64_t argument) noexcept {
  switch (request) {
    case vfio::Type1DmaMap::request: return map(argument);
    case vfio::Type1DmaUnmap::request: return unmap(argument);
    case vfio::get_api_version: return vfio::api_version;
    case vfio::check_extension: return check_extension(argument, has_driver());
    case vfio::set_iommu: return set_iommu(argument);
    case vfio::Type1Info::request: return info(argument);
    case vfio::DirtyBitmap::request: return dirty_pages(argument);
    default: return has_driver() ? -ENOTTY : -EINVAL;
  }
}

// The last descriptor and the last group are gone.
void ContainerFile::release() noexcept {}

bool ContainerFile::has_driver() const noexcept {
  const std::lock_guard lock{mutex_};
  return driver_ != Driver::none;
}

long ContainerFile::check_extension(std::uint64_t extension, bool has_driver) noexcept {
  switch (extension) {
    case vfio::type1_iommu:
    case vfio::type1_v2_iommu:
    case vfio::unmap_all: return 1;
    case vfio::update_vaddr:
    case vfio::dma_cc_iommu: return has_driver ? 1 : 0;
    default: return 0;
  }
}

long ContainerFile::set_iommu(std::uint64_t type) noexcept {
  const std::lock_guard vfio_lock{host_.vfio_mutex};
  const std::lock_guard lock{mutex_};
  if (groups_.empty() || driver_ != Driver::none) return -EINVAL;
  if (type != vfio::type1_iommu && type != vfio::type1_v2_iommu) return -ENODEV;
  driver_ = type == vfio::type1_iommu ? Driver::v1 : Driver::v2;
  entries_left_ = host_.options.dma_entry_limit;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    const int rc = join_tables(*groups_[i]);
    if (rc == 0) continue;
    while (i-- > 0) leave_tables(*groups_[i]);
    driver_ = Driver::none;
    return rc;
  }
  return 0;
}

// ---- groups ----

int ContainerFile::attach(IommuGroup& group) noexcept {
  if (const int rc = group.claim(&group); rc != 0) return rc;
  int rc = 0;
  try {
    groups_.reserve(groups_.size() + 1);
    const std::lock_guard lock{mutex_};
    if (driver_ != Driver::none) rc = join_tables(group);
  } catch (const std::bad_alloc&) {
    rc = -ENOMEM;
  }
  if (rc == 0) {
    groups_.push_back(&group);
  } else {
    group.disclaim();
  }
  return rc;
}

void ContainerFile::detach(IommuGroup& group) noexcept {
  const std::lock_guard lock{mutex_};
  if (driver_ != Driver::none) leave_tables(group);
  std::erase(groups_, &group);
  group.disclaim();
  if (groups_.empty()) driver_ = Driver::none;  // back to the unprivileged state
}

// What is left of `ranges` for a container with `group`; -EINVAL when a live mapping or everything would be cut.
int ContainerFile::narrow(const IommuGroup& group, std::vector<IovaRange>& ranges) const {
  const IovaRange aperture{Iova{0}, Iova{(std::uint64_t{1} << group.iommu().address_bits) - 1}};
  if (ranges.empty()) ranges.push_back(aperture);
  if (aperture.last != iova_max) {
    const IovaRange beyond{Iova{aperture.last.value + 1}, iova_max};
    if (mappings_.overlapping(beyond) != nullptr) return -EINVAL;
    ranges = without(ranges, beyond);
  }
  for (const ReservedRegion& region : group.reserved()) {
    if (region.kind == ReservedKind::direct_relaxable) continue;
    if (mappings_.overlapping(region.range) != nullptr) return -EINVAL;
    ranges = without(ranges, region.range);
  }
  return ranges.empty() ? -EINVAL : 0;
}

int ContainerFile::join_tables(IommuGroup& group) noexcept {
  try {
    std::vector<IovaRange> ranges = usable_;
    if (const int rc = narrow(group, ranges); rc != 0) return rc;
    const std::size_t iommu = group.devices.front()->options().iommu;
    const auto same =
        std::find_if(tables_.begin(), tables_.end(), [iommu](const Table& t) { return t.iommu == iommu; });
    if (same != tables_.end()) {
      same->groups.push_back(&group);
      group.join(*same->domain);
    } else {
      Table table{.domain = std::make_unique<Domain>(group.iommu()), .iommu = iommu, .groups = {&group}};
      tables_.reserve(tables_.size() + 1);
      // What is mapped already goes into the new table as well.
      int rc = 0;
      auto p = mappings_.first();
      for (; rc == 0 && mappings_.valid(p); p = mappings_.next(p)) {
        rc = fill(*mappings_.item(p), mappings_.range(p), *table.domain);
      }
      if (rc != 0) return rc;
      group.join(*table.domain);
      tables_.push_back(std::move(table));
    }
    usable_ = std::move(ranges);
    return 0;
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
}

void ContainerFile::leave_tables(IommuGroup& group) noexcept {
  const auto table = std::find_if(tables_.begin(), tables_.end(), [&group](const Table& t) {
    return std::find(t.groups.begin(), t.groups.end(), &group) != t.groups.end();
  });
  if (table == tables_.end()) return;
  group.leave(*table->domain);
  std::erase(table->groups, &group);
  if (table->groups.empty()) {
    if (tables_.size() == 1) remove_all();
    tables_.erase(table);
  }
  // The ranges widen again to what the remaining groups leave.
  usable_.clear();
  dirty_tracking_ = dirty_tracking_ && !tables_.empty();
  try {
    for (const Table& t : tables_) {
      for (const IommuGroup* g : t.groups) static_cast<void>(narrow(*g, usable_));
    }
  } catch (const std::bad_alloc&) {  // stays too wide: maps there fail in the table
  }
}

// ---- mappings ----

ContainerFile::Mapping* ContainerFile::new_mapping() noexcept {
  if (base::fault_now(base::FaultKind::allocation)) return nullptr;
  if (free_ == nullptr) return new (std::nothrow) Mapping;
  return std::exchange(free_, free_->next_free);
}

void ContainerFile::free_mapping(Mapping* mapping) noexcept {
  *mapping = {};
  mapping->next_free = std::exchange(free_, mapping);
}

int ContainerFile::pin(Mapping& mapping, IovaRange range) noexcept {
  const std::uint64_t bytes = range.span() + 1;
  mapping.mmio = host_.memory.touches_mmio(mapping.address, bytes);
  if (!mapping.mmio) {
    if (const int rc = host_.memory.check(mapping.address, bytes, may_write(mapping.access)); rc != 0) return rc;
    if (!host_.accounting.pin(Ledger::process, bytes / os_page_bytes, usage_)) return -ENOMEM;
  }
  mapping.pinned = true;
  return 0;
}

void ContainerFile::unpin(Mapping& mapping, IovaRange range) noexcept {
  if (mapping.pinned && !mapping.mmio) {
    host_.accounting.unpin(Ledger::process, (range.span() + 1) / os_page_bytes, usage_);
  }
  mapping.pinned = false;
}

int ContainerFile::fill(const Mapping& mapping, IovaRange range, Domain& domain) noexcept {
  return domain.map(range, std::bit_cast<std::byte*>(mapping.address), mapping.access, true);
}

bool ContainerFile::usable(IovaRange range) const noexcept {
  return std::any_of(usable_.begin(), usable_.end(), [range](const IovaRange& r) { return r.contains(range); });
}

std::uint64_t ContainerFile::page_sizes() const noexcept {
  std::uint64_t sizes = u64_max;
  for (const Table& table : tables_) sizes &= table.domain->iommu().page_sizes;
  if ((sizes & (os_page_bytes - 1)) != 0) sizes = (sizes & ~(os_page_bytes - 1)) | os_page_bytes;
  return sizes;
}

long ContainerFile::map(std::uint64_t argument) noexcept {
  vfio::Type1DmaMap c;
  const std::lock_guard lock{mutex_};
  if (driver_ == Driver::none) return -EINVAL;
  if (const int rc = read_vfio(argument, sizeof c, c); rc != 0) return rc;
  if (host_.injection.armed()) host_.injection.spend(vfio::Type1DmaMap::request);
  return map_locked(c);
}

int ContainerFile::map_locked(const vfio::Type1DmaMap& c) noexcept {
  constexpr std::uint32_t rights = vfio::dma_map_flag_read | vfio::dma_map_flag_write;
  if ((c.flags & ~(rights | vfio::dma_map_flag_vaddr)) != 0) return -EINVAL;
  const auto access = static_cast<Access>(c.flags & rights);
  const bool set_address = (c.flags & vfio::dma_map_flag_vaddr) != 0;
  if ((access != Access::none) == set_address) return -EINVAL;
  if (c.size == 0 || !base::is_aligned(c.size | c.iova | c.vaddr, os_page_bytes)) return -EINVAL;
  const auto range = IovaRange::from_length(Iova{c.iova}, Bytes{c.size});
  if (!range || c.vaddr + (c.size - 1) < c.vaddr) return -EINVAL;

  const auto next = mappings_.at_or_after(range->start);
  Mapping* const there =
      mappings_.valid(next) && mappings_.range(next).start <= range->last ? mappings_.item(next) : nullptr;
  if (set_address) {
    if (there == nullptr) return -ENOENT;
    if (!there->address_gone || mappings_.range(next) != *range) return -EINVAL;
    there->address = c.vaddr;
    there->address_gone = false;
    return 0;
  }
  if (there != nullptr) return -EEXIST;
  if (entries_left_ == 0) return -ENOSPC;
  if (!usable(*range)) return -EINVAL;

  Mapping* mapping = new_mapping();
  if (mapping == nullptr) return -ENOMEM;
  mapping->address = c.vaddr;
  mapping->access = access;
  if (!mappings_.insert_before(next, *range, mapping)) {
    free_mapping(mapping);
    return -ENOMEM;
  }
  int rc = pin(*mapping, *range);
  std::size_t filled = 0;
  for (; rc == 0 && filled < tables_.size(); ++filled) rc = fill(*mapping, *range, *tables_[filled].domain);
  if (rc == 0) {
    --entries_left_;
    return 0;
  }
  for (std::size_t i = 0; i + 1 < filled; ++i) static_cast<void>(tables_[i].domain->unmap(*range));
  unpin(*mapping, *range);
  mappings_.erase(range->start);
  free_mapping(mapping);
  return rc;
}

void ContainerFile::remove(IntervalIndex<Mapping>::Position at) noexcept {
  Mapping* mapping = mappings_.item(at);
  const IovaRange range = mappings_.range(at);
  mappings_.erase(at);
  for (Table& table : tables_) static_cast<void>(table.domain->unmap(range));  // whole leaves: cannot fail
  unpin(*mapping, range);
  free_mapping(mapping);
  ++entries_left_;
}

void ContainerFile::remove_all() noexcept {
  while (!mappings_.empty()) remove(mappings_.first());
}

long ContainerFile::unmap(std::uint64_t argument) noexcept {
  vfio::Type1DmaUnmap c;
  const std::lock_guard lock{mutex_};
  if (driver_ == Driver::none) return -EINVAL;
  if (const int rc = read_vfio(argument, sizeof c, c); rc != 0) return rc;
  constexpr std::uint32_t known =
      vfio::dma_unmap_flag_get_dirty_bitmap | vfio::dma_unmap_flag_all | vfio::dma_unmap_flag_vaddr;
  if ((c.flags & ~known) != 0) return -EINVAL;
  vfio::Bitmap bitmap;
  const bool wants_bitmap = (c.flags & vfio::dma_unmap_flag_get_dirty_bitmap) != 0;
  if (wants_bitmap) {
    if ((c.flags & ~vfio::dma_unmap_flag_get_dirty_bitmap) != 0) return -EINVAL;
    if (c.argsz < sizeof c + sizeof bitmap) return -EINVAL;
    std::memcpy(&bitmap, bytes_at(argument) + sizeof c, sizeof bitmap);
    if (bitmap.pgsize == 0) return -EINVAL;
    if (const int rc = check_bitmap(c.size >> std::countr_zero(bitmap.pgsize), bitmap.size); rc != 0) return rc;
  }
  if (host_.injection.armed()) host_.injection.spend(vfio::Type1DmaUnmap::request);
  std::uint64_t bytes = 0;
  const int rc = unmap_locked(c, wants_bitmap ? &bitmap : nullptr, bytes);
  if (rc != 0) return rc;
  c.size = bytes;
  write_vfio(argument, c, sizeof c);
  return 0;
}

int ContainerFile::unmap_locked(const vfio::Type1DmaUnmap& c, const vfio::Bitmap* bitmap,
                                std::uint64_t& bytes) noexcept {
  if (!base::is_aligned(c.iova, os_page_bytes)) return -EINVAL;
  const bool all = (c.flags & vfio::dma_unmap_flag_all) != 0;
  if (all && (c.iova != 0 || c.size != 0)) return -EINVAL;
  if (!all && (c.size == 0 || !base::is_aligned(c.size, os_page_bytes))) return -EINVAL;
  const auto wanted = all ? IovaRange::everything() : IovaRange::from_length(Iova{c.iova}, Bytes{c.size});
  if (!wanted) return -EINVAL;
  // A range that ends with the last address wraps to nothing in the kernel's arithmetic: success, and nothing removed.
  if (!all && wanted->last == iova_max) return 0;
  if (bitmap != nullptr && (!dirty_tracking_ || bitmap->pgsize != os_page_bytes)) return -EINVAL;

  if (driver_ == Driver::v2 && !all) {
    for (const Iova border : {wanted->start, wanted->last}) {
      const auto p = mappings_.at_or_after(border);
      if (mappings_.valid(p) && mappings_.range(p).contains(border) && !wanted->contains(mappings_.range(p))) {
        return -EINVAL;
      }
    }
  }
  if ((c.flags & vfio::dma_unmap_flag_vaddr) != 0) {
    bytes = invalidate_addresses(*wanted);
    return bytes == u64_max ? -EINVAL : 0;
  }
  for (auto p = mappings_.at_or_after(wanted->start); mappings_.valid(p); p = mappings_.at_or_after(wanted->start)) {
    const IovaRange range = mappings_.range(p);
    if (range.start > wanted->last) break;
    // Version 1 goes by where a mapping begins: one that began earlier stays, one that reaches further goes whole.
    if (driver_ == Driver::v1 && range.start < wanted->start) break;
    const std::uint64_t length = range.span() + 1;
    if (bitmap != nullptr) {
      mark_all(bitmap->data, (range.start.value - wanted->start.value) / os_page_bytes, length / os_page_bytes);
    }
    remove(p);
    bytes += length;
    if (range.last >= wanted->last) break;
  }
  return 0;
}

// UNMAP_DMA with the VADDR flag: mappings stay, their process addresses are forgotten. All ones when one already was.
std::uint64_t ContainerFile::invalidate_addresses(IovaRange range) noexcept {
  std::uint64_t bytes = 0;
  for (auto p = mappings_.at_or_after(range.start); mappings_.valid(p); p = mappings_.next(p)) {
    if (mappings_.range(p).start > range.last) break;
    if (mappings_.item(p)->address_gone) {
      for (auto undo = mappings_.at_or_after(range.start); mappings_.range(undo) != mappings_.range(p);
           undo = mappings_.next(undo)) {
        mappings_.item(undo)->address_gone = false;
      }
      return u64_max;
    }
    mappings_.item(p)->address_gone = true;
    bytes += mappings_.range(p).span() + 1;
  }
  return bytes;
}

// ---- information and dirty pages ----

long ContainerFile::info(std::uint64_t argument) noexcept {
  vfio::Type1Info i;
  const std::lock_guard lock{mutex_};
  if (driver_ == Driver::none) return -EINVAL;
  constexpr std::size_t minimum = IOVANE_UP_TO(vfio::Type1Info, iova_pgsizes);
  if (const int rc = read_vfio(argument, minimum, i); rc != 0) return rc;
  const std::size_t room = i.argsz;
  try {
    CapabilityChain chain;
    chain.add(vfio::Type1CapMigration{.header = {vfio::type1_cap_migration, 1, 0},
                                      .flags = 0,
                                      .pgsize_bitmap = os_page_bytes,
                                      .max_dirty_bitmap_size = dirty_bitmap_bytes_max});
    chain.add(vfio::Type1CapDmaAvail{.header = {vfio::type1_cap_dma_avail, 1, 0}, .avail = entries_left_});
    if (!usable_.empty()) chain.add_iova_ranges(usable_);
    i = {.argsz = i.argsz, .flags = vfio::type1_info_pgsizes | vfio::type1_info_caps, .iova_pgsizes = page_sizes()};
    if (room >= sizeof i + chain.size()) {
      i.cap_offset = sizeof i;
      chain.write(writable_bytes_at(argument) + sizeof i, sizeof i);
    } else {
      i.argsz = static_cast<std::uint32_t>(sizeof i + chain.size());
    }
    write_vfio(argument, i, std::min(room, sizeof i));
    return 0;
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
}

long ContainerFile::dirty_pages(std::uint64_t argument) noexcept {
  vfio::DirtyBitmap c;
  const std::lock_guard lock{mutex_};
  if (driver_ == Driver::none) return -EINVAL;
  if (driver_ == Driver::v1) return -EACCES;
  if (const int rc = read_vfio(argument, sizeof c, c); rc != 0) return rc;
  constexpr std::uint32_t known =
      vfio::dirty_pages_flag_start | vfio::dirty_pages_flag_stop | vfio::dirty_pages_flag_get_bitmap;
  if ((c.flags & ~known) != 0 || !std::has_single_bit(c.flags)) return -EINVAL;
  if (c.flags != vfio::dirty_pages_flag_get_bitmap) {
    dirty_tracking_ = c.flags == vfio::dirty_pages_flag_start;
    return 0;
  }
  vfio::DirtyBitmapGet get;
  if (c.argsz < sizeof c + sizeof get) return -EINVAL;
  std::memcpy(&get, bytes_at(argument) + sizeof c, sizeof get);
  const auto range = IovaRange::from_length(Iova{get.iova}, Bytes{get.size});
  if (!range || get.bitmap.pgsize == 0) return -EINVAL;
  if (const int rc = check_bitmap(get.size >> std::countr_zero(get.bitmap.pgsize), get.bitmap.size); rc != 0) return rc;
  if (get.bitmap.pgsize != os_page_bytes || !base::is_aligned(get.iova | get.size, os_page_bytes)) return -EINVAL;
  if (!dirty_tracking_) return -EINVAL;
  for (auto p = mappings_.at_or_after(range->start); mappings_.valid(p); p = mappings_.next(p)) {
    const IovaRange mapping = mappings_.range(p);
    if (mapping.start > range->last) break;
    if (!range->contains(mapping)) return -EINVAL;
    mark_all(get.bitmap.data, (mapping.start.value - get.iova) / os_page_bytes, (mapping.span() + 1) / os_page_bytes);
  }
  return 0;
}

void ContainerFile::add_usage(SpaceUsage& usage, std::size_t& mappings) const noexcept {
  const std::lock_guard lock{mutex_};
  usage += usage_;
  mappings += mappings_.size();
}

}  // namespace iovane::backends::model
