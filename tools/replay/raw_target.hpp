// The baselines: kernel calls made one after the other, with nothing around them.
#pragma once

#include <cstdint>
#include <memory>
#include <variant>

#include "backends/uapi/iommufd.hpp"
#include "backends/uapi/vfio.hpp"
#include "replay/guest_memory.hpp"
#include "replay/host.hpp"
#include "replay/target.hpp"

namespace iovane::replay {

enum class RawUnit : std::uint8_t {
  event,  ///< one call per recorded event
  leaf,   ///< one call per 4 KiB entry, as a VMM that follows a guest's page table entries does
};
enum class RawMap : std::uint8_t {
  memory,  ///< map process memory: each call pins
  copy,    ///< share the pins of registered memory (iommufd)
};

/// Keeps no index and checks nothing: the floor that the engine is measured against. The interface is opened and the
/// device attached as the engine does it; then one map and one unmap are made through the backend and their calls
/// recorded, and the loop repeats those two calls with other addresses. So it makes the backend's own calls, on any
/// interface, without the backend.
class RawTarget final : public ReplayTarget {
 public:
  /// `host` and `memory` outlive it. Errors: those of opening and attaching; unsupported where pins cannot be shared.
  static Result<std::unique_ptr<RawTarget>> open(Host& host, const GuestMemory& memory, RawUnit unit, RawMap map);
  ~RawTarget() override;

  bool batches() const noexcept override { return false; }
  void run(std::span<const Operation> batch, std::span<Verdict> verdicts) noexcept override;
  Result<Bytes> unmap_all() noexcept override;

 private:
  /// One recorded call each, ready to be repeated.
  using MapCall = std::variant<backends::uapi::iommufd::IoasMap, backends::uapi::iommufd::IoasCopy,
                               backends::uapi::vfio::Type1DmaMap>;
  using UnmapCall = std::variant<backends::uapi::iommufd::IoasUnmap, backends::uapi::vfio::Type1DmaUnmap>;
  class Recorder;

  RawTarget(Host& host, RawUnit unit) noexcept;
  Result<void> record_calls(const GuestMemory& memory, RawMap map);
  Verdict map(IovaRange range, std::uint64_t memory) noexcept;
  Verdict unmap(IovaRange range) noexcept;
  Verdict run_one(const Operation& op) noexcept;

  Host& host_;
  RawUnit unit_;
  std::unique_ptr<Recorder> recorder_;
  std::unique_ptr<backends::Backend> backend_;
  std::unique_ptr<backends::BackendSpace> space_;
  int fd_ = -1;
  MapCall map_;
  UnmapCall unmap_;
  std::uint64_t memory_base_ = 0;  // what the map call names for guest memory offset 0
};

}  // namespace iovane::replay
