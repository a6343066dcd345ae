#include "backends/backend.hpp"

namespace iovane::backends {

std::string_view to_string(Interface interface) noexcept {
  switch (interface) {
    case Interface::iommufd: return "iommufd";
    case Interface::type1_v2: return "type1";
    case Interface::type1_v1: return "type1-v1";
    case Interface::compat_v2: return "compat";
    case Interface::compat_v1: return "compat-v1";
    case Interface::spapr_v1: return "spapr-v1";
    case Interface::spapr_v2: return "spapr";
    case Interface::stage1: return "stage1";
  }
  return "unknown";
}

std::string_view to_string(Capability bit) noexcept {
  switch (bit) {
    case Capability::none: return "none";
    case Capability::explicit_pin: return "explicit_pin";
    case Capability::copy_reuses_pin: return "copy_reuses_pin";
    case Capability::cut_on_unmap: return "cut_on_unmap";
    case Capability::replace_in_place: return "replace_in_place";
    case Capability::parallel_map: return "parallel_map";
    case Capability::span_unmap: return "span_unmap";
    case Capability::choose_window: return "choose_window";
    case Capability::promise_ranges: return "promise_ranges";
    case Capability::file_memory: return "file_memory";
    case Capability::dirty_tracking: return "dirty_tracking";
    case Capability::mmio_memory: return "mmio_memory";
    case Capability::nesting: return "nesting";
    case Capability::map_is_store: return "map_is_store";
    case Capability::unmap_all: return "unmap_all";
  }
  return "unknown";
}

namespace {

Error no_dirty_tracking() noexcept {
  return make_error(Errc::unsupported, Stage::query, "this interface does not track dirty pages");
}

Error no_page_faults() noexcept {
  return make_error(Errc::unsupported, Stage::query,
                    "this interface does not deliver I/O page faults; only iommufd does");
}

Error no_fault_records() noexcept {
  return make_error(Errc::unsupported, Stage::query,
                    "this interface does not deliver fault records (the kernel logs them); only stage-1 mode on Arm "
                    "SMMUv3 does, from Linux 6.15 on");
}

}  // namespace

Result<std::size_t> BackendSpace::read_fault_records(std::span<FaultRecord>) noexcept { return no_fault_records(); }
Result<std::size_t> BackendSpace::read_page_faults(std::span<PageFault>) noexcept { return no_page_faults(); }
Result<void> BackendSpace::answer_page_fault(std::uint32_t, bool) noexcept { return no_page_faults(); }
Result<void> BackendSpace::start_dirty_tracking(DirtyHarvest&) { return no_dirty_tracking(); }
Result<void> BackendSpace::stop_dirty_tracking() { return no_dirty_tracking(); }
Result<void> BackendSpace::read_dirty(const IovaRange&, std::span<std::uint64_t>) noexcept {
  return no_dirty_tracking();
}

}  // namespace iovane::backends
