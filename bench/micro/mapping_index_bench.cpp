// MappingIndex against ordered maps of the same records, doing the same work: refuse overlaps, erase by name (the maps:
// by start address, which they need no translation for), look up by address.
//
// Arguments: live mappings of 4 KiB. `dense`: every other page of one stretch; `scattered`: pages all over 2^48 bytes.
// The random numbers are drawn before the clock starts; reading them costs about 1 ns per operation (see Harness).
#include <benchmark/benchmark.h>

#include <algorithm>
#include <map>
#include <random>
#include <vector>

#if __has_include(<absl/container/btree_map.h>)
#include <absl/container/btree_map.h>
#define IOVANE_HAVE_ABSL 1
#endif

#include "engine/mapping_index.hpp"

namespace iovane::engine {
namespace {

constexpr std::uint64_t granule = 4096;
constexpr std::size_t draws = 1U << 16;  // random numbers made beforehand, reused in a circle

MappingRecord record_at(std::uint64_t start) {
  MappingRecord record;
  record.range = {Iova{start}, Iova{start + granule - 1}};
  record.access = Access::read_write;
  record.state = MappingState::live;
  return record;
}

class Index {
 public:
  using Name = MappingId;
  Name insert(const MappingRecord& record) { return *index_.insert(record); }
  void erase(Name name) { index_.erase(name); }
  bool covers(std::uint64_t address) const { return static_cast<bool>(index_.covering(Iova{address})); }

 private:
  MappingIndex index_ = *MappingIndex::create(1U << 22);
};

template <typename Map>
class OrderedMap {
 public:
  using Name = std::uint64_t;
  Name insert(const MappingRecord& record) {
    const auto above = map_.lower_bound(record.range.start.value);
    if (above != map_.end() && above->second.range.overlaps(record.range)) return 0;
    if (above != map_.begin() && std::prev(above)->second.range.overlaps(record.range)) return 0;
    map_.emplace_hint(above, record.range.start.value, record);
    return record.range.start.value;
  }
  void erase(Name name) { map_.erase(name); }
  bool covers(std::uint64_t address) const {
    const auto above = map_.upper_bound(address);
    return above != map_.begin() && std::prev(above)->second.range.contains(Iova{address});
  }

