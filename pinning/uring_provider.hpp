// Pins by io_uring's registered buffers: real pins on any kernel since 5.19, without an IOMMU.
#pragma once

#include <liburing.h>

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "iovane/result.hpp"
#include "pinning/provider.hpp"

namespace iovane::pinning {

/// A table of registered buffers in one ring. A pin's handle is {process address, buffer index}: the very pair that
/// IORING_OP_READ_FIXED and WRITE_FIXED take, so a lease from a map cache over this provider is what a caller's own
/// fixed-buffer I/O needs. The kernel keeps a buffer that is in use by a request until that request has completed, even
/// after unpin() returned.
///
/// io_uring pins for writing: memory that may only be read is bad_memory, whatever access was asked for.
/// Files are mapped shared by the provider for as long as they are pinned; their handle's address is in that mapping.
/// Any thread, several at a time: the kernel serialises registrations per ring. Not for rings with
/// IORING_SETUP_SINGLE_ISSUER or R_DISABLED, which refuse registration by other threads.
class UringProvider final : public PinProvider {
 public:
  static constexpr std::uint32_t buffers_max = 1U << 14;  // the kernel's IORING_MAX_REG_BUFFERS

  struct Config {
    /// The caller's ring; it has no registered buffers yet and outlives the provider. Null: a ring of the provider's.
    io_uring* ring = nullptr;
    /// Table entries: how many pins there can be at once.
    std::uint32_t buffers = buffers_max;
  };

  /// Errors: unsupported (no io_uring, or no sparse tables: before Linux 5.19), permission (sysctl
  /// kernel.io_uring_disabled, seccomp), busy (the ring has a table already), memlock_exceeded.
  static Result<std::unique_ptr<UringProvider>> open(const Config& config);
  static Result<std::unique_ptr<UringProvider>> open() { return open(Config{}); }
  /// Unregisters the whole table.
  ~UringProvider() override;

  const ProviderTraits& traits() const noexcept override { return traits_; }
  void pin(std::span<const PinRequest> requests, std::span<PinOutcome> outcomes) noexcept override;
  void unpin(std::span<const UnpinRequest> requests, std::span<Error> outcomes) noexcept override;

  /// The ring whose table this is, for I/O with the pinned buffers.
  io_uring& ring() noexcept { return *ring_; }
  static unsigned buffer_index(const PinHandle& handle) noexcept { return static_cast<unsigned>(handle.token); }

 private:
  struct RingOwner {
    io_uring ring{};
    ~RingOwner();
  };

  UringProvider(std::unique_ptr<RingOwner> own, io_uring* ring, std::uint32_t buffers);
  /// Up to `want` consecutive free table entries; how many there are. Next fit, so that batches stay together.
  std::uint32_t take_run(std::uint32_t want, std::uint32_t& first) noexcept;
  void give_back(std::uint32_t first, std::uint32_t count) noexcept;
  void pin_run(std::span<const PinRequest> requests, std::span<PinOutcome> outcomes, std::uint32_t first) noexcept;
  Result<void*> map_file(const PinRequest& request) noexcept;
  Error pin_error(int error, const PinRequest& request) const noexcept;

  std::unique_ptr<RingOwner> own_;
  io_uring* ring_;
  ProviderTraits traits_;
  std::mutex lock_;  // used_ only; never held across a system call
  std::vector<bool> used_;
  std::uint32_t next_ = 0;
};

}  // namespace iovane::pinning
