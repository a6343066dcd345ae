// Snapshots of any content: refused whole, or restored to something that saves as the same bytes.
#include "fuzz_world.hpp"
#include "viommu/domain_snapshot.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace iovane;
  using namespace iovane::viommu;
  static const GuestRam ram{1U << 20};
  GuestMemory memory;
  if (!memory.add(ram.config())) std::abort();
  const auto view = memory.view();
  RecordingTarget host;
  DomainConfig config;
  config.nodes_max = 128;
  ShadowDomain domain{config};
  if (!domain.attach(view, host)) std::abort();
  const auto restored = restore_domain(std::as_bytes(std::span{data, size}), view, domain);
  check_mirrored(domain, host);
  if (!restored && domain.index().leaves() != 0) fuzz_failed("a refused snapshot left mappings");
  return 0;
}
