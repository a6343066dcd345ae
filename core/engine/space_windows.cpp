// AddressSpace::windows(), with the lane held for each call.
#include "backends/spapr_tce/spapr_control.hpp"
#include "base/error_text.hpp"
#include "engine/out_of_memory.hpp"
#include "engine/space_cache.hpp"
#include "engine/space_core.hpp"

namespace iovane {

namespace engine {

Result<backends::SpaprControl*> SpaceCore::spapr() const {
  if (state_.closed) return closed_error();
  if (backends::SpaprControl* const control = state_.backend->spapr()) return control;
  return base::fail(Errc::unsupported, Stage::query, 0,
                    "{} has neither windows nor error handling; sPAPR has (backend \"spapr\")", facts_.backend);
}

Result<WindowLimits> SpaceCore::window_limits() {
  const LaneHold held{lane_};
  const auto control = spapr();
  if (!control) return control.error();
  return (*control)->limits();
}

Result<std::vector<Window>> SpaceCore::windows() {
  const LaneHold held{lane_};
  const auto control = spapr();
  if (!control) return control.error();
  return (*control)->windows();
}

Result<Window> SpaceCore::create_window(const WindowRequest& request) {
  const LaneHold held{lane_};
  const auto control = spapr();
  if (!control) return control.error();
  if (config_.layout == LayoutPolicy::engine_managed && request.page != state_.granule)
    return base::fail(Errc::unsupported, Stage::reserve, 0,
                      "a window with pages of {} bytes where the engine chooses IOVAs in multiples of {}: a map could "
                      "land in it that does not fit; choose IOVAs yourself (LayoutPolicy::fixed)",
                      request.page.value, state_.granule.value);
  auto made = (*control)->create_window(request);
  if (!made) return made;
  refresh_facts();
  if (const auto grown = refresh_usable(); !grown) {
    (void)(*control)->remove_window(made->range.start);
    refresh_facts();
    (void)refresh_usable();
    return grown.error();
  }
  return made;
}

Result<void> SpaceCore::remove_window(Iova start) {
  // Without the lane: it unmaps through it.
  if (SpaceCache* const open = cache()) open->evict(Bytes{~std::uint64_t{0}});
  const LaneHold held{lane_};
  const auto control = spapr();
  if (!control) return control.error();
  (void)executor_->flush_stale();
  if (const auto removed = (*control)->remove_window(start); !removed) return removed;
  refresh_facts();
  return refresh_usable();
}

}  // namespace engine

Result<Windows> AddressSpace::windows() const {
  if (const auto there = Windows{core_}.list(); !there) return there.error();
  return Windows{core_};
}

Result<WindowLimits> Windows::limits() const {
  return engine::or_out_of_memory(Stage::query, [&] { return core_->window_limits(); });
}
Result<std::vector<Window>> Windows::list() const {
  return engine::or_out_of_memory(Stage::query, [&] { return core_->windows(); });
}
Result<Window> Windows::create(const WindowRequest& request) const {
  return engine::or_out_of_memory(Stage::reserve, [&] { return core_->create_window(request); });
}
Result<void> Windows::remove(Iova start) const {
  return engine::or_out_of_memory(Stage::reserve, [&] { return core_->remove_window(start); });
}

}  // namespace iovane
