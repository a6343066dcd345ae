#include "conformance/machine.hpp"

#include <cstdlib>
#include <string_view>

#include "conformance/lab_machine.hpp"
#include "conformance/model_machine.hpp"

namespace iovane::test {

namespace {

bool in_lab() {
  const char* const lab = std::getenv("IOVANE_LAB");
  return lab != nullptr && std::string_view{lab} == "1";
}

}  // namespace

std::unique_ptr<Machine> make_machine(const MachineOptions& options) {
  return in_lab() ? make_lab_machine(options) : make_model_machine(options);
}

bool machine_can_have(backends::Interface interface) {
  const bool spapr = interface == backends::Interface::spapr_v1 || interface == backends::Interface::spapr_v2;
#if defined(__powerpc64__)
  return !in_lab() || spapr;
#elif defined(__aarch64__)
  return !in_lab() || !spapr;
#else
  // No emulated IOMMU of this architecture nests; which POWER has no iommufd for at all.
  return !in_lab() || (!spapr && interface != backends::Interface::stage1);
#endif
}

}  // namespace iovane::test
