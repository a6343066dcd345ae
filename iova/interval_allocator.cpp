#include "iova/interval_allocator.hpp"

#include <algorithm>
#include <limits>

#include "base/checked_math.hpp"
#include "base/error_text.hpp"
#include "iova/allocator_core.hpp"

namespace iovane::iova {
namespace {

constexpr std::uint64_t all_ones = std::numeric_limits<std::uint64_t>::max();

IovaRange to_bytes(UnitRange range, unsigned granule_log2) noexcept {
  return {Iova{range.first << granule_log2},
          Iova{(range.last << granule_log2) | ((std::uint64_t{1} << granule_log2) - 1)}};
}

Bytes saturated(std::uint64_t units, unsigned granule_log2) noexcept {
  return Bytes{units > (all_ones >> granule_log2) ? all_ones : units << granule_log2};
}

// Whole granules only: nothing when an end lies inside a granule or the range is malformed.
std::optional<UnitRange> to_units(const IovaRange& range, unsigned granule_log2) noexcept {
  const std::uint64_t mask = (std::uint64_t{1} << granule_log2) - 1;
  if (!range.well_formed() || (range.start.value & mask) != 0 || (range.last.value & mask) != mask) return std::nullopt;
  return UnitRange{range.start.value >> granule_log2, range.last.value >> granule_log2};
}

// Ascending, disjoint, joined where adjacent, cut to whole granules.
Result<std::vector<UnitRange>> normalise(std::span<const IovaRange> windows, unsigned granule_log2) {
  std::vector<IovaRange> sorted(windows.begin(), windows.end());
  std::sort(sorted.begin(), sorted.end());
  for (std::size_t i = 0; i < sorted.size(); ++i) {
    if (!sorted[i].well_formed())
      return base::fail(Errc::invalid_argument, Stage::validate, 0,
                        "usable window [{:#x}, {:#x}] ends before it starts", sorted[i].start.value,
                        sorted[i].last.value);
    if (i > 0 && sorted[i - 1].overlaps(sorted[i]))
      return base::fail(Errc::invalid_argument, Stage::validate, 0,
                        "usable windows [{:#x}, {:#x}] and [{:#x}, {:#x}] overlap; give each address once",
                        sorted[i - 1].start.value, sorted[i - 1].last.value, sorted[i].start.value,
                        sorted[i].last.value);
  }
  std::vector<UnitRange> units;
  const std::uint64_t mask = (std::uint64_t{1} << granule_log2) - 1;
  for (std::size_t i = 0; i < sorted.size();) {
    IovaRange joined = sorted[i++];
    while (i < sorted.size() && joined.precedes_directly(sorted[i])) joined.last = sorted[i++].last;
    const auto start = base::align_up(joined.start.value, mask + 1);
    if (!start || joined.last.value < mask) continue;
    // The last granule that is wholly inside.
    const std::uint64_t last = (joined.last.value & mask) == mask ? joined.last.value >> granule_log2
                                                                  : (joined.last.value >> granule_log2) - 1;
    if ((joined.last.value >> granule_log2) == 0 && (joined.last.value & mask) != mask) continue;
    const std::uint64_t first = *start >> granule_log2;
    if (first <= last) units.push_back({first, last});
  }
  if (units.size() > usable_windows_max)
    return base::fail(Errc::invalid_argument, Stage::validate, 0, "{} usable windows; at most {}", units.size(),
                      usable_windows_max);
  return units;
}

Error no_thread_cache() noexcept {
  return base::fail(Errc::limit_reached, Stage::reserve, 0,
                    "more than {} threads use this allocator at once, a thread uses more than {} allocators, or the "
                    "metadata limit leaves no room for another thread",
                    AllocatorCore::threads_max, allocators_per_thread);
}

}  // namespace

static_assert(usable_windows_max == WindowList::capacity);

IntervalAllocator::IntervalAllocator(std::unique_ptr<AllocatorCore> core, unsigned granule_log2) noexcept
    : core_{std::move(core)}, id_{core_->id()}, granule_log2_{granule_log2} {}

IntervalAllocator::~IntervalAllocator() = default;

Result<std::unique_ptr<IntervalAllocator>> IntervalAllocator::create(const IntervalAllocatorConfig& config) {
  if (!base::is_power_of_two(config.granule.value) || config.granule < granule_min)
    return base::fail(Errc::invalid_argument, Stage::validate, 0,
                      "granule of {} bytes; expected a power of two, at least {}", config.granule.value,
                      granule_min.value);
  const unsigned granule_log2 = floor_log2(config.granule.value);
  auto core = AllocatorCore::create({.granule_log2 = granule_log2,
                                     .direction = config.direction,
                                     .metadata_limit_bytes = config.metadata_limit.value,
                                     .magazines = config.magazines});
  if (!core) return core.error();
  std::unique_ptr<IntervalAllocator> allocator{new IntervalAllocator{std::move(*core), granule_log2}};
  if (const auto set = allocator->set_usable(config.windows); !set) return set.error();
  return allocator;
}

std::uint64_t IntervalAllocator::allocate_slow(Bytes length, AllocateOptions options, Error& why) noexcept {
  const auto refuse = [&](Error error) {
    why = error;
    return nothing_popped;
  };
  const std::uint64_t mask = (std::uint64_t{1} << granule_log2_) - 1;
  const std::uint64_t align = options.align.value;
  if (length.value == 0 || (length.value & mask) != 0) [[unlikely]]
    return refuse(base::fail(Errc::invalid_argument, Stage::validate, 0,
                             "length of {} bytes; expected a positive multiple of the granule, {}", length.value,
                             mask + 1));
  if ((align & (align - 1)) != 0) [[unlikely]]
    return refuse(base::fail(Errc::invalid_argument, Stage::validate, 0,
                             "alignment of {} bytes; expected a power of two", align));
  if (options.ceiling.value < mask) [[unlikely]]
    return refuse(base::fail(Errc::iova_exhausted, Stage::reserve, 0,
                             "the ceiling {:#x} is below the first granule's end", options.ceiling.value));
  const Unit last_max =
      options.ceiling == iova_max ? all_ones >> granule_log2_ : ((options.ceiling.value - mask) >> granule_log2_);
  const unsigned align_log2 = align <= mask + 1 ? 0 : floor_log2(align) - granule_log2_;
  const Answer answer = core_->allocate({length.value >> granule_log2_, align_log2, last_max});
  if (answer.outcome == Outcome::done) [[likely]]
    return answer.where.first << granule_log2_;
  switch (answer.outcome) {
    case Outcome::too_many_threads: return refuse(no_thread_cache());
    case Outcome::no_memory:
      return refuse(base::fail(Errc::out_of_memory, Stage::reserve, 0,
                               "the allocator's metadata limit is reached; raise metadata_limit or free intervals"));
    default:
      return refuse(base::fail(Errc::iova_exhausted, Stage::reserve, 0,
                               "no free range of {} bytes aligned to {} at or below {:#x}", length.value,
                               std::max(align, mask + 1), options.ceiling.value));
  }
}

Result<IovaRange> IntervalAllocator::allocate_contiguous(std::span<const Bytes> parts, std::span<Iova> starts,
                                                         AllocateOptions options) noexcept {
  if (parts.size() != starts.size())
    return base::fail(Errc::invalid_argument, Stage::validate, 0, "{} parts but room for {} starts", parts.size(),
                      starts.size());
  std::uint64_t total = 0;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const auto rounded = base::align_up(parts[i].value, granule().value);
    const auto sum = rounded ? base::checked_add(total, *rounded) : std::nullopt;
    if (!sum) return base::fail(Errc::overflow, Stage::validate, 0, "the parts' lengths pass 2^64 at part {}", i);
    starts[i] = Iova{total};
    total = *sum;
  }
  const auto whole = allocate(Bytes{total}, options);
  if (whole)
    for (Iova& start : starts) start.value += whole->start.value;
  return whole;
}

