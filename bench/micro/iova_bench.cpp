// IOVA allocators side by side, one thread: time per pair of allocate and free.
//
//   pair       allocate, free
//   batch      256 allocations, then 256 frees in the same order; per pair
//   churn      free a random one of the live intervals, allocate another
//   claim      claim and free a fixed range, round robin over 4096 neighbours
//   find       which live interval holds an address; random over all
// The row's name says peer, lengths and how many intervals are live meanwhile. "empty" is the harness: a peer that does
// nothing. Counters of churn, from iovane's statistics: span_over_live, metadata bytes per live interval.
#include <benchmark/benchmark.h>

#include <any>
#include <memory>
#include <string>

#include "support/iova_workload.hpp"

namespace iovane::bench {
namespace {

class EmptyPeer {
 public:
  static constexpr const char* name = "empty";
  static constexpr std::uint64_t bytes_max = ~std::uint64_t{0};
  void enter(unsigned /*thread*/) {}
  std::uint64_t allocate(std::uint64_t length) {
    next_ += length;
    benchmark::DoNotOptimize(next_);
    return next_;
  }
  void free(std::uint64_t start, std::uint64_t length) { benchmark::DoNotOptimize(start + length); }

 private:
  std::uint64_t next_ = granule;
};

template <typename Peer>
struct World {
  World(Lengths lengths, std::size_t live) {
    peer.enter(0);
    tenant = std::make_unique<Tenant<Peer>>(peer, lengths, live, 1);
  }
  Peer peer;
  std::unique_ptr<Tenant<Peer>> tenant;
};

// The last world, kept for the rows that follow: building one with a million intervals takes seconds.
struct Kept {
  std::string key;
  std::shared_ptr<void> world;
};
Kept kept;  // NOLINT: one thread

template <typename Peer>
World<Peer>& world(Lengths lengths, std::size_t live) {
  const std::string key = std::string{Peer::name} + name_of(lengths) + std::to_string(live);
  if (kept.key != key) {
    kept.world.reset();
    kept.world = std::make_shared<World<Peer>>(lengths, live);
    kept.key = key;
  }
  return *static_cast<World<Peer>*>(kept.world.get());
}

enum class Shape { pair, batch, churn };

template <typename Peer, bool one_length>
void run(benchmark::State& state, Shape shape, Tenant<Peer>& tenant) {
  switch (shape) {
    case Shape::pair:
      for (auto _ : state) tenant.template pair<one_length>();
      break;
    case Shape::batch:
      while (state.KeepRunningBatch(Tenant<Peer>::batch)) tenant.template batch_pair<one_length>();
      break;
    case Shape::churn:
      for (auto _ : state) tenant.template churn<one_length>();
      break;
  }
}

template <typename Peer>
void measure(benchmark::State& state, Shape shape, Lengths lengths, std::size_t live) {
  World<Peer>& w = world<Peer>(lengths, live);
  if (is_mixed(lengths)) {
    run<Peer, false>(state, shape, *w.tenant);
  } else {
    run<Peer, true>(state, shape, *w.tenant);
  }
  if constexpr (requires { w.peer.allocator(); }) {
    const auto stats = w.peer.allocator().stats();
    if (shape == Shape::churn && stats.span) {
      state.counters["span_over_live"] =
          static_cast<double>(stats.span->span()) / static_cast<double>(stats.live.value);
      state.counters["metadata_per_live"] =
          static_cast<double>(stats.metadata.value) / static_cast<double>(stats.live_intervals);
    }
  }
}

template <typename Peer>
void measure_claim(benchmark::State& state, Lengths lengths, std::size_t live) {
  World<Peer>& w = world<Peer>(lengths, live);
  const std::uint64_t length = draw_length(lengths, 0);
  const std::uint64_t base = std::uint64_t{1} << 33;  // nothing is allocated there: top-down from far above
  std::uint64_t turn = 0;
  for (auto _ : state) {
    const std::uint64_t start = base + (turn++ * 1237 % 4096) * length;
    if (!w.peer.claim(start, length)) {
      state.SkipWithError("this peer has put live intervals where the row claims");
      break;
    }
    w.peer.free(start, length);
  }
}

template <typename Peer>
void measure_find(benchmark::State& state, Lengths lengths, std::size_t live) {
  World<Peer>& w = world<Peer>(lengths, live);
  for (auto _ : state) {
    const Interval& i = w.tenant->live()[w.tenant->pick()];
    if (w.peer.find(i.start + i.length / 2) != i.start) {
      state.SkipWithError("find() names another interval");
      break;
    }
  }
}

constexpr std::array<std::size_t, 3> live_counts{0, 10'000, 1'000'000};

std::string row(const char* shape, const char* peer, Lengths lengths, std::size_t live) {
  return std::string{shape} + "/" + peer + "/" + name_of(lengths) + "/live:" + std::to_string(live);
}

template <typename Peer>
void add() {
  for (const Lengths lengths : all_lengths) {
    for (const std::size_t live : live_counts) {
      if (!fits<Peer>(lengths, live)) continue;
      for (const auto& [shape, name] :
           {std::pair{Shape::pair, "pair"}, std::pair{Shape::batch, "batch"}, std::pair{Shape::churn, "churn"}}) {
        if (shape == Shape::churn && live == 0) continue;
        benchmark::RegisterBenchmark(
            row(name, Peer::name, lengths, live).c_str(),
            [=, s = shape](benchmark::State& state) { measure<Peer>(state, s, lengths, live); });
      }
    }
  }
  if constexpr (requires(Peer p) { p.claim(0, 0); }) {
    for (const Lengths lengths : {Lengths::k4, Lengths::k64, Lengths::m2})
      for (const std::size_t live : {std::size_t{0}, std::size_t{10'000}})
        benchmark::RegisterBenchmark(row("claim", Peer::name, lengths, live).c_str(),
                                     [=](benchmark::State& state) { measure_claim<Peer>(state, lengths, live); });
  }
  if constexpr (requires(Peer p) { p.find(0); }) {
    for (const Lengths lengths : {Lengths::k4, Lengths::mixed})
      for (const std::size_t live : {std::size_t{100}, std::size_t{10'000}, std::size_t{1'000'000}})
        benchmark::RegisterBenchmark(row("find", Peer::name, lengths, live).c_str(),
                                     [=](benchmark::State& state) { measure_find<Peer>(state, lengths, live); });
  }
}

[[maybe_unused]] const bool added = [] {
  add<EmptyPeer>();
  for_each_peer([]<typename Peer>() { add<Peer>(); });
  add<IovanePeer<false>>();
  return true;
}();

}  // namespace
}  // namespace iovane::bench
