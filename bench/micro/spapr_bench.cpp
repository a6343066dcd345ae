// What the sPAPR backend adds to its ioctls: map + unmap pairs of registered memory through the seam, on a kernel whose
// MAP and UNMAP answer at once, beside the same two calls alone. `tces`: 4 KiB pages in a mapping.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backends/kernel_call.hpp"
#include "backends/kernel_decorators.hpp"
#include "backends/model/model_kernel.hpp"
#include "backends/open.hpp"
#include "backends/uapi/vfio.hpp"

namespace iovane::backends {
namespace {

namespace vfio = uapi::vfio;

constexpr std::uint64_t page = 4096;
constexpr std::uint64_t first_iova = 0x100'0000;

/// MAP and UNMAP do nothing and succeed.
class InstantKernel final : public KernelDecorator {
 public:
  using KernelDecorator::KernelDecorator;
  long ioctl(int fd, unsigned long request, void* argument) noexcept override {
    if (request == vfio::Type1DmaMap::request || request == vfio::Type1DmaUnmap::request) return 0;
    return inner().ioctl(fd, request, argument);
  }
};

struct PowerHost {
  PowerHost() {
    model::ModelOptions options;
    options.memory_check = model::MemoryCheck::none;
    options.iommufd = false;
    options.spapr = model::SpaprOptions{};
    for (model::DeviceOptions& device : options.devices) device.reserved.clear();
    host = *model::ModelKernel::create(options);
    kernel = std::make_unique<InstantKernel>(*host);
    backend = *open_backend(*kernel, {.name = "spapr", .descriptor = {}});
    space = *backend->create_space({});
    (void)*space->attach({.pci_address = host->device(0).address()});
    region = *space->register_memory({.address = memory.data(), .length = Bytes{memory.size()}});
  }
  // Declared in the order of their lives.
  std::unique_ptr<model::ModelKernel> host;
  std::unique_ptr<InstantKernel> kernel;
  std::unique_ptr<Backend> backend;
  std::vector<std::byte> storage = std::vector<std::byte>(5U << 20);
  std::span<std::byte> memory{
      reinterpret_cast<std::byte*>((reinterpret_cast<std::uintptr_t>(storage.data()) + page - 1) & ~(page - 1)),
      4U << 20};
  std::unique_ptr<BackendSpace> space;
  RegionId region{};
};

IovaRange range(std::uint64_t i, std::uint64_t tces) {
  return *IovaRange::from_length(Iova{first_iova + 2 * i * tces * page}, Bytes{tces * page});
}

void BM_SpaprSeamPair(benchmark::State& state) {
  PowerHost host;
  const auto batch = static_cast<std::size_t>(state.range(0));
  const auto tces = static_cast<std::uint64_t>(state.range(1));
  std::vector<BackendOp> maps(batch), unmaps(batch);
  std::vector<BackendOpResult> results(batch);
  for (std::size_t i = 0; i < batch; ++i) {
    maps[i] = {.kind = OpKind::map,
               .access = Access::read_write,
               .region = host.region,
               .range = range(i, tces),
               .memory = i * page};
    unmaps[i] = {.kind = OpKind::unmap, .range = range(i, tces)};
  }
  for (auto _ : state) {
    host.space->execute(maps, results);
    if (!results[0].error.ok()) state.SkipWithError(results[0].error.message().c_str());
    host.space->execute(unmaps, results);
    if (results[batch - 1].bytes.value != tces * page) state.SkipWithError("unmapped something else");
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(batch) * state.iterations());
}
BENCHMARK(BM_SpaprSeamPair)->ArgNames({"batch", "tces"})->ArgsProduct({{1, 32}, {1, 16, 128}});

void BM_SpaprBarePair(benchmark::State& state) {
  PowerHost host;
  Kernel* kernel = host.kernel.get();
  benchmark::DoNotOptimize(kernel);  // as opaque as it is to the backend
  for (auto _ : state) {
    vfio::Type1DmaMap map{.flags = 3, .vaddr = 0x1000, .iova = first_iova, .size = page};
    vfio::Type1DmaUnmap unmap{.iova = first_iova, .size = page};
    if (call(*kernel, 0, map) != 0 || call(*kernel, 0, unmap) != 0) state.SkipWithError("refused");
  }
  state.SetItemsProcessed(state.iterations());
}
BENCHMARK(BM_SpaprBarePair);

}  // namespace
}  // namespace iovane::backends
