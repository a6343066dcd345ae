#include "pinning/budget.hpp"

#include <algorithm>

#include "base/error_text.hpp"
#include "pinning/memlock.hpp"

namespace iovane::pinning {

std::string_view to_string(BudgetRefusal::Limit which) noexcept {
  switch (which) {
    case BudgetRefusal::Limit::process: return "process";
    case BudgetRefusal::Limit::node: return "node";
    case BudgetRefusal::Limit::space: return "address-space";
  }
  return "unknown";
}

std::optional<std::uint64_t> ByteLimit::try_take(std::uint64_t bytes) noexcept {
  // relaxed throughout: a count; the memory that it stands for is ordered by other means.
  std::uint64_t used = used_.load(std::memory_order_relaxed);
  do {
    const std::uint64_t limit = limit_.load(std::memory_order_relaxed);
    if (used > limit || bytes > limit - used) return used;
    // Lock-free: a failed exchange means that another charge or return went through.
  } while (!used_.compare_exchange_weak(used, used + bytes, std::memory_order_relaxed, std::memory_order_relaxed));
  return std::nullopt;
}

void ByteLimit::give_back(std::uint64_t bytes) noexcept {
  used_.fetch_sub(bytes, std::memory_order_relaxed);  // relaxed: a count
}

PinBudget::PinBudget(const Limits& limits) noexcept : process_{limits.process.value} {
  for (std::size_t i = 0; i < nodes_max; ++i) {
    nodes_[i].set_limit(limits.node[i].value);
    if (limits.node[i].value != ByteLimit::unlimited) has_node_limits_ = true;
  }
}

PinBudget::Limits PinBudget::below_memlock(unsigned percent) noexcept {
  Limits limits;
  const auto state = read_memlock_state();
  if (!state) return limits;
  const std::uint64_t room = state->room_beside(std::max(state->locked, state->pinned));
  if (room != MemlockState::unlimited) limits.process = Bytes{room / 100 * std::min(percent, 100U)};
  return limits;
}

std::optional<BudgetRefusal> PinBudget::try_charge(std::uint8_t node, std::uint64_t bytes) noexcept {
  using Limit = BudgetRefusal::Limit;
  if (const auto used = process_.try_take(bytes))
    return BudgetRefusal{Limit::process, node, process_.limit(), *used, bytes};
  if (const auto used = nodes_[node].try_take(bytes)) {
    process_.give_back(bytes);
    return BudgetRefusal{Limit::node, node, nodes_[node].limit(), *used, bytes};
  }
  return std::nullopt;
}

void PinBudget::uncharge(std::uint8_t node, std::uint64_t bytes) noexcept {
  nodes_[node].give_back(bytes);
  process_.give_back(bytes);
}

Result<void> PinBudget::add_evictor(Evictor& evictor) noexcept {
  const std::lock_guard held{evictors_lock_};
  for (Evictor*& e : evictors_)
    if (e == nullptr) {
      e = &evictor;
      return {};
    }
  return base::fail(Errc::limit_reached, Stage::open, 0, "{} caches share this pin budget already", evictors_max);
}

void PinBudget::remove_evictor(Evictor& evictor) noexcept {
  const std::lock_guard held{evictors_lock_};
  for (Evictor*& e : evictors_)
    if (e == &evictor) e = nullptr;
}

std::uint64_t PinBudget::evict_elsewhere(const Evictor& asking, std::uint64_t bytes, std::uint8_t node) noexcept {
  // Held across the evictions, so that no cache goes away under us. An evictor takes its cache's lock; whoever holds
  // a cache's lock never waits for this one.
  const std::lock_guard held{evictors_lock_};
  std::uint64_t freed = 0;
  for (Evictor* e : evictors_)
    if (e != nullptr && e != &asking && freed < bytes) freed += e->evict(bytes - freed, node);
  return freed;
}

}  // namespace iovane::pinning
