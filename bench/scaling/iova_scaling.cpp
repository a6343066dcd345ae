// IOVA allocators with one and with two threads, and intervals that one thread allocates and the other frees.
//
// Each iteration lets the threads work for a fixed time; items_per_second counts pairs of all of them. Compare
// threads:2 with threads:1 of the same row. "cross": one allocates and hands batches of 64 over, the other frees;
// threads:2 only.
#include <benchmark/benchmark.h>

#include <array>
#include <atomic>
#include <barrier>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/spsc_ring.hpp"
#include "support/iova_workload.hpp"

namespace iovane::bench {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::milliseconds slice{20};

enum class Shape { pair, churn, cross };

template <typename Peer>
class Crew {
 public:
  Crew(Shape shape, Lengths lengths, std::size_t live, unsigned threads)
      : shape_{shape}, lengths_{lengths}, barrier_{threads + 1}, pairs_(threads) {
    if (!ring_.allocate(4096)) std::abort();
    for (unsigned t = 0; t < threads; ++t) members_.emplace_back([=, this] { member(t, live / threads); });
    barrier_.arrive_and_wait();  // everybody has its live intervals
  }
  ~Crew() {
    stop_.store(true, std::memory_order_relaxed);  // relaxed: the barrier orders it
    barrier_.arrive_and_wait();
    for (std::thread& t : members_) t.join();
  }
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  std::uint64_t run() {
    until_ = Clock::now() + slice;
    barrier_.arrive_and_wait();
    barrier_.arrive_and_wait();
    std::uint64_t sum = 0;
    for (const Count& count : pairs_) sum += count.value;
    return sum;
  }

 private:
  struct alignas(128) Count {
    std::uint64_t value = 0;
  };

  void member(unsigned number, std::size_t live) {
    peer_.enter(number);
    Tenant<Peer> tenant{peer_, lengths_, shape_ == Shape::cross ? 0 : live, number * 1'000'003U + 1};
    barrier_.arrive_and_wait();
    for (;;) {
      barrier_.arrive_and_wait();
      if (stop_.load(std::memory_order_relaxed)) break;
      std::uint64_t done = 0;
      if (shape_ == Shape::cross) {
        done = number == 0 ? produce(tenant) : consume();
      } else {
        done = is_mixed(lengths_) ? work<false>(tenant) : work<true>(tenant);
      }
      pairs_[number].value = done;
      barrier_.arrive_and_wait();
    }
  }

  template <bool one_length>
  std::uint64_t work(Tenant<Peer>& tenant) {
    std::uint64_t done = 0;
    do {
      for (unsigned i = 0; i < 256; ++i) {
        if (shape_ == Shape::pair) {
          tenant.template pair<one_length>();
        } else {
          tenant.template churn<one_length>();
        }
      }
      done += 256;
    } while (Clock::now() < until_);
    return done;
  }

  static constexpr std::size_t batch = 64;

  std::uint64_t produce(Tenant<Peer>& tenant) {
    std::array<Interval, batch> out;
    do {
      for (Interval& i : out) i = tenant.take(tenant.template next_length<false>());
      for (std::size_t sent = 0; sent < batch;) {
        sent += ring_.stage(std::span{out}.subspan(sent));
        ring_.publish();
      }
    } while (Clock::now() < until_);
    ended_.store(true, std::memory_order_release);  // pairs with the acquire in consume()
    return 0;
  }

  std::uint64_t consume() {
    std::array<Interval, batch> in;
    std::uint64_t done = 0;
    for (;;) {
      const bool last = ended_.load(std::memory_order_acquire);
      const std::size_t n = ring_.pop(in);
      for (std::size_t i = 0; i < n; ++i) peer_.free(in[i].start, in[i].length);
      done += n;
      if (n == 0 && last) break;
    }
    ended_.store(false, std::memory_order_relaxed);  // relaxed: the barrier orders it
    return done;
  }

  Shape shape_;
  Lengths lengths_;
  Peer peer_;
  base::SpscRing<Interval> ring_;
  std::barrier<> barrier_;
  std::vector<Count> pairs_;
  std::atomic<bool> stop_{false};
  std::atomic<bool> ended_{false};
  Clock::time_point until_;
  std::vector<std::thread> members_;
};

std::string kept_key;             // NOLINT: the main thread only
std::shared_ptr<void> kept_crew;  // the last one, kept while iterations are being counted

template <typename Peer>
void measure(benchmark::State& state, Shape shape, Lengths lengths, std::size_t live, unsigned threads) {
  const std::string key = std::string{Peer::name} + name_of(lengths) + std::to_string(live) + "/" +
                          std::to_string(threads) + "/" + std::to_string(static_cast<int>(shape));
  if (key != kept_key) {
    kept_crew.reset();
    kept_crew = std::make_shared<Crew<Peer>>(shape, lengths, live, threads);
    kept_key = key;
  }
  auto& crew = *static_cast<Crew<Peer>*>(kept_crew.get());
  std::uint64_t pairs = 0;
  for (auto _ : state) {
    const auto begin = Clock::now();
    pairs += crew.run();
    state.SetIterationTime(std::chrono::duration<double>(Clock::now() - begin).count());
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(pairs));
}

template <typename Peer>
void add() {
  const auto row = [](const char* shape, Shape s, Lengths lengths, std::size_t live, unsigned threads) {
    if (!fits<Peer>(lengths, live)) return;
    benchmark::RegisterBenchmark((std::string{shape} + "/" + Peer::name + "/" + name_of(lengths) +
                                  "/threads:" + std::to_string(threads) + "/live:" + std::to_string(live))
                                     .c_str(),
                                 [=](benchmark::State& state) { measure<Peer>(state, s, lengths, live, threads); })
        ->UseManualTime()
        ->Unit(benchmark::kMillisecond);
  };
  for (const unsigned threads : {1U, 2U}) {
    for (const Lengths lengths : all_lengths) {
      row("pair", Shape::pair, lengths, 0, threads);
      for (const std::size_t live : {std::size_t{10'000}, std::size_t{1'000'000}})
        row("churn", Shape::churn, lengths, live, threads);
    }
  }
  for (const Lengths lengths : all_lengths) row("cross", Shape::cross, lengths, 0, 2);
}

[[maybe_unused]] const bool added = [] {
  for_each_peer([]<typename Peer>() { add<Peer>(); });
  return true;
}();

}  // namespace
}  // namespace iovane::bench
