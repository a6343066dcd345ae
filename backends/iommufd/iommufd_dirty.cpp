// Dirty tracking on the I/O page tables of an IOAS.
//
// iommufd's unmap reports nothing, so what a mapping holds is read just before it goes, without clearing: the marks
// die with the mapping, and should the unmap fail, a later read finds them again. A device that writes to memory while
// it is being unmapped may leave a last write unrecorded; the kernel has no call that does both.
#include <algorithm>
#include <array>

#include "backends/iommufd/ioas_calls.hpp"
#include "backends/iommufd/iommufd_space.hpp"
#include "backends/kernel_error.hpp"
#include "backends/uapi/iommufd.hpp"
#include "base/error_text.hpp"

namespace iovane::backends::iommufd {
namespace {

namespace uapi = backends::uapi::iommufd;

// One read of a harvest: 128 MiB at 4 KiB.
constexpr std::size_t harvest_words = 512;

}  // namespace

int IommufdSpace::set_tracking(std::uint32_t table, bool on) noexcept {
  uapi::HwptSetDirtyTracking set{.flags = on ? uapi::hwpt_dirty_tracking_enable : 0, .hwpt_id = table};
  return call(shared_.kernel(), shared_.fd(), set);
}

Result<void> IommufdSpace::start_dirty_tracking(DirtyHarvest& harvest) {
  if (!options_.dirty_tracking)
    return base::fail(Errc::unsupported, Stage::query, 0,
                      "this address space was made without dirty tracking: its page tables cannot record writes; set "
                      "AddressSpaceConfig::dirty_tracking");
  for (std::size_t i = 0; i < own_tables_.size(); ++i) {
    const int why = set_tracking(own_tables_[i], true);
    if (why == 0) continue;
    while (i-- > 0) set_tracking(own_tables_[i], false);
    return explain_call(Stage::query, "HWPT_SET_DIRTY_TRACKING", why);
  }
  harvest_ = &harvest;
  return {};
}

Result<void> IommufdSpace::stop_dirty_tracking() {
  harvest_ = nullptr;
  int first = 0;
  for (const std::uint32_t table : own_tables_)
    if (const int why = set_tracking(table, false); first == 0) first = why;
  if (first != 0) return explain_call(Stage::query, "HWPT_SET_DIRTY_TRACKING", first);
  return {};
}

// Every table of the IOAS maps the same; the kernel ORs, so one bitmap collects them all.
int IommufdSpace::read_tables(const IovaRange& range, bool clear, std::span<std::uint64_t> bitmap) noexcept {
  for (const std::uint32_t table : own_tables_) {
    uapi::HwptGetDirtyBitmap get{.hwpt_id = table,
                                 .flags = clear ? 0 : uapi::hwpt_get_dirty_bitmap_no_clear,
                                 .iova = range.start.value,
                                 .length = range.length().value,
                                 .page_size = facts_.granule.value};
    get.data = reinterpret_cast<std::uintptr_t>(bitmap.data());
    if (const int why = call(shared_.kernel(), shared_.fd(), get); why != 0) return why;
  }
  return 0;
}

Result<void> IommufdSpace::read_dirty(const IovaRange& range, std::span<std::uint64_t> bitmap) noexcept {
  if (harvest_ == nullptr)
    return make_error(Errc::invalid_argument, Stage::query, "dirty tracking has not been started");
  if (bitmap.size() < bitmap_words(range, facts_.granule))
    return base::fail(Errc::invalid_argument, Stage::query, 0, "the bitmap has {} words, the range needs {}",
                      bitmap.size(), bitmap_words(range, facts_.granule));
  if (const int why = read_tables(range, true, bitmap); why != 0)
    return explain_call(Stage::query, "HWPT_GET_DIRTY_BITMAP", why);
  return {};
}

void IommufdSpace::harvest(const IovaRange& range) noexcept {
  IovaRange rest = range;
  while (const auto run = harvest_->mapped_run(rest)) {
    IovaRange part = *run;
    while (true) {
      std::array<std::uint64_t, harvest_words> bitmap{};
      const std::uint64_t span_max = harvest_words * 64 * facts_.granule.value - 1;
      part.last = Iova{part.start.value + std::min(run->last.value - part.start.value, span_max)};
      if (read_tables(part, false, bitmap) == 0)
        harvest_->take(part, std::span{bitmap}.first(bitmap_words(part, facts_.granule)));
      else
        harvest_->take_all(part);
      if (part.last == run->last) break;
      part.start = Iova{part.last.value + 1};
    }
    if (run->last >= rest.last) return;
    rest.start = Iova{run->last.value + 1};
  }
}

}  // namespace iovane::backends::iommufd
