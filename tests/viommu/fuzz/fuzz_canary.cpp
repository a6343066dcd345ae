// A target that is wrong on purpose: a harness that does not find its fault would not find others'.
#include "fuzz_world.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  iovane::viommu::Tape tape{{data, size}};
  if (tape.take<std::uint8_t>() == 'c' && tape.take<std::uint8_t>() > 'z')
    iovane::viommu::fuzz_failed("the canary was found");
  return 0;
}