Result<void> IntervalAllocator::free_slow(IovaRange range) noexcept {
  const auto units = to_units(range, granule_log2_);
  if (!units) [[unlikely]]
    return base::fail(Errc::invalid_argument, Stage::release, 0,
                      "[{:#x}, {:#x}] is not a range of whole granules of {} bytes", range.start.value,
                      range.last.value, granule().value);
  const Answer answer = core_->free(*units);
  if (answer.outcome == Outcome::done) [[likely]]
    return {};
  const IovaRange where = to_bytes(answer.where, granule_log2_);
  switch (answer.outcome) {
    case Outcome::too_many_threads: return no_thread_cache();
    case Outcome::partial:
      return base::fail(Errc::would_bisect, Stage::release, 0,
                        "[{:#x}, {:#x}] is not the live interval [{:#x}, {:#x}] that it touches; free that one whole",
                        range.start.value, range.last.value, where.start.value, where.last.value);
    case Outcome::contended:
      return base::fail(Errc::busy, Stage::release, 0, "another thread is freeing or allocating [{:#x}, {:#x}] now",
                        range.start.value, range.last.value);
    default:
      return base::fail(Errc::not_found, Stage::release, 0,
                        "nothing live begins at {:#x}: freed before, or never allocated here", range.start.value);
  }
}

