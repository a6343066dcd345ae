// The slow calls of IOVA allocators: each call timed by itself. Counters are nanoseconds, the clock's own two reads
// (about 20 ns on a cloud VM) included.
//
//   churn   a random one of the live intervals is freed and another allocated, for 400,000 calls of each
//   cold    the first 100,000 allocations of a fresh allocator: nothing is in any magazine
//   hours   the population swings between a tenth and the whole, twelve times, with churn in between, as over a long
//           life; counters: span and idle bytes over live bytes at the end, where about half is live
#include <benchmark/benchmark.h>

#include <chrono>
#include <memory>
#include <string>

#include "base/latency_histogram.hpp"
#include "support/iova_workload.hpp"

namespace iovane::bench {
namespace {

using Clock = std::chrono::steady_clock;

class Timed {
 public:
  template <typename Call>
  auto operator()(Call&& call) {
    const auto begin = Clock::now();
    auto result = call();
    histogram_->record(static_cast<std::uint64_t>((Clock::now() - begin).count()));
    return result;
  }
  void report(benchmark::State& state, const std::string& what) const {
    state.counters[what + "_p50"] = static_cast<double>(histogram_->percentile(0.5));
    state.counters[what + "_p99.9"] = static_cast<double>(histogram_->percentile(0.999));
    state.counters[what + "_p99.99"] = static_cast<double>(histogram_->percentile(0.9999));
    state.counters[what + "_max"] = static_cast<double>(histogram_->greatest());
  }

 private:
  std::unique_ptr<base::LatencyHistogram> histogram_ = std::make_unique<base::LatencyHistogram>();
};

template <typename Peer>
void churn(benchmark::State& state, Lengths lengths, std::size_t live, unsigned calls) {
  Peer peer;
  peer.enter(0);
  Tenant<Peer> tenant{peer, lengths, live, 1};
  Timed allocating, freeing;
  for (auto _ : state) {
    for (unsigned i = 0; i < calls; ++i) {
      Interval& victim = tenant.live()[tenant.pick()];
      freeing([&] {
        peer.free(victim.start, victim.length);
        return 0;
      });
      const std::uint64_t length = tenant.template next_length<false>();
      victim = allocating([&] { return tenant.take(length); });
    }
  }
  allocating.report(state, "allocate");
  freeing.report(state, "free");
}

template <typename Peer>
void cold(benchmark::State& state, Lengths lengths) {
  Timed allocating;
  for (auto _ : state) {
    Peer peer;
    peer.enter(0);
    Tenant<Peer> tenant{peer, lengths, 0, 1};
    for (unsigned i = 0; i < 100'000; ++i) {
      const std::uint64_t length = tenant.template next_length<false>();
      tenant.live().push_back(allocating([&] { return tenant.take(length); }));
    }
  }
  allocating.report(state, "allocate");
}

// Iovane only: the others do not say what they hold.
void hours(benchmark::State& state, Lengths lengths, std::size_t most) {
  using Peer = IovanePeer<true>;
  Peer peer;
  Tenant<Peer> tenant{peer, lengths, most / 10, 1};
  auto& live = tenant.live();
  double span_worst = 0;
  double idle_worst = 0;
  std::uint64_t operations = 0;
  for (auto _ : state) {
    for (unsigned swing = 0; swing < 12; ++swing) {
      const std::size_t target = swing % 2 == 0 ? most : swing == 11 ? most / 2 : most / 10;
      while (live.size() != target) {
        if (live.size() < target) {
          live.push_back(tenant.take(tenant.next_length<false>()));
        } else {
          std::swap(live[tenant.pick()], live.back());
          peer.free(live.back().start, live.back().length);
          live.pop_back();
        }
        ++operations;
      }
      for (std::size_t i = 0; i < 4 * most; ++i) tenant.churn<false>();
      operations += 8 * most;
      const auto stats = peer.allocator().stats();
      if (swing % 2 != 0) continue;
      const auto bytes = static_cast<double>(stats.live.value);
      span_worst = std::max(span_worst, static_cast<double>(stats.span->span()) / bytes);
      idle_worst = std::max(idle_worst, static_cast<double>(stats.idle.value) / bytes);
    }
  }
  const auto stats = peer.allocator().stats();
  const auto live_bytes = static_cast<double>(stats.live.value);
  state.counters["operations"] = static_cast<double>(operations);
  state.counters["span_over_live_full"] = span_worst;  // at the tops, where all of `most` are live
  state.counters["idle_over_live_full"] = idle_worst;
  state.counters["span_over_live_half"] = static_cast<double>(stats.span->span()) / live_bytes;
  state.counters["idle_over_live_half"] = static_cast<double>(stats.idle.value) / live_bytes;
  state.counters["metadata_per_live"] =
      static_cast<double>(stats.metadata.value) / static_cast<double>(stats.live_intervals);
}

template <typename Peer>
void add() {
  for (const Lengths lengths : all_lengths) {
    const std::string of = std::string{Peer::name} + "/" + name_of(lengths);
    for (const std::size_t live : {std::size_t{10'000}, std::size_t{1'000'000}}) {
      if (!fits<Peer>(lengths, live)) continue;
      // Linear walks: fewer calls, or the row takes minutes.
      const bool linear = std::string_view{Peer::name} == "linux" && lengths != Lengths::k4 && lengths != Lengths::k64;
      benchmark::RegisterBenchmark(
          ("churn/" + of + "/live:" + std::to_string(live)).c_str(),
          [=](benchmark::State& state) { churn<Peer>(state, lengths, live, linear ? 10'000 : 400'000); })
          ->Iterations(1)
          ->Unit(benchmark::kMillisecond);
    }
    if (fits<Peer>(lengths, 100'000))
      benchmark::RegisterBenchmark(("cold/" + of).c_str(), [=](benchmark::State& state) { cold<Peer>(state, lengths); })
          ->Iterations(1)
          ->Unit(benchmark::kMillisecond);
  }
}

[[maybe_unused]] const bool added = [] {
  for_each_peer([]<typename Peer>() { add<Peer>(); });
  for (const Lengths lengths : {Lengths::k4, Lengths::m2, Lengths::mixed, Lengths::mixed_any})
    for (const std::size_t most : {std::size_t{10'000}, std::size_t{1'000'000}})
      benchmark::RegisterBenchmark(
          ("hours/iovane/" + std::string{name_of(lengths)} + "/most:" + std::to_string(most)).c_str(),
          [=](benchmark::State& state) { hours(state, lengths, most); })
          ->Iterations(1)
          ->Unit(benchmark::kMillisecond);
  return true;
}();

}  // namespace
}  // namespace iovane::bench
