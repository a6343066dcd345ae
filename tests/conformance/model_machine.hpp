// The software IOMMU and its simulated devices.
#pragma once

#include <memory>

#include "conformance/machine.hpp"

namespace iovane::test {

std::unique_ptr<Machine> make_model_machine(const MachineOptions& options);

}  // namespace iovane::test