Result<void> IntervalAllocator::claim(IovaRange range) noexcept {
  const auto units = to_units(range, granule_log2_);
  if (!units)
    return base::fail(Errc::invalid_argument, Stage::validate, 0,
                      "[{:#x}, {:#x}] is not a range of whole granules of {} bytes", range.start.value,
                      range.last.value, granule().value);
  const Answer answer = core_->claim(*units);
  const IovaRange where = to_bytes(answer.where, granule_log2_);
  switch (answer.outcome) {
    case Outcome::done: return {};
    case Outcome::too_many_threads: return no_thread_cache();
    case Outcome::hole:
      return base::fail(Errc::iova_reserved, Stage::reserve, 0,
                        "[{:#x}, {:#x}] touches [{:#x}, {:#x}], which is not usable", range.start.value,
                        range.last.value, where.start.value, where.last.value);
    case Outcome::live:
      return base::fail(Errc::iova_busy, Stage::reserve, 0, "[{:#x}, {:#x}] overlaps the live interval [{:#x}, {:#x}]",
                        range.start.value, range.last.value, where.start.value, where.last.value);
    case Outcome::contended:
      return base::fail(Errc::iova_busy, Stage::reserve, 0,
                        "[{:#x}, {:#x}] overlaps [{:#x}, {:#x}], which another thread is allocating or freeing now",
                        range.start.value, range.last.value, where.start.value, where.last.value);
    default:
      return base::fail(Errc::out_of_memory, Stage::reserve, 0,
                        "the allocator's metadata limit is reached; raise metadata_limit or free intervals");
  }
}

std::optional<IovaRange> IntervalAllocator::find(Iova address) const noexcept {
  const auto found = core_->find(address.value >> granule_log2_);
  if (!found) return std::nullopt;
  return to_bytes(*found, granule_log2_);
}

std::optional<IovaRange> IntervalAllocator::next_live(Iova from) const noexcept {
  const auto found = core_->next_live(from.value >> granule_log2_);
  if (!found) return std::nullopt;
  return to_bytes(*found, granule_log2_);
}

Result<std::vector<IovaRange>> IntervalAllocator::set_usable(std::span<const IovaRange> windows) {
  const auto units = normalise(windows, granule_log2_);
  if (!units) return units.error();
  std::vector<UnitRange> stranded;
  const Answer answer = core_->set_usable(*units, stranded);
  if (answer.outcome == Outcome::too_many_threads) return no_thread_cache();
  if (answer.outcome != Outcome::done)
    return base::fail(Errc::out_of_memory, Stage::reserve, 0,
                      "the allocator's metadata limit is reached; raise metadata_limit or free intervals");
  std::vector<IovaRange> report;
  report.reserve(stranded.size());
  for (const UnitRange& range : stranded) report.push_back(to_bytes(range, granule_log2_));
  return report;
}

std::vector<IovaRange> IntervalAllocator::usable() const {
  std::vector<IovaRange> windows;
  for (const UnitRange& range : core_->usable()) windows.push_back(to_bytes(range, granule_log2_));
  return windows;
}

void IntervalAllocator::trim() noexcept { core_->reclaim_idle(); }

AllocatorStats IntervalAllocator::stats() const noexcept {
  const CoreStats s = core_->stats();
  AllocatorStats out{.live_intervals = s.live_intervals,
                     .live = saturated(s.live_units, granule_log2_),
                     .idle = saturated(s.idle_units, granule_log2_),
                     .usable = saturated(s.usable_units, granule_log2_),
                     .metadata = Bytes{s.metadata_bytes},
                     .metadata_high_water = Bytes{s.metadata_high_water},
                     .span = std::nullopt};
  if (s.span) out.span = to_bytes(*s.span, granule_log2_);
  return out;
}

}  // namespace iovane::iova
