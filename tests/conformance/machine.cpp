#include "conformance/machine.hpp"

#include <cstdlib>
#include <string_view>

#include "conformance/lab_machine.hpp"
#include "conformance/model_machine.hpp"

namespace iovane::test {

std::unique_ptr<Machine> make_machine(const MachineOptions& options) {
  const char* const lab = std::getenv("IOVANE_LAB");
  if (lab != nullptr && std::string_view{lab} == "1") return make_lab_machine(options);
  return make_model_machine(options);
}

}  // namespace iovane::test
