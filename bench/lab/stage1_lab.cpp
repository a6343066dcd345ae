// What a 4 KiB page costs to map and to unmap, in stage-1 mode and through the kernel's calls, in one run on one
// machine: for a guest of tools/lab, or any host with a device to spare. usage: stage1_lab [--smoke] [REPLAY TRACE...]
//
// REPLAY is the iovane command: then it also replays the traces on each interface, in the same run. Pages lie two
// apart, so that no unmaps can be joined; each batch is one execute(). --smoke: the software IOMMU, a few rounds.
#include <fmt/format.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>
#include <vector>

#include "backends/model/model_kernel.hpp"
#include "backends/open.hpp"
#include "backends/system_kernel.hpp"

extern char** environ;

namespace {

using namespace iovane;
using namespace iovane::backends;
using Clock = std::chrono::steady_clock;

constexpr std::uint64_t page = 4096;
constexpr std::uint64_t base = 0x1'0000'0000;
constexpr std::size_t batches[] = {1, 16, 64, 256};

struct Cost {
  bool known = false;
  double map_ns[4]{}, unmap_ns[4]{};
};

double ns_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::nano>(Clock::now() - begin).count();
}

Cost measure(Kernel& kernel, std::string_view interface, OpKind kind, const std::string& device, std::byte* memory,
             int rounds) {
  Cost cost;
  const auto backend = open_backend(kernel, {.name = std::string{interface}});
  if (!backend) return fmt::print("{}: {}\n", interface, backend.error().message()), cost;
  const auto space = (*backend)->create_space({});
  if (!space) return fmt::print("{}: {}\n", interface, space.error().message()), cost;
  if (const auto attached = (*space)->attach({.pci_address = device}); !attached)
    return fmt::print("{}: {}\n", interface, attached.error().message()), cost;
  RegionId region{};
  if (kind == OpKind::copy) {
    const auto made = (*space)->register_memory({.address = memory, .length = Bytes{256 * page}});
    if (!made) return fmt::print("{}: {}\n", interface, made.error().message()), cost;
    region = *made;
  }
  std::vector<BackendOp> maps(256), unmaps(256);
  std::vector<BackendOpResult> results(256);
  for (std::size_t i = 0; i < 256; ++i) {
    const IovaRange range = *IovaRange::from_length(Iova{base + 2 * i * page}, Bytes{page});
    const std::uint64_t where = i * page + (region.value == 0 ? reinterpret_cast<std::uintptr_t>(memory) : 0);
    maps[i] = {.kind = kind, .access = Access::read_write, .region = region, .range = range, .memory = where};
    unmaps[i] = {.kind = OpKind::unmap, .range = range};
  }
  // The clock is read around all 256 pages, and the verdicts afterwards: a batch of one is the call alone.
  const auto sweep = [&](const std::vector<BackendOp>& ops, std::size_t count) {
    const auto begin = Clock::now();
    for (std::size_t from = 0; from < 256; from += count)
      (*space)->execute({&ops[from], count}, {&results[from], count});
    return ns_since(begin);
  };
  for (std::size_t b = 0; b < std::size(batches); ++b) {
    double map_ns = 0, unmap_ns = 0;
    for (int round = -1; round < rounds; ++round) {  // the first one warms up
      for (const auto* ops : {&maps, &unmaps}) {
        const double ns = sweep(*ops, batches[b]);
        if (round >= 0) (ops == &maps ? map_ns : unmap_ns) += ns;
        for (const BackendOpResult& result : results)
          if (result.error || result.bytes != Bytes{page})
            return fmt::print("{}: {}\n", interface, result.error.message()), cost;
      }
    }
    cost.map_ns[b] = map_ns / rounds / 256;
    cost.unmap_ns[b] = unmap_ns / rounds / 256;
  }
  cost.known = true;
  return cost;
}

void print(std::string_view name, const Cost& cost) {
  if (!cost.known) return;
  fmt::print("{:14}", name);
  for (const double ns : cost.map_ns) fmt::print(" {:>9.0f}", ns);
  fmt::print("  ");
  for (const double ns : cost.unmap_ns) fmt::print(" {:>9.0f}", ns);
  fmt::print("\n");
}

int replay(const char* program, const std::vector<char*>& traces) {
  int worst = 0;
  for (const char* interface : {"stage1", "iommufd", "type1"}) {
    std::vector<std::string> words{program,      "replay",
                                   "--backend",  interface,
                                   "--baseline", std::string{interface} == "stage1" ? "engine" : "event,engine",
                                   "--no-verify"};
    words.insert(words.end(), traces.begin(), traces.end());
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    fmt::print("\n{} on {}:\n", "replay", interface);
    std::fflush(stdout);
    pid_t child = 0;
    int status = 1;
    if (::posix_spawn(&child, program, nullptr, nullptr, arguments.data(), environ) == 0) ::waitpid(child, &status, 0);
    worst = std::max(worst, WIFEXITED(status) ? WEXITSTATUS(status) : 1);
  }
  return worst;
}

}  // namespace

int main(int argc, char** argv) {
  bool smoke = false;
  const char* program = nullptr;
  std::vector<char*> traces;
  for (int i = 1; i < argc; ++i) {
    // Google Benchmark's options, from whoever runs all benchmarks alike, mean a short run here.
    if (std::strncmp(argv[i], "--", 2) == 0)
      smoke = true;
    else if (program == nullptr)
      program = argv[i];
    else
      traces.push_back(argv[i]);
  }
  std::unique_ptr<Kernel> kernel;
  if (smoke) {
    model::ModelOptions options;
    options.iommus.front().nesting = model::Nesting::smmuv3;
    auto made = model::ModelKernel::create(options);
    if (!made) return 1;
    kernel = *std::move(made);
  } else {
    kernel = std::make_unique<SystemKernel>();
  }
  std::string device;
  const auto inventory = kernel->pci_devices();
  for (const PciDevice& pci : inventory ? *inventory : std::vector<PciDevice>{})
    if (device.empty() && pci.driver == "vfio-pci" && pci.group >= 0) device = pci.address;
  if (device.empty()) return fmt::print("no device is bound to vfio-pci here; --smoke needs none\n"), 5;
  auto* const memory = static_cast<std::byte*>(
      ::mmap(nullptr, 256 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0));
  if (memory == MAP_FAILED) return 1;

  const int rounds = smoke ? 2 : 20;
  fmt::print("{}, {}; ns per 4 KiB page\n", kernel->description(), device);
  fmt::print("{:14} {:>39}   {:>39}\n", "", "map, batches of 1, 16, 64, 256",
             "strict unmap, batches of 1, 16, 64, 256");
  const Cost store = measure(*kernel, "stage1", OpKind::copy, device, memory, rounds);
  print("stage1", store);
  const Cost map = measure(*kernel, "iommufd", OpKind::map, device, memory, rounds);
  print("iommufd map", map);
  const Cost copy = measure(*kernel, "iommufd", OpKind::copy, device, memory, rounds);
  print("iommufd copy", copy);
  const Cost type1 = measure(*kernel, "type1", OpKind::map, device, memory, rounds);
  print("type1", type1);
  if (!store.known || !map.known) return 1;
  fmt::print("iommufd map / stage1:");
  for (std::size_t b = 0; b < std::size(batches); ++b)
    fmt::print("  batch {}: map {:.0f}, unmap {:.1f}", batches[b], map.map_ns[b] / store.map_ns[b],
               map.unmap_ns[b] / store.unmap_ns[b]);
  fmt::print("\n");
  return program != nullptr ? replay(program, traces) : 0;
}
