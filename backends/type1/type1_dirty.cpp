// Dirty tracking of a type1 container. The kernel counts everything that is pinned for a device as written, for as long
// as a device is attached that does not report its own writes (plain PCI devices never do), so that each read names
// every mapped page again. An unmap reports what it removes in the same call.
#include <cerrno>
#include <vector>

#include "backends/type1/type1_space.hpp"
#include "backends/uapi/vfio.hpp"
#include "base/error_text.hpp"
#include "base/fault_point.hpp"

namespace iovane::backends::type1 {
namespace {

namespace uapi = backends::uapi::vfio;

struct UnmapWithBitmap {
  static constexpr unsigned long request = uapi::Type1DmaUnmap::request;
  uapi::Type1DmaUnmap unmap{};
  uapi::Bitmap bitmap{};
};
static_assert(sizeof(UnmapWithBitmap) == sizeof(uapi::Type1DmaUnmap) + sizeof(uapi::Bitmap));

struct GetBitmap {
  static constexpr unsigned long request = uapi::DirtyBitmap::request;
  uapi::DirtyBitmap dirty{};
  uapi::DirtyBitmapGet get{};
};
static_assert(sizeof(GetBitmap) == sizeof(uapi::DirtyBitmap) + sizeof(uapi::DirtyBitmapGet));

uapi::Bitmap bitmap_at(std::span<std::uint64_t> words, Bytes granule) noexcept {
  uapi::Bitmap bitmap{.pgsize = granule.value, .size = words.size_bytes()};
  bitmap.data = reinterpret_cast<std::uintptr_t>(words.data());
  return bitmap;
}

}  // namespace

int Type1Space::set_tracking(bool on) noexcept {
  uapi::DirtyBitmap set{.flags = on ? uapi::dirty_pages_flag_start : uapi::dirty_pages_flag_stop};
  return call(kernel_, container_.get(), set);
}

Result<void> Type1Space::start_dirty_tracking(DirtyHarvest& harvest) {
  if (!options_.dirty_tracking)
    return make_error(Errc::unsupported, Stage::query,
                      "this address space was made without dirty tracking; set AddressSpaceConfig::dirty_tracking");
  if (compat() || version_1())
    return base::fail(Errc::unsupported, Stage::query, 0,
                      "{} does not track dirty pages; only iommufd and type1 (version 2) do",
                      to_string(facts_.interface));
  if (groups_.empty())
    return make_error(Errc::no_device, Stage::query,
                      "a type1 container tracks dirty pages only while a device is attached; attach one first");
  if (const int why = set_tracking(true); why != 0)
    return explain_call(Stage::query, "VFIO_IOMMU_DIRTY_PAGES(START)", why);
  harvest_ = &harvest;
  return {};
}

Result<void> Type1Space::stop_dirty_tracking() {
  harvest_ = nullptr;
  if (groups_.empty()) return {};  // the container forgot it with its last group
  if (const int why = set_tracking(false); why != 0)
    return explain_call(Stage::query, "VFIO_IOMMU_DIRTY_PAGES(STOP)", why);
  return {};
}

Result<void> Type1Space::read_dirty(const IovaRange& range, std::span<std::uint64_t> bitmap) noexcept {
  if (harvest_ == nullptr)
    return make_error(Errc::invalid_argument, Stage::query, "dirty tracking has not been started");
  const std::uint64_t words = bitmap_words(range, facts_.granule);
  if (bitmap.size() < words)
    return base::fail(Errc::invalid_argument, Stage::query, 0, "the bitmap has {} words, the range needs {}",
                      bitmap.size(), words);
  GetBitmap get{.dirty = {.flags = uapi::dirty_pages_flag_get_bitmap},
                .get = {.iova = range.start.value, .size = range.length().value}};
  get.dirty.argsz = sizeof get;
  get.get.bitmap = bitmap_at(bitmap.first(words), facts_.granule);
  if (const int why = call(kernel_, container_.get(), get); why != 0)
    return explain_call(Stage::query, "VFIO_IOMMU_DIRTY_PAGES(GET_BITMAP)", why);
  return {};
}

// Run by run: the bitmap of one call over a range with holes would have bits for the holes, terabytes of them perhaps.
// What lies between the runs (pieces of a map that is being undone) goes without a bitmap.
BackendOpResult Type1Space::unmap_tracked(IovaRange range) noexcept {
  BackendOpResult sum;
  IovaRange rest = range;
  while (const auto run = harvest_->mapped_run(rest)) {
    const BackendOpResult one = unmap_run(*run);
    sum.bytes.value += one.bytes.value;
    sum.error = one.error;
    if (one.error) return sum;
    if (run->last >= range.last) break;
    rest.start = Iova{run->last.value + 1};
  }
  if (sum.bytes.value == range.span() + 1) return sum;
  const BackendOpResult others = unmap_once(range);
  sum.bytes.value += others.bytes.value;
  sum.error = others.error;
  return sum;
}

BackendOpResult Type1Space::unmap_run(IovaRange run) noexcept {
  int why = 0;
  try {
    if (base::fault_now(base::FaultKind::allocation)) throw std::bad_alloc{};
    std::vector<std::uint64_t> words(bitmap_words(run, facts_.granule));
    UnmapWithBitmap unmap{
        .unmap = {.flags = uapi::dma_unmap_flag_get_dirty_bitmap, .iova = run.start.value, .size = run.length().value},
        .bitmap = bitmap_at(words, facts_.granule)};
    unmap.unmap.argsz = sizeof unmap;
    why = call(kernel_, container_.get(), unmap);
    if (why == 0) {
      live_bytes_ -= unmap.unmap.size;
      harvest_->take(run, words);
      return {{}, Bytes{unmap.unmap.size}};
    }
  } catch (...) {
    // No memory for a bitmap: the unmap matters more than an exact answer.
  }
  // Whatever was wrong with the bitmap (a kernel's limit on its size), the plain unmap has its own verdict.
  BackendOpResult plain = unmap_once(run);
  if (why == EFAULT && !plain.error && plain.bytes.value == 0) {
    // The call had unmapped, and could not write its answer back.
    plain.bytes = run.length();
    live_bytes_ -= plain.bytes.value;
  }
  if (plain.bytes.value != 0) harvest_->take_all(run);
  return plain;
}

}  // namespace iovane::backends::type1
