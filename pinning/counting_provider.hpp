// A provider that pins nothing and counts everything: exact books for tests and the floor for benchmarks.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>

#include "pinning/provider.hpp"

namespace iovane::pinning {

/// Keeps a book of what is pinned, byte for byte; gives out addresses that are never the same twice; fails on demand.
/// Any thread.
class CountingProvider final : public PinProvider {
 public:
  struct Config {
    ProviderTraits traits{.name = "counting", .files = true};
    /// Pins beyond this many bytes fail with memlock_exceeded.
    Bytes memlock_max{~std::uint64_t{0}};
    /// Look for double pins: linear in the number of pins, so benchmarks switch it off.
    bool find_double_pins = true;
  };

  struct Counts {
    std::uint64_t pin_calls = 0;
    std::uint64_t pins = 0;
    std::uint64_t unpin_calls = 0;
    std::uint64_t unpins = 0;
    std::uint64_t bytes_pinned = 0;  ///< now
    std::uint64_t bytes_pinned_ever = 0;
    std::uint64_t double_pins = 0;   ///< pins of memory that had a pin already
    std::uint64_t wrong_unpins = 0;  ///< unpins of what was not pinned
  };

  CountingProvider() noexcept : CountingProvider(Config{}) {}
  explicit CountingProvider(const Config& config) noexcept : config_{config} {}

  const ProviderTraits& traits() const noexcept override { return config_.traits; }
  void pin(std::span<const PinRequest> requests, std::span<PinOutcome> outcomes) noexcept override;
  void unpin(std::span<const UnpinRequest> requests, std::span<Error> outcomes) noexcept override;

  Counts counts() const;
  /// No pin made from now on gets an address below this.
  std::uint64_t next_address() const;
  /// Whether the handle belongs to a pin that is live now and covers the range.
  bool is_pinned(const MemoryRange& range, std::uint64_t address) const;

  /// The n-th element from now on (1 is the next; pins and unpins count together) and the `times` - 1 after it fail;
  /// n = 0 switches it off.
  void fail_nth(std::uint64_t n, std::uint64_t times = 1) noexcept;
  /// Pins that touch this range fail with bad_memory, as memory that is not there.
  void set_hole(const MemoryRange& hole);
  /// Runs inside pin(), before anything happens: lets a test act while a pin is under way. Not while calls run.
  void set_pin_hook(std::function<void(const PinRequest&)> hook) { pin_hook_ = std::move(hook); }

 private:
  bool should_fail() noexcept;

  Config config_;
  mutable std::mutex lock_;
  std::map<std::uint64_t, MemoryRange> by_address_;
  Counts counts_;
  std::uint64_t next_address_ = std::uint64_t{1} << 20;
  MemoryRange hole_{};
  std::uint64_t fail_in_ = 0;
  std::uint64_t fail_times_ = 0;
  std::function<void(const PinRequest&)> pin_hook_;
};

}  // namespace iovane::pinning
