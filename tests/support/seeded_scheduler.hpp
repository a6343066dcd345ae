// Runs a few threads one at a time and decides at every yield point, by a seed, which goes on; can freeze one of them.
//
// The code under test is compiled with IOVANE_YIELD_POINTS. While a thread is frozen the others must finish: lock-free
// code lets them, code that waits for the frozen one runs into the bound on steps and the test fails.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <limits>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "base/yield_point.hpp"

namespace iovane::test {

class SeededScheduler {
 public:
  struct Freeze {
    std::size_t thread = std::numeric_limits<std::size_t>::max();
    std::uint64_t at_step = 0;  ///< of that thread, from 1
  };
  struct Report {
    bool others_finished = false;    ///< before the frozen thread went on; always true without a freeze
    bool froze = false;              ///< the step was reached
    std::uint64_t frozen_steps = 0;  ///< steps that others took meanwhile
    std::vector<std::uint64_t> steps;
    const char* frozen_at = "";
  };

  explicit SeededScheduler(std::uint64_t seed, std::uint64_t steps_max = 200000)
      : random_{seed}, steps_max_{steps_max} {}

  /// Runs the bodies to their end. Not reentrant; one scheduler at a time in a process.
  Report run(const std::vector<std::function<void()>>& bodies, Freeze freeze) {
    states_.assign(bodies.size(), State::ready);
    report_ = {};
    report_.steps.assign(bodies.size(), 0);
    freeze_ = freeze;
    active_ = this;
    // W.hook - release, pairs with R.hook in yield_point().
    base::yield_hook.store(&on_step, std::memory_order_release);
    current_ = pick();
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < bodies.size(); ++i)
      threads.emplace_back([this, i, &bodies] {
        {
          std::unique_lock lock{mutex_};
          mine_ = i;
          wake_.wait(lock, [&] { return current_ == i; });
        }
        bodies[i]();
        const std::lock_guard lock{mutex_};
        mine_ = none;
        states_[i] = State::done;
        current_ = pick();
        wake_.notify_all();
      });
    for (std::thread& t : threads) t.join();
    base::yield_hook.store(nullptr, std::memory_order_release);
    active_ = nullptr;
    if (!report_.froze) report_.others_finished = true;
    return report_;
  }

 private:
  enum class State { ready, frozen, done };
  static constexpr std::size_t none = std::numeric_limits<std::size_t>::max();

  static void on_step(const char* step) noexcept {
    if (mine_ != none && active_ != nullptr) active_->take_step(step);
  }

  void take_step(const char* step) {
    std::unique_lock lock{mutex_};
    const std::size_t me = mine_;
    const std::uint64_t n = ++report_.steps[me];
    if (states_[me] == State::ready && me == freeze_.thread && n == freeze_.at_step) {
      states_[me] = State::frozen;
      report_.froze = true;
      report_.frozen_at = step;
    } else if (report_.froze && !report_.others_finished && ++report_.frozen_steps > steps_max_) {
      thaw();  // the others are stuck: let everything end, the report says so
    }
    current_ = pick();
    if (current_ == me) return;
    wake_.notify_all();
    wake_.wait(lock, [&] { return current_ == me; });
  }

  void thaw() {
    for (State& s : states_)
      if (s == State::frozen) s = State::ready;
    freeze_ = {};
  }

  std::size_t pick() {
    std::vector<std::size_t> ready;
    for (std::size_t i = 0; i < states_.size(); ++i)
      if (states_[i] == State::ready) ready.push_back(i);
    if (ready.empty()) {
      bool frozen = false;
      for (const State s : states_) frozen |= s == State::frozen;
      if (!frozen) return none;
      report_.others_finished = true;
      thaw();
      return pick();
    }
    // Mostly the same thread goes on: a switch costs a futex round trip, and long stretches find more than ping-pong.
    if (random_() % 8 != 0)
      for (const std::size_t i : ready)
        if (i == current_) return i;
    return ready[random_() % ready.size()];
  }

  inline static SeededScheduler* active_ = nullptr;
  inline static thread_local std::size_t mine_ = none;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::mt19937_64 random_;
  std::uint64_t steps_max_;
  std::vector<State> states_;
  std::size_t current_ = none;
  Freeze freeze_;
  Report report_;
};

}  // namespace iovane::test
