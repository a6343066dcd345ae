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

}  // namespace iovane::backends
