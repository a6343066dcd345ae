// Snapshots of domains and states of devices, of any content, as they are and with their head and checksum put right,
// since no mutation finds those: refused whole, or restored to something that saves as the same bytes.
#include <algorithm>
#include <vector>

#include "fuzz_world.hpp"
#include "viommu/domain_snapshot.hpp"
#include "viommu/papr.hpp"
#include "viommu/state_bytes.hpp"
#include "viommu/virtio_iommu.hpp"

namespace {

using namespace iovane;
using namespace iovane::viommu;

void restore(std::span<const std::byte> bytes, bool exact) {
  static const GuestRam ram{1U << 20};
  GuestMemory memory;
  if (!memory.add(ram.config())) std::abort();
  const auto view = memory.view();
  RecordingTarget host;
  DomainConfig config;
  config.nodes_max = 128;
  config.exact = exact;
  ShadowDomain domain{config};
  if (!domain.attach(view, host)) std::abort();
  const auto restored = restore_domain(bytes, view, domain);
  check_mirrored(domain, host);
  if (!restored && domain.index().leaves() != 0) fuzz_failed("a refused snapshot left mappings");
  if (!restored) return;
  ShadowDomain again{config};
  const auto saved = save_domain(domain);
  if (!saved || !restore_domain(*saved, view, again)) fuzz_failed("what was saved cannot be restored");
  if (*save_domain(again) != *saved) fuzz_failed("restored, it saves as other bytes");
}

void put(std::vector<std::byte>& bytes, std::size_t at, std::uint64_t value, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) bytes[at + i] = static_cast<std::byte>(value >> (8 * i));
}

// Bytes behind a head that is right, and before a checksum that is.
std::vector<std::byte> framed(std::uint64_t magic, std::span<const std::byte> bytes) {
  StateWriter out{magic, state_version};
  for (const std::byte b : bytes) out.put(static_cast<std::uint8_t>(b));
  return out.finish();
}

void restore_virtio_iommu(std::span<const std::byte> bytes) {
  static const GuestRam ram{1U << 20};
  GuestMemory memory;
  if (!memory.add(ram.config())) std::abort();
  RecordingTarget host;
  VirtioIommuConfig config;
  config.domain.nodes_max = 128;
  config.domains_max = 8;
  VirtioIommu device{memory, config};
  device.set_features(device.features());
  if (!device.add_endpoint(1, &host, {}) || !device.add_endpoint(2, &host, {})) std::abort();
  if (device.restore_state(bytes) && !device.restore_state(*device.save_state()))
    fuzz_failed("what was saved cannot be restored");
  for (const std::uint32_t id : {1U, 2U}) static_cast<void>(device.remove_endpoint(id));
  if (!host.held().empty()) fuzz_failed("something is left on the host");
}

void restore_papr(std::span<const std::byte> bytes) {
  static const GuestRam ram{1U << 20};
  GuestMemory memory;
  if (!memory.add(ram.config())) std::abort();
  RecordingTarget host;
  PaprTce papr{memory, nullptr};
  PhbConfig config;
  config.dma32_bytes = 1U << 24;
  config.domain.nodes_max = 128;
  config.table_bytes_max = 1U << 20;
  if (!papr.add_phb(config) || !papr.add_device(0, &host)) std::abort();
  if (papr.restore_state(bytes) && !papr.restore_state(papr.save_state()))
    fuzz_failed("what was saved cannot be restored");
  check_mirrored(*papr.domain(0), host);
  static_cast<void>(papr.remove_device(0, &host));
  if (!host.held().empty()) fuzz_failed("something is left on the host");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto bytes = std::as_bytes(std::span{data, size});
  restore(bytes, false);
  if (size < 1) return 0;
  if ((data[0] & 0xcU) == 4) return restore_virtio_iommu(framed(virtio_iommu_state_magic, bytes.subspan(1))), 0;
  if ((data[0] & 0xcU) == 8) return restore_papr(framed(papr_state_magic, bytes.subspan(1))), 0;
  const bool whole_pages = (data[0] & 1U) != 0;
  const std::size_t count = (size - 1) / 32;
  std::vector<std::byte> valid(32 + count * 32 + 8);
  std::copy_n(bytes.begin() + 1, count * 32, valid.begin() + 32);
  put(valid, 0, snapshot_magic, 8);
  put(valid, 8, snapshot_version, 4);
  put(valid, 12, 12, 4);
  put(valid, 16, 64, 4);
  put(valid, 24, count, 8);
  if (whole_pages)  // most random ranges are none
    for (std::size_t at = 32; at < 32 + count * 32; at += 32) {
      for (const std::size_t field : {at, at + 16}) valid[field] = std::byte{0}, valid[field + 1] &= std::byte{0xf0};
      valid[at + 8] = std::byte{0xff}, valid[at + 9] |= std::byte{0x0f};
      put(valid, at + 24, 1 + static_cast<std::uint64_t>(valid[at + 24]) % 3, 8);
    }
  put(valid, valid.size() - 8, snapshot_checksum(std::span{valid}.first(valid.size() - 8)), 8);
  restore(valid, (data[0] & 2U) != 0);
  return 0;
}
