// How much may be pinned: by this process, on each NUMA node, by each cache.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string_view>

#include "iovane/result.hpp"
#include "iovane/types.hpp"
#include "pinning/region.hpp"

namespace iovane::pinning {

/// Why a charge was refused: which limit, what it is, what is in use and what was needed, in bytes.
struct BudgetRefusal {
  enum class Limit : std::uint8_t { process, node, space };
  Limit which = Limit::process;
  std::uint8_t node = 0;
  std::uint64_t limit = 0;
  std::uint64_t used = 0;
  std::uint64_t need = 0;
};
std::string_view to_string(BudgetRefusal::Limit which) noexcept;

/// A count of bytes with a ceiling. Any thread; lock-free.
class ByteLimit {
 public:
  static constexpr std::uint64_t unlimited = ~std::uint64_t{0};

  ByteLimit() noexcept = default;
  explicit ByteLimit(std::uint64_t limit) noexcept : limit_{limit} {}
  /// Takes `bytes` if they fit; otherwise returns what was in use.
  std::optional<std::uint64_t> try_take(std::uint64_t bytes) noexcept;
  void give_back(std::uint64_t bytes) noexcept;
  std::uint64_t used() const noexcept { return used_.load(std::memory_order_relaxed); }    // relaxed: a number
  std::uint64_t limit() const noexcept { return limit_.load(std::memory_order_relaxed); }  // relaxed: a number
  /// A lower limit than what is in use stops new charges; nothing is taken away.
  void set_limit(std::uint64_t limit) noexcept { limit_.store(limit, std::memory_order_relaxed); }  // relaxed: ditto

 private:
  std::atomic<std::uint64_t> limit_{unlimited};
  std::atomic<std::uint64_t> used_{0};
};

/// Someone who can drop pins that nobody uses.
class Evictor {
 public:
  virtual ~Evictor() = default;
  /// Unpins unused regions (of `node`, unless that is any_node) until about `bytes` came free. Returns how many did.
  virtual std::uint64_t evict(std::uint64_t bytes, std::uint8_t node) noexcept = 0;
};
inline constexpr std::uint8_t any_node = 0xff;

/// The limits that all caches of a process share. Any thread. Outlives the caches.
class PinBudget {
 public:
  static constexpr std::size_t evictors_max = 64;

  struct Limits {
    Bytes process{ByteLimit::unlimited};
    std::array<Bytes, nodes_max> node = unlimited_nodes();
    static constexpr std::array<Bytes, nodes_max> unlimited_nodes() noexcept {
      std::array<Bytes, nodes_max> all{};
      for (Bytes& b : all) b = Bytes{ByteLimit::unlimited};
      return all;
    }
  };

  PinBudget() noexcept : PinBudget(Limits{}) {}
  explicit PinBudget(const Limits& limits) noexcept;
  /// Limits for this process: `percent` of what RLIMIT_MEMLOCK leaves now (the rest stays for io_uring, mlock and
  /// the like). Unlimited when the process may lock any amount (CAP_IPC_LOCK, or the limit is infinite).
  static Limits below_memlock(unsigned percent) noexcept;

  /// Charges the process and the node, or neither.
  std::optional<BudgetRefusal> try_charge(std::uint8_t node, std::uint64_t bytes) noexcept;
  void uncharge(std::uint8_t node, std::uint64_t bytes) noexcept;
  std::uint64_t used() const noexcept { return process_.used(); }
  std::uint64_t used_on(std::uint8_t node) const noexcept { return nodes_[node].used(); }
  bool has_node_limits() const noexcept { return has_node_limits_; }

  /// Caches that share this budget evict for each other.
  Result<void> add_evictor(Evictor& evictor) noexcept;
  void remove_evictor(Evictor& evictor) noexcept;
  /// Asks the others to make room. The caller holds no lock of its cache. Returns the bytes that came free.
  std::uint64_t evict_elsewhere(const Evictor& asking, std::uint64_t bytes, std::uint8_t node) noexcept;

 private:
  ByteLimit process_;
  std::array<ByteLimit, nodes_max> nodes_{};
  bool has_node_limits_ = false;
  std::mutex evictors_lock_;  // taken only when a limit has been reached
  std::array<Evictor*, evictors_max> evictors_{};
};

}  // namespace iovane::pinning
