#include "backends/spapr_tce/spapr_space.hpp"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>

#include "backends/kernel_error.hpp"
#include "backends/range_list.hpp"
#include "backends/uapi/vfio.hpp"
#include "base/checked_math.hpp"
#include "base/error_text.hpp"

namespace iovane::backends::spapr {
namespace {

namespace uapi = backends::uapi::vfio;

/// Linux answers EINVAL or EPERM, by version.
Error too_small_pages(int os_errno, std::uint64_t address, std::uint64_t page) noexcept {
  return base::fail(Errc::bad_memory, Stage::map, os_errno,
                    "memory at {:#x} is not backed by pages as large as the window's {} bytes (or no longer "
                    "registered, or the container belongs to another process); use hugetlb memory, or a window with "
                    "smaller pages",
                    address, page);
}

constexpr std::uint32_t map_flags(Access access) noexcept {
  return (may_read(access) ? uapi::dma_map_flag_read : 0) | (may_write(access) ? uapi::dma_map_flag_write : 0);
}

}  // namespace

void SpaprSpace::execute(std::span<const BackendOp> ops, std::span<BackendOpResult> results) noexcept {
  for (std::size_t i = 0; i < ops.size(); ++i) {
    switch (ops[i].kind) {
      case OpKind::map:
        if (map_common(ops[i], results[i])) break;
        [[fallthrough]];
      case OpKind::replace: results[i] = map(ops[i]); break;
      case OpKind::unmap:
        if (!unmap_common(ops[i].range, results[i])) results[i] = unmap(ops[i].range);
        break;
      case OpKind::copy:
        results[i] = {base::fail(Errc::unsupported, Stage::map, 0, "{} has no copy; map the registered memory instead",
                                 to_string(facts_.interface)),
                      {}};
        break;
    }
  }
}

/// The map that most are: registered memory of one piece, into TCEs that are free. False when it is another one, or
/// malformed, and nothing has been done: map() knows what to do or to say.
bool SpaprSpace::map_common(const BackendOp& op, BackendOpResult& result) noexcept {
  TceBook* const book = book_of(op.range);
  const std::size_t index = std::size_t{op.region.value} - 1;  // of no region: beyond all
  if (book == nullptr || index >= regions_.size()) return false;
  const Region& region = regions_[index];
  const std::uint64_t span = op.range.span();
  if (region.held.size() != 1 || span >= region.length || op.memory > region.length - span - 1) return false;
  const std::uint64_t address = region.address + op.memory;
  if (op.access == Access::none || ((op.range.start.value | (span + 1) | address) & (book->page() - 1)) != 0)
    return false;
  const TceRun run = book->run_of(op.range);
  if (!book->is_free(run)) return false;
  if (const int why = map_call(op.range, address, op.access); why != 0) [[unlikely]] {
    result = {map_error(why, op, address, *book), {}};
    return true;
  }
  const std::uint32_t number = region.held.front();
  book->fill(run, address, number, op.access);
  // relaxed: the registration is held while this runs.
  memory_.at(number).tces.fetch_add(run.count(), std::memory_order_relaxed);
  result = {{}, Bytes{span + 1}};
  return true;
}

/// The unmap that most are: whole TCEs of one window, all of them there, of one registration. False: another one, and
/// nothing has been done.
bool SpaprSpace::unmap_common(IovaRange range, BackendOpResult& result) noexcept {
  TceBook* const book = book_of(range);
  if (book == nullptr || ((range.start.value | (range.last.value + 1)) & (book->page() - 1)) != 0) return false;
  const TceRun run = book->run_of(range);
  const auto registration = book->sole_registration(run);
  if (!registration) return false;
  if (const int why = unmap_call(range); why != 0) [[unlikely]] {
    result = {unmap_error(why, range, {}), {}};
    return true;
  }
  book->clear(run);
  if (!version_1()) memory_.drop_tces(*registration, run.count());
  result = {{}, range.length()};
  return true;
}

TceBook* SpaprSpace::book_of(IovaRange range) noexcept {
  for (TceBook& book : books_)
    if (book.window().range.contains(range)) return &book;
  return nullptr;
}

Error SpaprSpace::outside(IovaRange range) const noexcept {
  if (books_.empty())
    return base::fail(Errc::no_device, Stage::map, 0,
                      "a sPAPR container has no window before a device is attached; attach one first");
  IovaRange hole = range;  // what of it no window has, up to the next window
  for (const TceBook& book : books_) {
    const IovaRange& window = book.window().range;
    if (window.contains(hole.start)) {
      if (window.last == iova_max || window.last >= range.last) break;
      hole.start = Iova{window.last.value + 1};
    } else if (window.start > hole.start && window.start <= hole.last) {
      hole.last = Iova{window.start.value - 1};
    }
  }
  return base::fail(Errc::iova_reserved, Stage::map, 0,
                    "[{:#x}, {:#x}] is not inside one window: [{:#x}, {:#x}] is in none; choose an IOVA inside the "
                    "usable ranges, or create a window",
                    range.start.value, range.last.value, hole.start.value, hole.last.value);
}

Error SpaprSpace::check_map(const TceBook& book, const BackendOp& op, std::uint64_t address) const noexcept {
  const std::uint64_t page = book.page();
  if (op.access == Access::none || !base::is_aligned(op.range.start.value | op.range.length().value | address, page))
    return base::fail(Errc::invalid_argument, Stage::map, 0,
                      "map of [{:#x}, {:#x}] from {:#x} with access {}: refused as malformed; IOVA, length and memory "
                      "must be multiples of the window's page of {} bytes and some access must be asked for",
                      op.range.start.value, op.range.last.value, address, static_cast<unsigned>(op.access), page);
  const TceRun run = book.run_of(op.range);
  if (op.kind == OpKind::replace) {
    if (book.all_live(run)) return {};
    return base::fail(Errc::not_found, Stage::map, 0, "[{:#x}, {:#x}] is not mapped as a whole and cannot be replaced",
                      op.range.start.value, op.range.last.value);
  }
  if (!book.first_live(run)) return {};
  return base::fail(Errc::iova_busy, Stage::map, 0, "[{:#x}, {:#x}] overlaps a live mapping; unmap it first",
                    op.range.start.value, op.range.last.value);
}

BackendOpResult SpaprSpace::map(const BackendOp& op) noexcept {
  TceBook* const book = book_of(op.range);
  if (book == nullptr) return {outside(op.range), {}};
  const std::uint64_t length = op.range.length().value;
  if (op.region.value != 0) {
    const Region* const region = op.region.value <= regions_.size() ? &regions_[op.region.value - 1] : nullptr;
    if (region == nullptr || length > region->length || op.memory > region->length - length)
      return {base::fail(Errc::invalid_argument, Stage::map, 0, "{} bytes at offset {:#x} are not inside region {}",
                         length, op.memory, op.region.value),
              {}};
    const std::uint64_t address = region->address + op.memory;
    if (const Error bad = check_map(*book, op, address)) return {bad, {}};
    return map_into(*book, op, {address, version_1() ? nullptr : &region->held});
  }
  if (const Error bad = check_map(*book, op, op.memory)) return {bad, {}};
  if (version_1()) return map_into(*book, op, {op.memory, nullptr});
  try {
    const auto held = memory_.hold(op.memory, length);
    if (!held) {
      Error error = held.error();
      error.stage = Stage::map;
      return {error, {}};
    }
    const BackendOpResult result = map_into(*book, op, {op.memory, &*held});
    memory_.release(*held);  // from here on its TCEs keep it
    return result;
  } catch (...) {
    return {base::fail(Errc::out_of_memory, Stage::map, 0, "no memory to remember a registration"), {}};
  }
}

int SpaprSpace::map_call(IovaRange range, std::uint64_t address, Access access) noexcept {
  uapi::Type1DmaMap map{
      .flags = map_flags(access), .vaddr = address, .iova = range.start.value, .size = range.length().value};
  return call(kernel_, container_.get(), map);
}

int SpaprSpace::unmap_call(IovaRange range) noexcept {
  uapi::Type1DmaUnmap unmap{.iova = range.start.value, .size = range.length().value};
  return call(kernel_, container_.get(), unmap);
}

BackendOpResult SpaprSpace::map_into(TceBook& book, const BackendOp& op, const Source& source) noexcept {
  const TceRun run = book.run_of(op.range);
  const int why = map_call(op.range, source.address, op.access);
  if (why == 0) [[likely]] {
    if (op.kind == OpKind::replace) leave(book, run);
    enter(book, run, source, op.access);
    return {{}, op.range.length()};
  }
  const Error error = map_error(why, op, source.address, book);
  // The kernel cleared what it had entered before it failed; in a replace those TCEs were live.
  if (op.kind != OpKind::replace || restore(book, run)) return {error, {}};
  return {base::fail(error.code, Stage::map, why,
                     "{}; the memory that was mapped there could not be mapped again, and [{:#x}, {:#x}] is unmapped "
                     "now",
                     error.detail(), op.range.start.value, op.range.last.value),
          {}};
}

/// Enters the TCEs that a map made, registration by registration.
void SpaprSpace::enter(TceBook& book, TceRun run, const Source& source, Access access) noexcept {
  if (source.held == nullptr) {
    book.fill(run, source.address, 0, access);
    return;
  }
  std::uint64_t address = source.address;
  TceRun rest = run;
  for (const std::uint32_t number : *source.held) {
    Registration& registration = memory_.at(number);
    if (registration.span.last < address) continue;
    // A TCE's page never crosses a registration: the kernel would have refused it.
    const std::uint64_t inside = (registration.span.last - address + 1) / book.page();
    const TceRun part{rest.first, std::min(rest.last, rest.first + (inside - 1))};
    book.fill(part, address, number, access);
    // relaxed: the registration is held while this runs.
    registration.tces.fetch_add(part.count(), std::memory_order_relaxed);
    if (part.last == rest.last) return;
    rest.first = part.last + 1;
    address += part.count() * book.page();
  }
}

/// Takes live TCEs of the run out of the book and out of their registrations' counts. Returns how many there were.
std::uint64_t SpaprSpace::leave(TceBook& book, TceRun run) noexcept {
  std::uint64_t gone = 0;
  std::uint32_t number = 0;
  std::uint64_t count = 0;
  const auto drop = [&] {
    if (count != 0 && !version_1()) memory_.drop_tces(number, count);
    count = 0;
  };
  for (std::uint64_t i = run.first; i <= run.last; ++i) {
    const TceWord word = book.at(i);
    if (!word.live()) continue;
    const TceRun like{i, book.last_like(i, run.last)};
    book.clear(like);
    gone += like.count();
    if (word.registration() != number) drop();
    number = word.registration();
    count += like.count();
    i = like.last;
  }
  drop();
  return gone;
}

/// Maps again what the book says is there. False when that failed too; the run is unmapped then.
bool SpaprSpace::restore(TceBook& book, TceRun run) noexcept {
  for (std::uint64_t i = run.first; i <= run.last;) {
    const TceWord word = book.at(i);
    std::uint64_t next = i + 1;
    while (next <= run.last && book.at(next).access() == word.access() &&
           book.at(next).address() == word.address() + (next - i) * book.page())
      ++next;
    if (map_call(book.range_of({i, next - 1}), word.address(), word.access()) != 0) {
      static_cast<void>(unmap_in(book, book.range_of(run)));
      return false;
    }
    i = next;
  }
  return true;
}

Error SpaprSpace::map_error(int os_errno, const BackendOp& op, std::uint64_t address, const TceBook& book) noexcept {
  switch (os_errno) {
    case EPERM:
      if (book.page() > os_page_) return too_small_pages(os_errno, address, book.page());
      return base::fail(Errc::permission, Stage::map, os_errno,
                        "the container belongs to another process, or is not enabled");
    case EFAULT:
    case EINVAL:
      if (os_errno == EINVAL && book.page() > os_page_) return too_small_pages(os_errno, address, book.page());
      return base::fail(Errc::bad_memory, Stage::map, os_errno,
                        "VFIO_IOMMU_MAP_DMA: memory at {:#x} is not mapped in this process, not writable although the "
                        "device may write, or no longer registered",
                        address);
    case ENOMEM:
      return explain_no_memory(kernel_, MemlockAccount::process_locked, Stage::map, "VFIO_IOMMU_MAP_DMA",
                               op.range.length());
    case ENXIO:
      return base::fail(Errc::iova_reserved, Stage::map, os_errno, "[{:#x}, {:#x}] is in no window of the kernel's",
                        op.range.start.value, op.range.last.value);
    default: return explain_call(Stage::map, "VFIO_IOMMU_MAP_DMA", os_errno);
  }
}

/// True when a border of `range` lies inside a live TCE of a page larger than the granule.
bool SpaprSpace::splits_a_tce(const TceBook& book, IovaRange range) const noexcept {
  if (((range.start.value | (range.last.value + 1)) & (book.page() - 1)) == 0) [[likely]]
    return false;
  const auto inside = range.intersection(book.window().range);
  if (!inside) return false;
  const TceRun run = book.run_of(*inside);
  const IovaRange whole = book.range_of(run);
  return (whole.start != inside->start && book.at(run.first).live()) ||
         (whole.last != inside->last && book.at(run.last).live());
}

BackendOpResult SpaprSpace::unmap(IovaRange range) noexcept {
  for (const TceBook& book : books_)
    if (splits_a_tce(book, range))
      return {base::fail(Errc::would_bisect, Stage::unmap, 0,
                         "unmap of [{:#x}, {:#x}] would cut a page of {} bytes, which is one TCE; nothing was unmapped",
                         range.start.value, range.last.value, book.page()),
              {}};
  BackendOpResult sum;
  for (TceBook& book : books_) {
    const auto inside = range.intersection(book.window().range);
    if (!inside) continue;
    const BackendOpResult one = unmap_in(book, *inside);
    sum.bytes.value += one.bytes.value;
    if (one.error) {
      sum.error = one.error;
      break;
    }
  }
  return sum;
}

Error SpaprSpace::unmap_error(int os_errno, IovaRange span, Bytes gone) noexcept {
  return base::fail(Errc::io_error, Stage::unmap, os_errno,
                    "VFIO_IOMMU_UNMAP_DMA of [{:#x}, {:#x}] failed with errno {}; {} bytes before it are gone",
                    span.start.value, span.last.value, os_errno, gone.value);
}

BackendOpResult SpaprSpace::unmap_in(TceBook& book, IovaRange range) noexcept {
  BackendOpResult sum;
  TceRun rest = book.run_of(range);
  while (const auto stretch = book.next_stretch(rest, hole_max)) {
    const IovaRange span = book.range_of(*stretch);
    if (const int why = unmap_call(span); why != 0) {
      sum.error = unmap_error(why, span, sum.bytes);
      return sum;
    }
    sum.bytes.value += leave(book, *stretch) * book.page();
    if (stretch->last == rest.last) break;
    rest.first = stretch->last + 1;
  }
  return sum;
}

Result<Bytes> SpaprSpace::unmap_all() noexcept {
  const BackendOpResult gone = unmap(IovaRange::everything());
  if (gone.error) return gone.error;
  return gone.bytes;
}

Result<RegionId> SpaprSpace::register_memory(const MemoryRange& memory) {
  const auto address = reinterpret_cast<std::uintptr_t>(memory.address);
  if (memory.length.value == 0 || !base::is_aligned(address | memory.length.value, facts_.granule.value))
    return base::fail(Errc::invalid_argument, Stage::pin, 0,
                      "memory at {:#x} of {} bytes cannot be registered: both must be multiples of {}, and the length "
                      "not 0",
                      address, memory.length.value, facts_.granule.value);
  if (memory.address == nullptr)
    return base::fail(Errc::unsupported, Stage::pin, 0,
                      "sPAPR maps process addresses; map the file into the process and register its address");
  regions_.reserve(regions_.size() + 1);
  Region region{.address = address, .length = memory.length.value, .held = {}, .registered = false};
  if (!version_1() && !groups_.empty()) {
    auto held = memory_.hold(region.address, region.length);
    if (!held) return held.error();
    region.held = *std::move(held);
    region.registered = true;
  }
  regions_.push_back(std::move(region));
  return RegionId{static_cast<std::uint32_t>(regions_.size())};
}

Result<void> SpaprSpace::unregister_memory(RegionId region) {
  if (region.value == 0 || region.value > regions_.size() || regions_[region.value - 1].length == 0)
    return base::fail(Errc::not_found, Stage::unpin, 0, "region {} is not registered with this space", region.value);
  Region& there = regions_[region.value - 1];
  // What TCEs still lead to stays registered, and goes with the last of them.
  if (there.registered) memory_.release(there.held);
  there = {};
  return {};
}

Result<std::vector<IovaRange>> SpaprSpace::usable_ranges() {
  std::vector<IovaRange> ranges;
  for (const TceBook& book : books_) ranges.push_back(book.window().range);
  return ranges;
}

Result<void> SpaprSpace::promise(std::span<const IovaRange>) {
  return base::fail(Errc::unsupported, Stage::reserve, 0,
                    "a sPAPR container cannot promise ranges; windows stay as they are until they are removed");
}

Headroom SpaprSpace::headroom() noexcept { return memlock_headroom(kernel_, MemlockAccount::process_locked); }

Bytes SpaprSpace::hand_to_kernel(IovaRange range) noexcept {
  Bytes sum{};
  for (TceBook& book : books_) {
    const auto inside = range.intersection(book.window().range);
    if (!inside) continue;
    const TceRun run = book.run_of(*inside);
    for (std::uint64_t i = run.first; i <= run.last; ++i) {
      const auto next = book.first_live({i, run.last});
      if (!next) break;
      i = *next;
      leave(book, {i, i});
      sum.value += book.page();
    }
  }
  return sum;
}

Result<void> SpaprSpace::clear_handed(IovaRange range) noexcept {
  for (const TceBook& book : books_) {
    const auto inside = range.intersection(book.window().range);
    if (!inside) continue;
    const TceRun run = book.run_of(*inside);
    if (book.first_live(run))
      return base::fail(Errc::busy, Stage::unmap, 0, "[{:#x}, {:#x}] was not handed to the kernel: something is mapped",
                        inside->start.value, inside->last.value);
    if (const int why = unmap_call(book.range_of(run)); why != 0)
      return explain_call(Stage::unmap, "VFIO_IOMMU_UNMAP_DMA", why);
  }
  return {};
}

}  // namespace iovane::backends::spapr
