// Lane: who works on an address space right now.
//
// Purpose: one thread at a time executes batches of an address space, without a lock that could make a submitter wait.
//   Whoever finds the lane idle takes it and works; whoever finds it taken leaves its work with the holder and goes on
//   (flat combining, Hendler et al., SPAA 2010; here with a list of nodes instead of a publication array).
// Roles: any thread may enter(); the holder alone runs nodes and touches `carried_`.
// Progress: enter() with a work node is lock-free: a CAS loop in which each retry means that another thread's CAS took
//   effect. Work left behind is run by the holder; a holder that stops running delays it, as in any combining scheme.
//   A turn is bounded: after service_max nodes of others the holder calls for relief and serves on until that arrives.
// Death: a thread with LaneClaims may end while it holds the lane. Who inherits its claims goes on with the turn by
//   take_over(): `running_` says which node was being run, and LaneHeir settles what it was about. Those who wait ask
//   LaneHeir::look() now and then whether that is due.
// State word: 0 = free; 1 = held, nothing waiting; otherwise held, and the address of the newest waiting node.
// Invariants:
//   I1 a node is in at most one list, from its publication until the holder unlinks it, before it runs the node;
//   I2 the holder never leaves (held -> free) with a node waiting: leaving is a CAS from exactly 1;
//   I3 nodes are run in the order of their publication (each taken list is reversed first).
// Linearization points: publication: the CAS in enter(). Taking: the CAS 0 -> 1, or the grant of a hand-over node.
// Edges: A.take pairs with R.leave (the next holder sees all the last one did) and A.collect with R.publish (the holder
//   sees the node's work). A hand-over is ordered by base::OneShot.
// ABA: a node address can come back between two loads of the word, but a publisher's CAS only needs the word to be the
//   current top, which it then is; the links are written before the CAS by their owner alone.
// Reclamation: none. A node belongs to its owner again once it was run (work) or granted (hand-over).
// Proven by: tests/unit/lane_test.cpp, tests/stress/engine_stress_test.cpp (TSan).
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "base/cacheline.hpp"
#include "base/futex.hpp"
#include "engine/lane_claims.hpp"

namespace iovane::engine {

/// Something that waits for the lane: work that the holder runs for its owner, or a wish to hold the lane oneself.
class LaneNode {
 public:
  enum class Kind : std::uint8_t { work, hand_over };
  explicit LaneNode(Kind kind) noexcept : kind_{kind} {}
  virtual ~LaneNode() = default;
  LaneNode(const LaneNode&) = delete;
  LaneNode& operator=(const LaneNode&) = delete;

 protected:
  /// Kind::work: does the work; called by the lane's holder, on the holder's thread. `for_another`: the holder came for
  /// something else and found the node waiting. What it returns, if anything, is fired when the lane is through with
  /// the node, which may be gone from then on.
  virtual base::OneShot* run([[maybe_unused]] bool for_another) noexcept { return nullptr; }
  /// The same, where a thread that has ended had begun it. After LaneHeir::recover().
  virtual base::OneShot* resume() noexcept { return nullptr; }

 private:
  friend class Lane;
  LaneNode* next_ = nullptr;
  Kind kind_;
};

/// Called by a lane's holder that has run `service_max` nodes of others in one turn, once per turn: whoever answers
/// asks for the lane with hold(), and the holder's turn ends there.
class LaneRelief {
 public:
  virtual ~LaneRelief() = default;
  virtual void call() noexcept = 0;
};

/// Sees to it that no thread's end keeps a lane held.
class LaneHeir {
 public:
  virtual ~LaneHeir() = default;
  /// Called by those who have waited for the lane for a while: if its holder has ended, takes it over. Without the
  /// lane.
  virtual void look() noexcept = 0;
  /// Called by the lane's new holder: brings what the lane protects to where a holder may leave it.
  virtual void recover() noexcept = 0;
};

class alignas(base::cacheline_bytes) Lane {
 public:
  static constexpr std::uint32_t service_max = 64;

  /// Before the lane is used. Null: a turn lasts as long as work arrives.
  void set_relief(LaneRelief* relief) noexcept { relief_ = relief; }
  /// Once, before the lane is used; it lives as long as the lane. Null: no thread that may end enters the lane.
  void set_heir(LaneHeir* heir) noexcept {
    heir_.store(heir, std::memory_order_release);  // R.heir - pairs with A.heir: what it consists of
  }

  /// Publishes `node` (Kind::work) or, when the lane was free, runs it and all that arrives meanwhile. True when this
  /// thread ran it.
  bool enter(LaneNode& node) noexcept {
    if (!take_or_publish(node)) return false;
    if (my_lane_claims != nullptr) [[unlikely]]
      my_lane_claims->add(*this, nullptr);
    running_ = &node;
    finish(node.run(false));
    leave();
    return true;
  }

  /// Holds the lane for the calling thread, waiting for it if need be. Pair with leave().
  void hold() noexcept {
    Waiter waiter;
    LaneClaims* const claims = my_lane_claims;
    if (take_or_publish(waiter)) {
      if (claims != nullptr) claims->add(*this, nullptr);
      return;
    }
    if (claims != nullptr) claims->add(*this, &waiter.granted());
    (void)wait_for(waiter.granted());
    if (claims == nullptr) return;
    claims->remove(*this);
    claims->add(*this, nullptr);
  }

