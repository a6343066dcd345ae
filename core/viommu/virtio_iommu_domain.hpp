// Inside VirtioIommu: a guest domain, and what a driver is told about failures.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "viommu/virtio_iommu.hpp"

namespace iovane::viommu {

struct VirtioIommu::Domain {
  Domain(std::uint32_t number, const DomainConfig& config, bool is_bypass)
      : id{number}, bypass{is_bypass}, shadow{config} {}
  std::uint32_t id;
  bool bypass;
  bool dirty = false;
  std::uint32_t users = 0;
  std::vector<IovaRange> reserved;  // of all its endpoints
  ShadowDomain shadow;
};

inline void VirtioIommu::mark_dirty(Domain& domain) noexcept {
  if (std::exchange(domain.dirty, true)) return;
  dirty_.push_back(&domain);
}

/// What a driver is told about a failure of ours or of the host.
virtio::Status status_of(const Error& error) noexcept;

}  // namespace iovane::viommu
