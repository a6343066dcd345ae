// How long one map takes, as percentiles: a synchronous call, a map that a worker executes (spinning, and asleep), and
// the baselines: a mutex and a call, and oneTBB's concurrent queue with a thread behind it. On a backend that does
// nothing; reported as counters, since Google Benchmark itself knows means only.
#include <benchmark/benchmark.h>
#include <oneapi/tbb/concurrent_queue.h>

#include <array>
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "base/cpu_relax.hpp"
#include "base/latency_histogram.hpp"
#include "engine/engine_core.hpp"
#include "engine/monotonic.hpp"
#include "iovane/engine.hpp"
#include "support/null_backend.hpp"

namespace iovane {
namespace {

constexpr std::uint64_t page = 4096;

MapRequest request_at(std::uint64_t index) {
  MapRequest request;
  request.memory = {{}, 0x7000'0000, Bytes{page}};
  request.placement = Placement::fixed(Iova{index * page});
  return request;
}

void report(benchmark::State& state, const base::LatencyHistogram& histogram) {
  const auto ns = [&](double share) { return static_cast<double>(histogram.percentile(share)); };
  state.counters["p50"] = ns(0.5);
  state.counters["p99"] = ns(0.99);
  state.counters["p99.9"] = ns(0.999);
  state.counters["p99.99"] = ns(0.9999);
  state.counters["max"] = static_cast<double>(histogram.greatest());
}

AddressSpace open_space(std::chrono::nanoseconds spin = {}) {
  WorkerConfig workers;
  workers.spin = spin;
  Engine engine = EngineAccess::open(std::make_unique<bench::NullBackend>(), "null", workers);
  AddressSpaceConfig config;
  config.layout = LayoutPolicy::fixed;
  return *engine.create_address_space(config);
}

void BM_SynchronousMap(benchmark::State& state) {
  AddressSpace space = open_space();
  base::LatencyHistogram histogram;
  for (auto _ : state) {
    const std::uint64_t begun = engine::monotonic_ns();
    const Completion mapped = space.map(request_at(16));
    histogram.record(engine::monotonic_ns() - begun);
    if (!space.unmap(UnmapRequest::of(mapped.mapping)).ok()) state.SkipWithError("unmap failed");
  }
  report(state, histogram);
}
BENCHMARK(BM_SynchronousMap);

void BM_BaselineMutexAndCall(benchmark::State& state) {
  bench::NullSpace null;
  backends::BackendSpace& backend = null;
  std::mutex lock;
  std::map<std::uint64_t, std::uint64_t> index;
  base::LatencyHistogram histogram;
  for (auto _ : state) {
    const backends::BackendOp op{
        backends::OpKind::map, Access::read_write, {}, {Iova{16 * page}, Iova{17 * page - 1}}, 0x7000'0000};
    backends::BackendOpResult result;
    const std::uint64_t begun = engine::monotonic_ns();
    {
      const std::lock_guard held{lock};
      backend.execute({&op, 1}, {&result, 1});
      index.emplace(16 * page, page);
    }
    histogram.record(engine::monotonic_ns() - begun);
    index.clear();
  }
  report(state, histogram);
}
BENCHMARK(BM_BaselineMutexAndCall);

// The caller polls; the worker spins for `spin_us` before it sleeps.
void BM_MapThroughWorker(benchmark::State& state) {
  AddressSpace space = open_space(std::chrono::microseconds{state.range(0)});
  Queue queue = *space.open_queue({.submit = SubmitMode::never_block});
  base::LatencyHistogram histogram;
  std::array<Completion, 1> done;
  for (auto _ : state) {
    (void)queue.stage(request_at(16));
    const std::uint64_t begun = engine::monotonic_ns();
    queue.submit();
    while (queue.poll(done) == 0) base::cpu_relax();
    histogram.record(engine::monotonic_ns() - begun);
    if (!space.unmap(UnmapRequest::of(done[0].mapping)).ok()) state.SkipWithError("unmap failed");
  }
  report(state, histogram);
}
BENCHMARK(BM_MapThroughWorker)->ArgName("spin_us")->Arg(0)->Arg(100)->UseRealTime();

// What one would write without the engine: a thread that takes requests from oneTBB's queue.
void BM_BaselineTbbQueueAndThread(benchmark::State& state) {
  struct Job {
    std::uint64_t index;
    std::atomic<bool>* done;
  };
  tbb::concurrent_bounded_queue<Job> jobs;
  std::thread worker{[&] {
    bench::NullSpace null;
    backends::BackendSpace& backend = null;
    std::map<std::uint64_t, std::uint64_t> index;
    for (Job job{}; jobs.pop(job), job.done != nullptr;) {
      const backends::BackendOp op{backends::OpKind::map,
                                   Access::read_write,
                                   {},
                                   {Iova{job.index * page}, Iova{(job.index + 1) * page - 1}},
                                   0x7000'0000};
      backends::BackendOpResult result;
      backend.execute({&op, 1}, {&result, 1});
      index.emplace(job.index * page, page);
      index.clear();
      job.done->store(true, std::memory_order_release);
    }
  }};
  base::LatencyHistogram histogram;
  for (auto _ : state) {
    std::atomic<bool> done{false};
    const std::uint64_t begun = engine::monotonic_ns();
    jobs.push({16, &done});
    while (!done.load(std::memory_order_acquire)) base::cpu_relax();
    histogram.record(engine::monotonic_ns() - begun);
  }
  jobs.push({0, nullptr});
  worker.join();
  report(state, histogram);
}
BENCHMARK(BM_BaselineTbbQueueAndThread)->UseRealTime();

}  // namespace
}  // namespace iovane
