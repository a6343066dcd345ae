#include "viommu/shadow_target.hpp"

namespace iovane::viommu {

Result<void> ShadowTarget::track_dirty(bool on) {
  if (!on) return {};
  return make_error(Errc::unsupported, Stage::query, "this target cannot record what devices write");
}

Result<void> ShadowTarget::take_dirty(const VisitDirty&) {
  return make_error(Errc::unsupported, Stage::query, "this target cannot record what devices write");
}

}  // namespace iovane::viommu