 private:
  Map map_;
};

using StdMap = OrderedMap<std::map<std::uint64_t, MappingRecord>>;
#ifdef IOVANE_HAVE_ABSL
using AbslBtree = OrderedMap<absl::btree_map<std::uint64_t, MappingRecord>>;
#endif

enum class Terrain { dense, scattered };

/// Start addresses: twice as many as will be live.
std::vector<std::uint64_t> starts(Terrain terrain, std::size_t live, std::mt19937_64& random) {
  std::vector<std::uint64_t> all(2 * live);
  for (std::size_t n = 0; n < all.size(); ++n) {
    all[n] = terrain == Terrain::dense ? (n + 0x1000) * granule : random() % (1ULL << 36) * granule;
  }
  if (terrain == Terrain::scattered) {
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    all.resize(all.size() / 2 * 2);
  }
  std::shuffle(all.begin(), all.end(), random);
  return all;
}

template <typename Target>
struct Populated {
  Populated(Terrain terrain, std::size_t live) : random{live}, free{starts(terrain, live, random)} {
    for (std::size_t n = free.size() / 2; n > 0; --n) {
      used.push_back(free.back());
      names.push_back(target.insert(record_at(free.back())));
      free.pop_back();
    }
    for (std::size_t n = 0; n < draws; ++n) picks.push_back(static_cast<std::uint32_t>(random() % used.size()));
  }
  Target target;
  std::mt19937_64 random;
  std::vector<std::uint64_t> free;
  std::vector<std::uint64_t> used;
  std::vector<typename Target::Name> names;
  std::vector<std::uint32_t> picks;
};

/// Insert and erase the next of 64 neighbouring pages beside the live ones.
template <typename Target, Terrain terrain>
void hot_pair(benchmark::State& state) {
  Populated<Target> p{terrain, static_cast<std::size_t>(state.range(0))};
  std::uint64_t n = 0;
  for (auto _ : state) {
    const auto name = p.target.insert(record_at((1ULL << 50) + (n++ % 64) * granule));
    benchmark::DoNotOptimize(name);
    p.target.erase(name);
  }
}

/// The same with 32 of the neighbours live: map one, unmap the oldest.
template <typename Target, Terrain terrain>
void hot_ring(benchmark::State& state) {
  Populated<Target> p{terrain, static_cast<std::size_t>(state.range(0))};
  typename Target::Name ring[32];
  std::uint64_t n = 0;
  for (auto& name : ring) name = p.target.insert(record_at((1ULL << 50) + n++ * granule));
  for (auto _ : state) {
    auto& oldest = ring[n % 32];
    p.target.erase(oldest);
    oldest = p.target.insert(record_at((1ULL << 50) + (n++ % 64) * granule));
  }
}

/// Erase a random live record and insert another at a random free place.
template <typename Target, Terrain terrain>
void random_pair(benchmark::State& state) {
  Populated<Target> p{terrain, static_cast<std::size_t>(state.range(0))};
  std::size_t n = 0;
  for (auto _ : state) {
    const std::uint32_t pick = p.picks[n++ % draws];
    const std::uint32_t place = p.picks[(n * 7) % draws];
    p.target.erase(p.names[pick]);
    std::swap(p.used[pick], p.free[place]);
    p.names[pick] = p.target.insert(record_at(p.used[pick]));
  }
}

template <typename Target, Terrain terrain>
void lookup(benchmark::State& state) {
  Populated<Target> p{terrain, static_cast<std::size_t>(state.range(0))};
  std::vector<std::uint64_t> addresses;
  for (const std::uint32_t pick : p.picks) addresses.push_back(p.used[pick] + p.random() % granule);
  std::size_t n = 0;
  for (auto _ : state) benchmark::DoNotOptimize(p.target.covers(addresses[n++ % draws]));
}

/// Each lookup's address depends on the last one's answer: latency, where `lookup` shows throughput.
template <typename Target, Terrain terrain>
void lookup_chain(benchmark::State& state) {
  Populated<Target> p{terrain, static_cast<std::size_t>(state.range(0))};
  std::vector<std::uint64_t> addresses;
  for (const std::uint32_t pick : p.picks) addresses.push_back(p.used[pick] + p.random() % granule);
  std::size_t n = 0;
  for (auto _ : state) n += p.target.covers(addresses[n % draws]) ? 1 : 2;
  benchmark::DoNotOptimize(n);
}

/// What the loops above cost without an index.
struct Nothing {
  using Name = std::uint64_t;
  Name insert(const MappingRecord& record) { return record.range.start.value; }
  void erase(Name name) { benchmark::DoNotOptimize(name); }
  bool covers(std::uint64_t address) const { return address != 0; }
};

#define IOVANE_BENCH_ALL(Target)                                                                                   \
  BENCHMARK(hot_pair<Target, Terrain::dense>)->Name("hot_pair/" #Target)->Arg(2)->Arg(10'000);                     \
  BENCHMARK(hot_ring<Target, Terrain::dense>)->Name("hot_ring/" #Target)->Arg(10'000);                             \
  BENCHMARK(random_pair<Target, Terrain::dense>)->Name("random_pair/dense/" #Target)->Arg(10'000)->Arg(1'000'000); \
  BENCHMARK(random_pair<Target, Terrain::scattered>)                                                               \
      ->Name("random_pair/scattered/" #Target)                                                                     \
      ->Arg(10'000)                                                                                                \
      ->Arg(1'000'000);                                                                                            \
  BENCHMARK(lookup<Target, Terrain::dense>)->Name("lookup/dense/" #Target)->Arg(100)->Arg(10'000)->Arg(1'000'000); \
  BENCHMARK(lookup<Target, Terrain::scattered>)->Name("lookup/scattered/" #Target)->Arg(10'000)->Arg(1'000'000);   \
  BENCHMARK(lookup_chain<Target, Terrain::dense>)->Name("lookup_chain/dense/" #Target)->Arg(10'000)->Arg(1'000'000)

IOVANE_BENCH_ALL(Nothing);
IOVANE_BENCH_ALL(Index);
IOVANE_BENCH_ALL(StdMap);
#ifdef IOVANE_HAVE_ABSL
IOVANE_BENCH_ALL(AbslBtree);
#endif

}  // namespace
}  // namespace iovane::engine
