#include "conformance/machine.hpp"

#include <cstdlib>

#include "conformance/lab_machine.hpp"

namespace iovane::test {

std::unique_ptr<Machine> make_machine() { return make_lab_machine(); }

}  // namespace iovane::test
