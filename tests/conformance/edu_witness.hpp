// The witness on a real kernel: QEMU's educational PCI device, driven through its VFIO region.
#pragma once

#include <cstdint>
#include <memory>

#include "backends/backend.hpp"
#include "backends/kernel.hpp"
#include "conformance/witness.hpp"

namespace iovane::test {

/// Switches memory decoding and bus mastering on and maps the registers. Its buffer is only reachable by DMA, so each
/// transfer goes through a scratch page that it maps in `space` for the moment. Null when the device is no edu.
/// `space` outlives the witness and keeps the device attached.
std::unique_ptr<Witness> make_edu_witness(backends::Kernel& kernel, backends::BackendSpace& space,
                                          const backends::AttachedDevice& device);

/// Where the witness maps its scratch page; tests leave these granules alone.
inline constexpr Iova witness_scratch{0x3f00'0000};

}  // namespace iovane::test
