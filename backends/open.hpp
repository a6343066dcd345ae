// Opening a backend by name.
#pragma once

#include <memory>
#include <string>

#include "backends/backend.hpp"
#include "backends/kernel_call.hpp"

namespace iovane::backends {

/// Which interface, and which descriptor when one was handed in.
struct BackendChoice {
  /// "auto", or to_string() of an interface: "iommufd", "type1" (v2), "type1-v1", "compat", "compat-v1",
  /// "spapr" (v2), "spapr-v1", "stage1".
  std::string name = "auto";
  /// /dev/iommu for iommufd, stage1 and compat, a VFIO container for type1 and spapr. With it, `auto` is an error: the
  /// caller knows what he hands in.
  DescriptorSource descriptor{};
};

/// The interface of that name; invalid_argument, with the list of names, when there is none.
Result<Interface> parse_interface(std::string_view name);

/// Opens the interface that `choice` names. `auto` asks probe_host(), which attaches no device but one for a moment, to
/// see whether its IOMMU nests, and opens what it picks; no_device with every interface's reason when the host has none
/// (the caller then offers the software IOMMU: that is another Kernel, not another backend). `kernel` outlives the
/// backend.
Result<std::unique_ptr<Backend>> open_backend(Kernel& kernel, const BackendChoice& choice);

}  // namespace iovane::backends
