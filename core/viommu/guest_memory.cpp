#include "viommu/guest_memory.hpp"

#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <new>
#include <thread>
#include <utility>

#include "base/checked_math.hpp"
#include "base/error_text.hpp"
#include "base/os_error.hpp"

namespace iovane::viommu {
namespace {

constexpr std::uint64_t guest_page_bytes = 4096;

std::uint32_t thread_stripe() noexcept {
  static std::atomic<std::uint32_t> next{0};
  // relaxed: only spreads threads over counters; nothing is read through it.
  thread_local const std::uint32_t mine = next.fetch_add(1, std::memory_order_relaxed);
  return mine;
}

auto first_above(const std::vector<Region>& regions, std::uint64_t gpa) noexcept {
  return std::upper_bound(regions.begin(), regions.end(), gpa,
                          [](std::uint64_t a, const Region& r) { return a < r.gpa; });
}

std::unique_ptr<detail::RegionTable> make_table(std::vector<Region> regions, std::uint64_t generation) {
  auto table = std::make_unique<detail::RegionTable>();
  table->regions = std::move(regions);
  table->generation = generation;
  for (const Region& region : table->regions)
    if (table->largest == nullptr || region.last - region.gpa > table->largest->last - table->largest->gpa)
      table->largest = &region;
  return table;
}

std::uint64_t from_le(std::uint64_t v) noexcept {
  if constexpr (std::endian::native == std::endian::big) return __builtin_bswap64(v);
  return v;
}

}  // namespace

void copy_from_guest(std::byte* to, const std::byte* from, std::size_t n) noexcept {
  const auto misaligned = reinterpret_cast<std::uintptr_t>(from);
  std::size_t i = 0;
  if ((misaligned & 7U) == 0)
    for (; i + 8 <= n; i += 8) {
      const std::uint64_t word = __atomic_load_n(reinterpret_cast<const std::uint64_t*>(from + i), __ATOMIC_RELAXED);
      __builtin_memcpy(to + i, &word, 8);
    }
  if ((misaligned & 3U) == 0)
    for (; i + 4 <= n; i += 4) {
      const std::uint32_t word = __atomic_load_n(reinterpret_cast<const std::uint32_t*>(from + i), __ATOMIC_RELAXED);
      __builtin_memcpy(to + i, &word, 4);
    }
  for (; i < n; ++i)
    to[i] = static_cast<std::byte>(__atomic_load_n(reinterpret_cast<const unsigned char*>(from + i), __ATOMIC_RELAXED));
}

void copy_to_guest(std::byte* to, const std::byte* from, std::size_t n) noexcept {
  const auto misaligned = reinterpret_cast<std::uintptr_t>(to);
  std::size_t i = 0;
  if ((misaligned & 7U) == 0)
    for (; i + 8 <= n; i += 8) {
      std::uint64_t word = 0;
      __builtin_memcpy(&word, from + i, 8);
      __atomic_store_n(reinterpret_cast<std::uint64_t*>(to + i), word, __ATOMIC_RELAXED);
    }
  if ((misaligned & 3U) == 0)
    for (; i + 4 <= n; i += 4) {
      std::uint32_t word = 0;
      __builtin_memcpy(&word, from + i, 4);
      __atomic_store_n(reinterpret_cast<std::uint32_t*>(to + i), word, __ATOMIC_RELAXED);
    }
  for (; i < n; ++i)
    __atomic_store_n(reinterpret_cast<unsigned char*>(to + i), static_cast<unsigned char>(from[i]), __ATOMIC_RELAXED);
}

GuestMemory::GuestMemory() : table_{new detail::RegionTable} { base::prepare_asymmetric_barrier(); }

GuestMemory::~GuestMemory() {
  // relaxed: destruction has no concurrent users by contract.
  const auto* table = table_.load(std::memory_order_relaxed);
  for (const Region& region : table->regions)
    if (region.own_mapping) ::munmap(region.address, region.length().value);
  delete table;
}

Result<RegionId> GuestMemory::add(const RegionConfig& config) {
  using base::fail;
  if (config.length.value == 0 ||
      !base::is_aligned(config.length.value | config.gpa | config.fd_offset, guest_page_bytes))
    return fail(Errc::invalid_argument, Stage::validate, 0,
                "guest region {:#x} of {:#x} bytes: address, length and file offset must be multiples of 4 KiB",
                config.gpa, config.length.value);
  if (config.length.value - 1 > iova_max.value - config.gpa)
    return fail(Errc::overflow, Stage::validate, 0, "guest region {:#x} of {:#x} bytes passes 2^64", config.gpa,
                config.length.value);
  if (config.address == nullptr && config.fd < 0)
    return fail(Errc::invalid_argument, Stage::validate, 0, "guest region {:#x}: neither an address nor a descriptor",
                config.gpa);
  if ((reinterpret_cast<std::uintptr_t>(config.address) & (guest_page_bytes - 1)) != 0)
    return fail(Errc::invalid_argument, Stage::validate, 0, "guest region {:#x}: its host address is not page aligned",
                config.gpa);

  const std::lock_guard lock{control_};
  // relaxed: only add and remove store it, under this mutex.
  const auto* old = table_.load(std::memory_order_relaxed);
  Region region{{next_id_},       config.gpa, config.gpa + (config.length.value - 1),
                config.address,   config.fd,  config.fd_offset,
                config.read_only, false};
  const auto begin = old->regions.begin();
  const auto end = old->regions.end();
  const auto place =
      std::lower_bound(begin, end, region.gpa, [](const Region& r, std::uint64_t gpa) { return r.gpa < gpa; });
  const bool hits_next = place != end && place->gpa <= region.last;
  const bool hits_previous = place != begin && std::prev(place)->last >= region.gpa;
  if (hits_next || hits_previous)
    return fail(Errc::invalid_argument, Stage::validate, 0,
                "guest region {:#x}..{:#x} overlaps the region at {:#x}; remove that first", region.gpa, region.last,
                hits_next ? place->gpa : std::prev(place)->gpa);
  if (region.fd >= 0) {
    struct stat st {};
    if (::fstat(region.fd, &st) != 0)
      return fail(base::errc_from_errno(errno), Stage::validate, errno, "guest region {:#x}: fstat failed", region.gpa);
    const auto need = base::checked_add(config.fd_offset, config.length.value);
    if (S_ISREG(st.st_mode) && (!need || *need > static_cast<std::uint64_t>(st.st_size)))
      return fail(Errc::invalid_argument, Stage::validate, 0,
                  "guest region {:#x}: the file has {:#x} bytes, the region needs {:#x} at {:#x}", region.gpa,
                  static_cast<std::uint64_t>(st.st_size), config.length.value, config.fd_offset);
  }
  if (region.address == nullptr) {
    void* mapped = ::mmap(nullptr, config.length.value, PROT_READ | PROT_WRITE, MAP_SHARED, region.fd,
                          static_cast<off_t>(config.fd_offset));
    if (mapped == MAP_FAILED)
      return fail(base::errc_from_errno(errno), Stage::map, errno, "guest region {:#x}: mmap of its descriptor failed",
                  region.gpa);
    region.address = static_cast<std::byte*>(mapped);
    region.own_mapping = true;
  }
  std::vector<Region> grown;
  grown.reserve(old->regions.size() + 1);
  grown.insert(grown.end(), begin, place);
  grown.push_back(region);
  grown.insert(grown.end(), place, end);
  auto table = make_table(std::move(grown), old->generation + 1);
  // R.table - pairs with A.table in view(): a reader that sees the table sees its regions. seq_cst for remove()'s sake.
  table_.store(table.release(), std::memory_order_seq_cst);
  wait_for_readers();
  delete old;
  ++next_id_;
  return region.id;
}

Result<void> GuestMemory::remove(RegionId id) {
  const std::lock_guard lock{control_};
  // relaxed: only add and remove store it, under this mutex.
  const auto* old = table_.load(std::memory_order_relaxed);
  const auto begin = old->regions.begin();
  const auto end = old->regions.end();
  const auto place = std::find_if(begin, end, [&](const Region& r) { return r.id == id; });
  if (place == end) return base::fail(Errc::not_found, Stage::validate, 0, "guest region {}: no such region", id.value);
  const Region gone = *place;
  std::vector<Region> shrunk;
  shrunk.reserve(old->regions.size() - 1);
  shrunk.insert(shrunk.end(), begin, place);
  shrunk.insert(shrunk.end(), place + 1, end);
  auto table = make_table(std::move(shrunk), old->generation + 1);
  // R.table - pairs with A.table in view(); seq_cst: before the counters are looked at, see the file header.
  table_.store(table.release(), std::memory_order_seq_cst);
  wait_for_readers();
  delete old;
  if (gone.own_mapping) ::munmap(gone.address, gone.length().value);
  return {};
}

void GuestMemory::enlist(Reader& reader) const {
  const std::lock_guard lock{control_};
  enlisted_.push_back(&reader);
}

void GuestMemory::dismiss(Reader& reader) const noexcept {
  const std::lock_guard lock{control_};
  std::erase(enlisted_, &reader);
}

// Each set of counters is waited for once: readers of the set that just went out of use, then those that came before
// them. Then each Reader that has a View is waited for until it has not, or has another.
void GuestMemory::wait_for_readers() noexcept {
  base::heavy_barrier();
  for (const Reader* reader : enlisted_) {
    // A.turns - pairs with R.turns: what the View read happened before we free it. seq_cst: after the table store.
    const std::uint64_t turn = reader->turns_.load(std::memory_order_seq_cst);
    if ((turn & 1U) == 0) continue;
    while (reader->turns_.load(std::memory_order_acquire) == turn) std::this_thread::yield();  // A.turns, as above
  }
  for (int round = 0; round < 2; ++round) {
    // relaxed: the phase only says which counter to use; any choice is correct.
    const std::uint32_t old_phase = phase_.load(std::memory_order_relaxed) & 1U;
    phase_.store(old_phase ^ 1U, std::memory_order_relaxed);
    for (ReaderStripe& stripe : readers_)
      // A.readers - pairs with R.readers in ~View(): what the reader read happened before we free it. seq_cst: after
      // the table store in the single order.
      while (stripe.readers[old_phase].load(std::memory_order_seq_cst) != 0) std::this_thread::yield();
  }
}

std::vector<Region> GuestMemory::regions() const {
  const View now = view();
  return {now.regions().begin(), now.regions().end()};
}

GuestMemory::View GuestMemory::view() const noexcept {
  // relaxed: any value is correct, see wait_for_readers().
  return View{*this, thread_stripe() % stripes, phase_.load(std::memory_order_relaxed) & 1U};
}

GuestMemory::View::View(const GuestMemory& memory, std::uint32_t stripe, std::uint32_t phase) noexcept
    : memory_{&memory}, stripe_{stripe}, phase_{phase} {
  // seq_cst: before the load of the table in the single order, see the file header.
  memory.readers_[stripe].readers[phase].fetch_add(1, std::memory_order_seq_cst);
  // A.table - pairs with R.table: the regions are there. seq_cst: after the count.
  table_ = memory.table_.load(std::memory_order_seq_cst);
  largest_ = table_->largest;
}

GuestMemory::View::View(View&& o) noexcept
    : memory_{std::exchange(o.memory_, nullptr)},
      table_{o.table_},
      reader_{o.reader_},
      largest_{o.largest_},
      other_{o.other_},
      stripe_{o.stripe_},
      phase_{o.phase_} {}

const Region* GuestMemory::View::find_slow(std::uint64_t gpa) const noexcept {
  auto place = first_above(table_->regions, gpa);
  if (place == table_->regions.begin()) return nullptr;
  --place;
  if (!place->contains(gpa)) return nullptr;
  return other_ = &*place;
}

std::optional<std::uint64_t> GuestMemory::View::next_region_start(std::uint64_t gpa) const noexcept {
  const auto place = first_above(table_->regions, gpa);
  if (place == table_->regions.end()) return std::nullopt;
  return place->gpa;
}

std::optional<std::uint64_t> GuestMemory::View::read_le64(std::uint64_t gpa) const noexcept {
  if ((gpa & 7U) != 0) return std::nullopt;
  const Region* region = find(gpa);  // regions are multiples of 4 KiB: an aligned word never crosses one
  if (region == nullptr) return std::nullopt;
  return from_le(load(reinterpret_cast<const std::uint64_t*>(region->address + (gpa - region->gpa))));
}

std::optional<std::uint64_t> GuestMemory::View::read_be64(std::uint64_t gpa) const noexcept {
  const auto word = read_le64(gpa);
  if (!word) return std::nullopt;
  return __builtin_bswap64(*word);
}

bool GuestMemory::View::read(std::uint64_t gpa, std::span<std::byte> out) const noexcept {
  while (!out.empty()) {
    const Region* region = find(gpa);
    if (region == nullptr) return false;
    const std::uint64_t here = std::min<std::uint64_t>(out.size(), region->last - gpa + 1);
    copy_from_guest(out.data(), region->address + (gpa - region->gpa), here);
    out = out.subspan(here);
    if (!out.empty() && region->last == iova_max.value) return false;
    gpa += here;
  }
  return true;
}

bool GuestMemory::View::write(std::uint64_t gpa, std::span<const std::byte> in) const noexcept {
  while (!in.empty()) {
    const Region* region = find(gpa);
    if (region == nullptr || region->read_only) return false;
    const std::uint64_t here = std::min<std::uint64_t>(in.size(), region->last - gpa + 1);
    copy_to_guest(region->address + (gpa - region->gpa), in.data(), here);
    in = in.subspan(here);
    if (!in.empty() && region->last == iova_max.value) return false;
    gpa += here;
  }
  return true;
}

}  // namespace iovane::viommu
