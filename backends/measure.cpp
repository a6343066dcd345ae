#include "backends/measure.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "backends/open.hpp"
#include "backends/probe.hpp"
#include "base/checked_math.hpp"
#include "base/error_text.hpp"

namespace iovane::backends {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::array lengths{Bytes{4096}, Bytes{64 * 1024}, Bytes{2 << 20}};
constexpr std::uint64_t largest = 2 << 20;
// How often guests map such a length, of a thousand maps: of the 318,000 in the three recorded traces 94% are of 4 KiB
// and none is above 256 KiB. Large maps are made once, at boot.
constexpr double weight_of(Bytes length) noexcept {
  return length.value <= 4096 ? 940 : length.value <= 64 * 1024 ? 59 : 1;
}
constexpr int pairs_max = 256;  // of 4 KiB: two milliseconds, in which the fastest is found
constexpr int pairs_min = 4;    // on a busy machine one or two say nothing, whatever the time is

/// Memory to map, aligned for the largest length and present.
class Buffer {
 public:
  Buffer() noexcept {
    void* const at = ::mmap(nullptr, 2 * largest, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) return;
    base_ = at;
    const auto start = reinterpret_cast<std::uintptr_t>(at);
    memory_ = reinterpret_cast<std::byte*>((start + largest - 1) & ~(largest - 1));
    for (std::uint64_t offset = 0; offset < largest; offset += 4096) memory_[offset] = std::byte{1};
  }
  ~Buffer() {
    if (base_ != nullptr) ::munmap(base_, 2 * largest);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  std::byte* memory() const noexcept { return memory_; }

 private:
  void* base_ = nullptr;
  std::byte* memory_ = nullptr;
};

/// The fastest of several pairs, 0 when a call fails. The first pair warms up.
std::uint64_t fastest_pair(BackendSpace& space, const BackendOp& map, Clock::duration share) {
  const BackendOp unmap{.kind = OpKind::unmap, .range = map.range};
  const auto stop = Clock::now() + share;
  std::uint64_t best = 0;
  for (int i = 0; i < pairs_max; ++i) {
    BackendOpResult result;
    const auto begin = Clock::now();
    space.execute({&map, 1}, {&result, 1});
    if (result.error) return 0;
    space.execute({&unmap, 1}, {&result, 1});
    const auto finish = Clock::now();
    if (result.error) return 0;
    const auto took =
        static_cast<std::uint64_t>(std::max<std::int64_t>(1, (finish - begin) / std::chrono::nanoseconds{1}));
    if (i <= 1 || took < best) best = took;
    if (finish >= stop && i + 1 >= pairs_min) break;
  }
  return best;
}

std::optional<IovaRange> room(BackendSpace& space) {
  const auto usable = space.usable_ranges();
  if (!usable) return std::nullopt;
  for (const IovaRange& window : *usable) {
    const auto start = base::align_up(std::max<std::uint64_t>(window.start.value, largest), largest);
    const auto fit = start ? IovaRange::from_length(Iova{*start}, Bytes{largest}) : std::nullopt;
    if (fit && window.contains(*fit)) return fit;
  }
  return std::nullopt;
}

void measure_space(BackendSpace& space, std::byte* memory, Clock::duration share, InterfaceCost& cost) {
  const auto where = room(space);
  if (!where) {
    cost.reason = "no 2 MiB of its address space are usable";
    return;
  }
  RegionId region{};
  if (has(space.facts().capabilities, Capability::copy_reuses_pin))
    region = space.register_memory({.address = memory, .length = Bytes{largest}}).value_or(RegionId{});
  for (const Bytes length : lengths) {
    BackendOp op{.kind = OpKind::map, .access = Access::read_write};
    op.range = *IovaRange::from_length(where->start, length);
    op.memory = reinterpret_cast<std::uintptr_t>(memory);
    PairCost pair{.length = length, .map_ns = fastest_pair(space, op, share)};
    if (pair.map_ns == 0) {  // RLIMIT_MEMLOCK, most likely
      if (cost.reason.empty()) cost.reason = fmt::format("{} bytes could not be mapped", length.value);
      continue;
    }
    if (region.value != 0) {
      op.kind = OpKind::copy;
      op.region = region;
      op.memory = 0;
      pair.copy_ns = fastest_pair(space, op, share);
    }
    cost.pairs.push_back(pair);
  }
  if (region.value != 0) (void)space.unregister_memory(region).has_value();
}

InterfaceCost measure_one(Kernel& kernel, Interface interface, const std::string& device, std::byte* memory,
                          Clock::duration share) {
  InterfaceCost cost;
  cost.interface = interface;
  const auto backend = open_backend(kernel, {.name = std::string{to_string(interface)}});
  if (!backend) {
    cost.reason = backend.error().detail();
    return cost;
  }
  const auto space = (*backend)->create_space({});
  if (!space) {
    cost.reason = space.error().detail();
    return cost;
  }
  if (const auto attached = (*space)->attach({.pci_address = device}); !attached) {
    cost.reason = attached.error().detail();
    return cost;
  }
  measure_space(**space, memory, share, cost);
  return cost;
}

std::string text_of(const InterfaceCost& cost) {
  std::string text{to_string(cost.interface)};
  for (const PairCost& pair : cost.pairs) {
    const bool copy = pair.copy_ns != 0 && pair.copy_ns < pair.map_ns;
    text += fmt::format("{} {} KiB {:.1f} us{}", &pair == cost.pairs.data() ? "" : ",", pair.length.value / 1024,
                        static_cast<double>(copy ? pair.copy_ns : pair.map_ns) / 1000, copy ? " (copy)" : "");
  }
  return text;
}

}  // namespace

double InterfaceCost::mean_ns() const noexcept {
  double sum = 0;
  double weights = 0;
  for (const PairCost& pair : pairs) {
    const std::uint64_t cheaper = pair.copy_ns != 0 ? std::min(pair.map_ns, pair.copy_ns) : pair.map_ns;
    const double weight = weight_of(pair.length);
    sum += weight * std::log(static_cast<double>(cheaper));
    weights += weight;
  }
  return pairs.empty() ? 0 : std::exp(sum / weights);
}

const InterfaceCost* Measurement::of(Interface interface) const noexcept {
  for (const InterfaceCost& cost : interfaces)
    if (cost.interface == interface && !cost.pairs.empty()) return &cost;
  return nullptr;
}

// From the largest down to the first that maps cheaper. Beyond what was measured a copy wins by ever more: it pins
// nothing.
Bytes Measurement::copy_from() const noexcept {
  const InterfaceCost* const cost = of(Interface::iommufd);
  if (cost == nullptr) return {};
  for (auto pair = cost->pairs.rbegin(); pair != cost->pairs.rend(); ++pair)
    if (pair->copy_ns != 0 && pair->copy_ns > pair->map_ns) return Bytes{pair->length.value + 1};
  return {};
}

std::optional<Measurement> measure_interfaces(Kernel& kernel, const HostReport& report, const MeasureOptions& options,
                                              std::string& why) {
  const Buffer buffer;
  if (buffer.memory() == nullptr) {
    why = "no memory to measure with";
    return std::nullopt;
  }
  std::vector<Interface> candidates;
  for (const InterfaceReport& interface : report.interfaces)
    if (interface.usable && (interface.interface == Interface::iommufd || interface.interface == Interface::type1_v2))
      candidates.push_back(interface.interface);
  const auto begin = Clock::now();
  // iommufd has two ways for each length, type1 one.
  const auto share = options.budget / (lengths.size() * 3);
  for (const DeviceReport& device : report.devices) {
    if (!device.attachable) continue;
    Measurement measurement{.interfaces = {}, .device = device.pci.address};
    for (const Interface interface : candidates)
      measurement.interfaces.push_back(measure_one(kernel, interface, device.pci.address, buffer.memory(), share));
    measurement.took_us = static_cast<std::uint64_t>((Clock::now() - begin) / std::chrono::microseconds{1});
    const bool all = std::all_of(measurement.interfaces.begin(), measurement.interfaces.end(),
                                 [](const InterfaceCost& c) { return !c.pairs.empty(); });
    if (all && !measurement.interfaces.empty()) return measurement;
    why = device.pci.address;
    for (const InterfaceCost& cost : measurement.interfaces)
      if (cost.pairs.empty()) why += fmt::format("; {}: {}", to_string(cost.interface), cost.reason);
    // One more device is tried when the first is in use; a host full of them is not worth the wait.
    if (&device != &report.devices.front() || measurement.took_us > 1'000'000) break;
  }
  if (why.empty()) why = "no device is free to be attached";
  return std::nullopt;
}

void choose_by(const Measurement& measurement, HostReport& report) {
  const InterfaceCost* const iommufd = measurement.of(Interface::iommufd);
  const InterfaceCost* const type1 = measurement.of(Interface::type1_v2);
  if (!report.choice) return;
  if (iommufd == nullptr || type1 == nullptr || iommufd->pairs.size() != type1->pairs.size()) {
    if (const InterfaceCost* const only = measurement.of(*report.choice))
      report.why += fmt::format("; measured map and unmap: {}", text_of(*only));
    return;
  }
  const bool type1_wins = type1->mean_ns() < 0.9 * iommufd->mean_ns();
  report.choice = type1_wins ? Interface::type1_v2 : Interface::iommufd;
  report.why =
      fmt::format("{}; measured map and unmap: {}; {}",
                  type1_wins ? "type1: both are usable, and it is more than a tenth cheaper here"
                             : "iommufd: both are usable, and type1 is not a tenth cheaper, which is what giving up "
                               "shared pins and parallel maps would have to bring",
                  text_of(*iommufd), text_of(*type1));
}

}  // namespace iovane::backends
