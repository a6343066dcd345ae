// The running kernel and its edu devices, as tools/lab boots them.
#pragma once

#include <memory>

#include "conformance/machine.hpp"

namespace iovane::test {

std::unique_ptr<Machine> make_lab_machine(const MachineOptions& options);

}  // namespace iovane::test
