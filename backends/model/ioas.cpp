#include "backends/model/ioas.hpp"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <new>
#include <utility>

#include "base/checked_math.hpp"
#include "base/fault_point.hpp"

namespace iovane::backends::model {
namespace {
constexpr std::uint64_t iova_limit = ~std::uint64_t{0};
constexpr std::uint64_t huge_page_bytes = std::uint64_t{2} << 20;
constexpr std::size_t free_pages_max = 64;
}  // namespace

Ioas::~Ioas() {
  while (free_areas_ != nullptr) delete std::exchange(free_areas_, free_areas_->next_free);
  for (Pages* pages : free_pages_) delete pages;
}

void Ioas::open(std::uint32_t id) noexcept {
  const std::lock_guard lock{mutex_};
  id_ = id;
  alignment_ = 1;
  large_pages_ = true;
}

SpaceUsage Ioas::close() noexcept {
  const std::lock_guard lock{mutex_};
  std::uint64_t unmapped = 0;
  unmap_range(IovaRange::everything(), unmapped);
  id_ = 0;
  allowed_.clear();
  reserved_.clear();
  return std::exchange(usage_, {});
}

// ---- objects ----

Ioas::Area* Ioas::new_area() noexcept {
  if (base::fault_now(base::FaultKind::allocation)) return nullptr;
  if (free_areas_ == nullptr) return new (std::nothrow) Area;
  return std::exchange(free_areas_, free_areas_->next_free);
}

void Ioas::free_area(Area* area) noexcept {
  *area = {};
  area->next_free = std::exchange(free_areas_, area);
}

Pages* Ioas::new_pages() noexcept {
  if (base::fault_now(base::FaultKind::allocation)) return nullptr;
  if (free_pages_.empty()) return new (std::nothrow) Pages;
  Pages* pages = free_pages_.back();
  free_pages_.pop_back();
  return pages;
}

void Ioas::drop_pages(Pages* pages) noexcept {
  if (!pages->drop_reference()) return;
  pages->forget();
  if (free_pages_.size() < free_pages_max && free_pages_.capacity() >= free_pages_max) {
    free_pages_.push_back(pages);
  } else {
    delete pages;
    try {
      free_pages_.reserve(free_pages_max);
    } catch (const std::bad_alloc&) {  // then the next ones are deleted too
    }
  }
}

// ---- where a map may go ----

bool Ioas::reserved_overlaps(IovaRange range) const noexcept {
  return std::any_of(reserved_.begin(), reserved_.end(),
                     [range](const Reserved& r) { return r.range.overlaps(range); });
}

int Ioas::check(std::uint64_t iova, std::uint64_t length, Position& next) const noexcept {
  if ((iova & (alignment_ - 1)) != 0) return -EINVAL;
  const auto range = IovaRange::from_length(Iova{iova}, Bytes{length});
  if (!range) return -EOVERFLOW;
  if (reserved_overlaps(*range)) return -EINVAL;
  next = areas_.at_or_after(range->start);
  return areas_.valid(next) && areas_.range(next).start <= range->last ? -EEXIST : 0;
}

int Ioas::place(MapPlace& where, std::uint64_t address_hint, std::uint64_t length, Position& next) const noexcept {
  if (length == 0 || (length & (alignment_ - 1)) != 0) return -EINVAL;
  if (where.fixed) return check(where.iova, length, next);
  const int rc = find_room(where.iova, address_hint, length);
  if (rc == 0) next = areas_.at_or_after(Iova{where.iova});
  return rc;
}

// The first run of addresses in [from, last] that is neither mapped nor reserved.
bool Ioas::next_hole(std::uint64_t from, std::uint64_t last, IovaRange& hole) const noexcept {
  // Each round passes one area or one reserved range, so it ends after their number.
  for (bool moved = true; moved;) {
    moved = false;
    const auto area = areas_.at_or_after(Iova{from});
    if (areas_.valid(area) && areas_.range(area).contains(Iova{from})) {
      if (areas_.range(area).last.value >= last) return false;
      from = areas_.range(area).last.value + 1;
      moved = true;
    }
    for (const Reserved& r : reserved_) {
      if (!r.range.contains(Iova{from})) continue;
      if (r.range.last.value >= last) return false;
      from = r.range.last.value + 1;
      moved = true;
    }
  }
  std::uint64_t until = last;
  const auto area = areas_.at_or_after(Iova{from});
  if (areas_.valid(area) && areas_.range(area).start.value <= until) until = areas_.range(area).start.value - 1;
  for (const Reserved& r : reserved_) {
    if (r.range.start.value > from && r.range.start.value <= until) until = r.range.start.value - 1;
  }
  hole = {Iova{from}, Iova{until}};
  return true;
}

// The lowest room from one os_page up, aligned like the memory (at most to its length and to 2 MiB), so that large
// leaves stay possible. Walks what is mapped, as the kernel does.
int Ioas::find_room(std::uint64_t& iova, std::uint64_t address_hint, std::uint64_t length) const noexcept {
  if (length >= iova_limit / 2) return -EOVERFLOW;
  const std::uint64_t page_offset = address_hint % os_page_bytes;
  std::uint64_t alignment = std::bit_ceil(length);
  if (address_hint != 0) alignment = std::min(alignment, std::uint64_t{1} << std::countr_zero(address_hint));
  alignment = std::min(alignment, huge_page_bytes);
  if (alignment < alignment_) return -EINVAL;
  const auto fits = [&](IovaRange range, std::uint64_t& start) {
    const auto aligned = base::align_up(range.start.value, alignment);
    if (!aligned) return false;
    start = *aligned | page_offset;
    return start <= range.last.value && range.last.value - start >= length - 1;
  };
  const IovaRange anything{Iova{os_page_bytes}, Iova{iova_limit - os_page_bytes}};
  const std::span<const IovaRange> candidates = allowed_.empty() ? std::span{&anything, 1} : std::span{allowed_};
  for (const IovaRange& candidate : candidates) {
    const auto usable = candidate.intersection(anything);
    std::uint64_t start = 0;
    if (!usable || !fits(*usable, start)) continue;
    IovaRange hole{};
    for (std::uint64_t from = start; next_hole(from, usable->last.value, hole);) {
      if (fits(hole, start)) {
        iova = start;
        return 0;
      }
      if (hole.last.value >= usable->last.value) break;
      from = hole.last.value + 1;
    }
  }
  return -ENOSPC;
}

// ---- filling ----

int Ioas::fill_domain(const Area& area, IovaRange range, Domain& domain) const noexcept {
  return domain.map(range, area.pages->memory(area.start_byte), area.access, large_pages_);
}

// Pins and fills into all domains; all or nothing. Without a domain there is nothing to do.
int Ioas::fill(Area& area, IovaRange range) noexcept {
  if (domains_.empty()) return 0;
  const std::uint64_t first = area.start_byte / os_page_bytes;
  const std::uint64_t last = (area.start_byte + range.span()) / os_page_bytes;
  int failure = area.pages->pin(first, last, memory_, accounting_, usage_);
  if (failure != 0) return failure;
  for (std::size_t i = 0; i < domains_.size(); ++i) {
    failure = fill_domain(area, range, *domains_[i]);
    if (failure == 0) continue;
    for (std::size_t j = 0; j < i; ++j) static_cast<void>(domains_[j]->unmap(range));  // whole leaves: cannot fail
    area.pages->unpin(first, last, accounting_, usage_);
    return failure;
  }
  area.filled = true;
  return 0;
}

void Ioas::unfill(Area& area, IovaRange range) noexcept {
  if (!area.filled) return;
  for (Domain* domain : domains_) static_cast<void>(domain->unmap(range));  // whole leaves: cannot fail
  area.pages->unpin(area.start_byte / os_page_bytes, (area.start_byte + range.span()) / os_page_bytes, accounting_,
                    usage_);
  area.filled = false;
}

// One area for one slice: takes over its reference on success.
int Ioas::insert(const PagesSlice& slice, std::uint64_t iova, Access access, Position next) noexcept {
  if (may_write(access) && !slice.pages->writable()) return -EPERM;
  if (((slice.start_byte % os_page_bytes) & (alignment_ - 1)) != 0) return -EINVAL;
  const IovaRange range{Iova{iova}, Iova{iova + (slice.length - 1)}};
  Area* area = new_area();
  if (area == nullptr) return -ENOMEM;
  area->pages = slice.pages;
  area->start_byte = slice.start_byte;
  area->access = access;
  if (!areas_.insert_before(next, range, area)) {
    free_area(area);
    return -ENOMEM;
  }
  const int failure = fill(*area, range);
  if (failure != 0) {
    areas_.erase(range.start);
    free_area(area);
  }
  return failure;
}

// Takes an area out, with everything that it holds.
void Ioas::remove(Position at) noexcept {
  Area* area = areas_.item(at);
  const IovaRange range = areas_.range(at);
  areas_.erase(at);
  unfill(*area, range);
  drop_pages(area->pages);
  free_area(area);
}

// ---- map ----

int Ioas::map_one(MapPlace& where, Pages* pages, std::uint64_t offset, std::uint64_t length, Access access,
                  std::uint64_t hint) noexcept {
  Position next;
  int failure = place(where, hint, length, next);
  if (failure == 0) failure = insert({pages, offset, length}, where.iova, access, next);
  if (failure != 0) drop_pages(pages);
  return failure;
}

int Ioas::map_memory(std::uint32_t id, MapPlace& where, std::uint64_t address, std::uint64_t length, Access access,
                     Ledger ledger) noexcept {
  const std::lock_guard lock{mutex_};
  if (id_ != id) return -ENOENT;
  if (length == 0 || length > iova_limit - os_page_bytes) return -EINVAL;
  if (!base::checked_add(address, length)) return -EOVERFLOW;
  Pages* pages = new_pages();
  if (pages == nullptr) return -ENOMEM;
  pages->name_memory(address, length, may_write(access), ledger);
  return map_one(where, pages, address % os_page_bytes, length, access, address);
}

int Ioas::map_file(std::uint32_t id, MapPlace& where, base::UniqueFd fd, std::uint64_t start, std::uint64_t length,
                   Access access, Ledger ledger) noexcept {
  const std::lock_guard lock{mutex_};
  if (id_ != id) return -ENOENT;
  if (length == 0 || length > iova_limit - os_page_bytes) return -EINVAL;
  if (!base::checked_add(start, length)) return -EOVERFLOW;
  Pages* pages = new_pages();
  if (pages == nullptr) return -ENOMEM;
  pages->name_file(std::move(fd), start, length, may_write(access), ledger);
  return map_one(where, pages, start % os_page_bytes, length, access, start);
}

int Ioas::slices(std::uint32_t id, std::uint64_t iova, std::uint64_t length, std::vector<PagesSlice>& out) noexcept {
  if (length == 0) return -EINVAL;
  const auto range = IovaRange::from_length(Iova{iova}, Bytes{length});
  if (!range) return -EOVERFLOW;
  const std::lock_guard lock{mutex_};
  if (id_ != id) return -ENOENT;
  std::uint64_t at = iova;
  for (auto p = areas_.at_or_after(Iova{at}); areas_.valid(p); p = areas_.next(p)) {
    const IovaRange area_range = areas_.range(p);
    if (!area_range.contains(Iova{at})) return -ENOENT;
    const Area& area = *areas_.item(p);
    const std::uint64_t last = std::min(range->last.value, area_range.last.value);
    try {
      out.push_back({area.pages, area.start_byte + (at - area_range.start.value), last - at + 1});
    } catch (const std::bad_alloc&) {
      return -ENOMEM;
    }
    area.pages->add_reference();
    if (last == range->last.value) return 0;
    at = last + 1;
  }
  return -ENOENT;
}

void Ioas::drop_slices(std::span<const PagesSlice> slices) noexcept {
  const std::lock_guard lock{mutex_};
  for (const PagesSlice& slice : slices) drop_pages(slice.pages);
}

int Ioas::map_slices(std::uint32_t id, MapPlace& where, std::span<const PagesSlice> slices, std::uint64_t length,
                     Access access) noexcept {
  const std::lock_guard lock{mutex_};
  if (id_ != id) return -ENOENT;
  const PagesSlice& front = slices.front();
  Position next;
  int failure = place(where, front.pages->base() + front.start_byte, length, next);
  if (failure != 0) return failure;
  std::uint64_t iova = where.iova;
  for (std::size_t i = 0; i < slices.size(); ++i) {
    if (i > 0) next = areas_.at_or_after(Iova{iova});
    failure = insert(slices[i], iova, access, next);
    if (failure != 0) {
      // The slices' references stay with the caller: take the ones back that areas had.
      for (std::size_t j = i; j-- > 0;) {
        slices[j].pages->add_reference();
        iova -= slices[j].length;
        remove(areas_.at_or_after(Iova{iova}));
      }
      return failure;
    }
    iova += slices[i].length;
  }
  return 0;
}

// ---- unmap ----

int Ioas::unmap_range(IovaRange range, std::uint64_t& unmapped) noexcept {
  unmapped = 0;
  for (auto p = areas_.at_or_after(range.start); areas_.valid(p); p = areas_.at_or_after(range.start)) {
    const IovaRange area = areas_.range(p);
    if (area.start > range.last) break;
    // What came before stays unmapped: the kernel does not look ahead either.
    if (!range.contains(area)) return -ENOENT;
    remove(p);
    unmapped += area.span() + 1;
    if (area.last >= range.last) break;
  }
  return 0;
}

int Ioas::unmap(std::uint32_t id, std::uint64_t iova, std::uint64_t length, std::uint64_t& unmapped) noexcept {
  const std::lock_guard lock{mutex_};
  if (id_ != id) return -ENOENT;
  if (length == 0) return -EINVAL;
  const auto range = IovaRange::from_length(Iova{iova}, Bytes{length});
  return range ? unmap_range(*range, unmapped) : -EOVERFLOW;
}

int Ioas::unmap_all(std::uint32_t id, std::uint64_t& unmapped) noexcept {
  const std::lock_guard lock{mutex_};
  if (id_ != id) return -ENOENT;
  return unmap_range(IovaRange::everything(), unmapped);
}

// ---- control plane ----

int Ioas::allow(std::span<const IovaRange> ranges) noexcept {
  try {
    std::vector<IovaRange> sorted{ranges.begin(), ranges.end()};
    std::sort(sorted.begin(), sorted.end());
    for (std::size_t i = 0; i < sorted.size(); ++i) {
      if (sorted[i].start >= sorted[i].last) return -EINVAL;
      if (i > 0 && sorted[i - 1].overlaps(sorted[i])) return -EINVAL;
    }
    const std::lock_guard lock{mutex_};
    for (const IovaRange& range : sorted) {
      if (reserved_overlaps(range)) return -EADDRINUSE;
    }
    allowed_ = std::move(sorted);
    return 0;
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
}

std::vector<IovaRange> Ioas::usable() const {
  const std::lock_guard lock{mutex_};
  std::vector<IovaRange> taken;
  for (const Reserved& r : reserved_) taken.push_back(r.range);
  std::sort(taken.begin(), taken.end());
  std::vector<IovaRange> ranges;
  std::uint64_t from = 0;
  for (const IovaRange& range : taken) {
    if (range.start.value > from) ranges.push_back({Iova{from}, Iova{range.start.value - 1}});
    if (range.last == iova_max) return ranges;
    from = std::max(from, range.last.value + 1);
  }
  ranges.push_back({Iova{from}, iova_max});
  return ranges;
}

std::uint64_t Ioas::alignment() const noexcept {
  const std::lock_guard lock{mutex_};
  return alignment_;
}

std::uint64_t Ioas::page_sizes() const noexcept {
  const std::lock_guard lock{mutex_};
  std::uint64_t sizes = ~std::uint64_t{0};
  for (const Domain* domain : domains_) sizes &= domain->iommu().page_sizes;
  if ((sizes & (os_page_bytes - 1)) != 0) sizes = (sizes & ~(os_page_bytes - 1)) | os_page_bytes;
  return std::max(sizes, alignment_);
}

int Ioas::check_alignment(std::uint64_t alignment) const noexcept {
  const std::uint64_t mask = alignment - 1;
  for (auto p = areas_.first(); areas_.valid(p); p = areas_.next(p)) {
    const IovaRange range = areas_.range(p);
    if (((range.start.value | (range.span() + 1) | (areas_.item(p)->start_byte % os_page_bytes)) & mask) != 0) {
      return -EADDRINUSE;
    }
  }
  return 0;
}

int Ioas::recalculate_alignment() noexcept {
  const std::uint64_t wanted = domains_.empty() && large_pages_ ? 1 : os_page_bytes;
  if (wanted > alignment_) {
    const int failure = check_alignment(wanted);
    if (failure != 0) return failure;
  }
  alignment_ = wanted;
  return 0;
}

int Ioas::set_large_pages(bool on) noexcept {
  const std::lock_guard lock{mutex_};
  if (on == large_pages_) return 0;
  if (!on && !domains_.empty() && !areas_.empty()) return -EINVAL;
  large_pages_ = on;
  const int failure = recalculate_alignment();
  if (failure != 0) large_pages_ = !on;
  return failure;
}

bool Ioas::large_pages() const noexcept {
  const std::lock_guard lock{mutex_};
  return large_pages_;
}

// Makes `last` the last address of an area, if one contains it.
int Ioas::split(std::uint64_t last) noexcept {
  const auto p = areas_.at_or_after(Iova{last});
  if (!areas_.valid(p) || !areas_.range(p).contains(Iova{last})) return 0;
  const IovaRange whole = areas_.range(p);
  // The first address alone is no cut either, in the kernel's reading.
  if (last == whole.start.value || last == whole.last.value) return 0;
  Area& left = *areas_.item(p);
  const std::uint64_t right_start = last + 1;
  const std::uint64_t right_byte = left.start_byte + (right_start - whole.start.value);
  if (((right_start | right_byte) & (alignment_ - 1)) != 0) return -EINVAL;
  if (left.filled && large_pages_) return -EINVAL;
  Area* right = new_area();
  if (right == nullptr) return -ENOMEM;
  if (left.filled) {
    const int failure = left.pages->cut(left.start_byte / os_page_bytes,
                                        (left.start_byte + whole.span()) / os_page_bytes, right_byte / os_page_bytes);
    if (failure != 0) {
      free_area(right);
      return failure;
    }
  }
  *right = {.pages = left.pages, .start_byte = right_byte, .access = left.access, .filled = left.filled};
  left.pages->add_reference();
  areas_.erase(p);
  // Two entries where one was: the run that gave one up has room for one, and the second may have to split it.
  static_cast<void>(areas_.insert({whole.start, Iova{last}}, &left));
  if (!areas_.insert({Iova{right_start}, whole.last}, right)) {
    areas_.erase(whole.start);
    static_cast<void>(areas_.insert(whole, &left));
    left.pages->drop_reference();
    free_area(right);
    return -ENOMEM;
  }
  return 0;
}

int Ioas::cut(std::uint64_t iova, std::uint64_t length) noexcept {
  const std::lock_guard lock{mutex_};
  int rc = split(iova + length - 1);
  if (rc == 0 && iova != 0) rc = split(iova - 1);
  return rc;
}

int Ioas::reserve(std::span<const ReservedRegion> regions, const void* owner) noexcept {
  const std::lock_guard lock{mutex_};
  const std::size_t before = reserved_.size();
  int failure = 0;
  for (const ReservedRegion& region : regions) {
    if (region.kind == ReservedKind::direct_relaxable) continue;
    const bool allowed =
        std::any_of(allowed_.begin(), allowed_.end(), [&](const IovaRange& r) { return r.overlaps(region.range); });
    if (allowed || areas_.overlapping(region.range) != nullptr) {
      failure = -EADDRINUSE;
      break;
    }
    try {
      reserved_.push_back({region.range, owner});
    } catch (const std::bad_alloc&) {
      failure = -ENOMEM;
      break;
    }
  }
  if (failure != 0) reserved_.erase(reserved_.begin() + static_cast<std::ptrdiff_t>(before), reserved_.end());
  return failure;
}

void Ioas::unreserve(const void* owner) noexcept {
  const std::lock_guard lock{mutex_};
  std::erase_if(reserved_, [owner](const Reserved& r) { return r.owner == owner; });
}

int Ioas::add_domain(Domain& domain) noexcept {
  const IovaRange aperture = domain.aperture();
  if (aperture.last != iova_max) {
    const ReservedRegion beyond{{Iova{aperture.last.value + 1}, iova_max}, ReservedKind::reserved};
    const int failure = reserve({&beyond, 1}, &domain);
    if (failure != 0) return failure;
  }
  int failure = 0;
  {
    const std::lock_guard lock{mutex_};
    if (alignment_ < os_page_bytes) failure = check_alignment(os_page_bytes);
    if (failure == 0) {
      try {
        domains_.push_back(&domain);
      } catch (const std::bad_alloc&) {
        failure = -ENOMEM;
      }
    }
    if (failure == 0) {
      const bool first_domain = domains_.size() == 1;
      auto p = areas_.first();
      for (; areas_.valid(p); p = areas_.next(p)) {
        Area& area = *areas_.item(p);
        failure = first_domain ? fill(area, areas_.range(p)) : fill_domain(area, areas_.range(p), domain);
        if (failure != 0) break;
      }
      if (failure == 0) {
        alignment_ = os_page_bytes;
      } else {
        const Iova stopped_at = areas_.range(p).start;
        for (auto undo = areas_.first(); areas_.range(undo).start != stopped_at; undo = areas_.next(undo)) {
          if (first_domain) {
            unfill(*areas_.item(undo), areas_.range(undo));
          } else {
            static_cast<void>(domain.unmap(areas_.range(undo)));
          }
        }
        domains_.pop_back();
      }
    }
  }
  if (failure != 0) unreserve(&domain);
  return failure;
}

void Ioas::remove_domain(Domain& domain) noexcept {
  {
    const std::lock_guard lock{mutex_};
    if (domains_.size() == 1) {
      for (auto p = areas_.first(); areas_.valid(p); p = areas_.next(p)) unfill(*areas_.item(p), areas_.range(p));
    } else {
      static_cast<void>(domain.unmap(IovaRange::everything()));
    }
    std::erase(domains_, &domain);
    static_cast<void>(recalculate_alignment());  // only ever relaxes here
  }
  unreserve(&domain);
}

bool Ioas::contiguous(IovaRange range) const noexcept {
  std::uint64_t at = range.start.value;
  for (auto p = areas_.at_or_after(range.start); areas_.valid(p); p = areas_.next(p)) {
    if (!areas_.range(p).contains(Iova{at})) return false;
    if (areas_.range(p).last >= range.last) return true;
    at = areas_.range(p).last.value + 1;
  }
  return false;
}

std::size_t Ioas::area_count() const noexcept {
  const std::lock_guard lock{mutex_};
  return areas_.size();
}

SpaceUsage Ioas::usage() const noexcept {
  const std::lock_guard lock{mutex_};
  return usage_;
}

}  // namespace iovane::backends::model
