#include "backends/stage1/table_format.hpp"

namespace iovane::backends::stage1 {

const char* to_string(Architecture architecture) noexcept {
  switch (architecture) {
    case Architecture::smmuv3: return "Arm SMMUv3";
    case Architecture::vtd: return "Intel VT-d";
    case Architecture::amd: return "AMD-Vi";
  }
  return "unknown";
}

}  // namespace iovane::backends::stage1
