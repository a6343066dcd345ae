// A guest's IOMMU driver, small, for each front end, with the front end it talks to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "iovane/result.hpp"
#include "iovane/types.hpp"
#include "replay/plan.hpp"
#include "replay/target.hpp"
#include "viommu/guest_memory.hpp"
#include "viommu/shadow_target.hpp"

namespace iovane::replay {

/// Where the guest's memory for I/O begins; below it lies what its driver builds.
inline constexpr std::uint64_t guest_ram_start = std::uint64_t{1} << 32;

/// Guest RAM for page tables, queues and lists: zero at first, costs what is touched.
class GuestTables {
 public:
  static constexpr std::uint64_t bytes = std::uint64_t{1} << 30;

  /// Errors: out_of_memory.
  static Result<std::unique_ptr<GuestTables>> create();
  GuestTables(const GuestTables&) = delete;
  GuestTables& operator=(const GuestTables&) = delete;
  ~GuestTables();

  std::byte* data() const noexcept { return data_; }
  void store(std::uint64_t gpa, std::uint64_t value) const noexcept {
    // relaxed: front end and guest share a thread here.
    __atomic_store_n(reinterpret_cast<std::uint64_t*>(data_ + gpa), value, __ATOMIC_RELAXED);
  }
  std::uint64_t load(std::uint64_t gpa) const noexcept {
    return __atomic_load_n(reinterpret_cast<const std::uint64_t*>(data_ + gpa), __ATOMIC_RELAXED);
  }

 private:
  explicit GuestTables(std::byte* data) noexcept : data_{data} {}
  std::byte* data_;
};

class FrontEndGuest {
 public:
  FrontEndGuest() = default;
  FrontEndGuest(const FrontEndGuest&) = delete;
  FrontEndGuest& operator=(const FrontEndGuest&) = delete;
  virtual ~FrontEndGuest() = default;

  virtual bool batches() const noexcept = 0;
  /// Puts the device behind the front end into a domain of its own, empty.
  virtual Result<void> attach(viommu::ShadowTarget& target) = 0;
  /// Takes it out.
  virtual Result<void> detach(viommu::ShadowTarget& target) = 0;
  /// Writes at most 64 operations into guest memory, as a driver does before it notifies.
  virtual void write(std::span<const Operation> batch) noexcept = 0;
  /// Notifies once of what was written, and waits for the answers. No protocol says how much an unmap removed: its
  /// verdict has what it asked for.
  virtual void notify(std::span<const Operation> batch, std::span<Verdict> verdicts) noexcept = 0;
};

std::unique_ptr<FrontEndGuest> make_virtio_iommu_guest(const viommu::GuestMemory& memory, std::size_t batch_max);
std::unique_ptr<FrontEndGuest> make_vtd_guest(const viommu::GuestMemory& memory, const GuestTables& tables, bool each);
std::unique_ptr<FrontEndGuest> make_papr_guest(const viommu::GuestMemory& memory, const GuestTables& tables);

}  // namespace iovane::replay