  /// Waits for what the lane's holder fires; false when `timeout` ran out first. Negative: no end.
  bool wait_for(base::OneShot& event, std::chrono::nanoseconds timeout = std::chrono::nanoseconds{-1}) noexcept {
    using Clock = std::chrono::steady_clock;
    if (event.spin()) return true;
    const Clock::time_point start = timeout.count() > 0 ? Clock::now() : Clock::time_point{};
    for (;;) {
      std::chrono::nanoseconds left{-1};
      if (timeout.count() >= 0) {
        left = timeout - (timeout.count() > 0 ? Clock::now() - start : std::chrono::nanoseconds{0});
        if (left.count() <= 0) return event.has_fired();
      }
      const bool watching = heir_.load(std::memory_order_acquire) != nullptr;  // A.heir
      if (watching && (left.count() < 0 || left > death_watch)) left = death_watch;
      if (event.wait_for(left)) return true;
      if (watching) look();
    }
  }
  /// For those who wait in their own way: if the holder has ended, its heir goes on. Without the lane.
  void look() noexcept {
    if (LaneHeir* const heir = heir_.load(std::memory_order_acquire)) heir->look();  // A.heir
  }
  static constexpr std::chrono::milliseconds death_watch{20};

  /// Gives the lane up after running everything that waits, or hands it to a waiting hold().
  void leave() noexcept {
    std::uint32_t served = 0;
    for (;;) {
      while (carried_ != nullptr) {
        LaneNode* const node = carried_;
        carried_ = node->next_;
        if (node->kind_ == LaneNode::Kind::hand_over) {
          if (my_lane_claims != nullptr) [[unlikely]]
            my_lane_claims->remove(*this);
          static_cast<Waiter*>(node)->grant();  // the lane stays held; it and carried_ are the waiter's now
          return;
        }
        running_ = node;
        finish(node->run(true));
        if (++served == service_max && relief_ != nullptr) relief_->call();
      }
      std::uintptr_t held = held_word;
      // R.leave - release, pairs with A.take. relaxed on failure: A.collect below orders what it brings.
      if (word_.compare_exchange_strong(held, free_word, std::memory_order_release, std::memory_order_relaxed)) {
        if (my_lane_claims != nullptr) [[unlikely]]
          my_lane_claims->remove(*this);
        return;
      }
      // A.collect - acquire, pairs with R.publish.
      carried_ = reversed(word_.exchange(held_word, std::memory_order_acquire));
    }
  }

  /// Goes on with the turn of a thread that has ended. By the one who inherits its claims; leaves the lane.
  void take_over() noexcept {
    if (LaneHeir* const heir = heir_.load(std::memory_order_acquire)) heir->recover();  // A.heir
    if (running_ != nullptr) finish(running_->resume());
    leave();
  }

 private:
  static constexpr std::uintptr_t free_word = 0;
  static constexpr std::uintptr_t held_word = 1;

  class Waiter final : public LaneNode {
   public:
    Waiter() noexcept : LaneNode{Kind::hand_over} {}
    base::OneShot& granted() noexcept { return granted_; }
    void grant() noexcept { granted_.fire(); }

   private:
    base::OneShot granted_;
  };

  void finish(base::OneShot* done) noexcept {
    running_ = nullptr;  // before it is fired: the node may go then
    if (done != nullptr) done->fire();
  }

  /// True when the lane was free and is now the caller's; otherwise the node waits in it.
  bool take_or_publish(LaneNode& node) noexcept {
    // relaxed: only a guess for the CAS.
    std::uintptr_t seen = word_.load(std::memory_order_relaxed);
    for (;;) {
      if (seen == free_word) {
        // A.take - acquire, pairs with R.leave.
        if (word_.compare_exchange_weak(seen, held_word, std::memory_order_acquire, std::memory_order_relaxed))
          return true;
      } else {
        node.next_ = seen == held_word ? nullptr : reinterpret_cast<LaneNode*>(seen);
        // R.publish - release, pairs with A.collect: the holder sees the node and what it stands for.
        if (word_.compare_exchange_weak(seen, reinterpret_cast<std::uintptr_t>(&node), std::memory_order_release,
                                        std::memory_order_relaxed))
          return false;
      }
    }
  }

  static LaneNode* reversed(std::uintptr_t word) noexcept {
    LaneNode* oldest = nullptr;
    for (auto* node = reinterpret_cast<LaneNode*>(word); node != nullptr;) {
      LaneNode* const next = node->next_;
      node->next_ = oldest;
      oldest = node;
      node = next;
    }
    return oldest;
  }

  std::atomic<std::uintptr_t> word_{free_word};
  LaneRelief* relief_ = nullptr;
  LaneNode* carried_ = nullptr;  // the holder's: nodes taken from the word and not run yet, oldest first
  LaneNode* running_ = nullptr;  // the holder's: what it is running
  std::atomic<LaneHeir*> heir_{nullptr};
};

/// Holds a lane for a scope.
class LaneHold {
 public:
  explicit LaneHold(Lane& lane) noexcept : lane_{lane} { lane_.hold(); }
  ~LaneHold() { lane_.leave(); }
  LaneHold(const LaneHold&) = delete;
  LaneHold& operator=(const LaneHold&) = delete;

 private:
  Lane& lane_;
};

}  // namespace iovane::engine
