// The software host: what a 4 KiB map and unmap through its ioctls cost, beside the plainest thing that keeps the same
// books, a mutex and a std::map; and what a simulated device's transfers cost.
//
// All runs keep `live` other mappings and check no memory (MemoryCheck::none), so that no system call is measured;
// BM_IommufdPairPopulated shows the default, which has the system faulted the memory in.
#include <benchmark/benchmark.h>

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backends/model/model_kernel.hpp"
#include "backends/uapi/iommufd.hpp"
#include "backends/uapi/vfio.hpp"

namespace iovane::backends::model {
namespace {

namespace fd_api = uapi::iommufd;
namespace vfio_api = uapi::vfio;

constexpr std::uint64_t k4 = 4096;
constexpr std::uint64_t base_iova = 1ULL << 32;  // above the interrupt range

struct alignas(4096) OsPage {
  std::byte bytes[k4];
};

// A host with one attached device, and `live` mappings two pages apart.
class Attached {
 public:
  Attached(bool iommufd, std::uint64_t live, MemoryCheck check = MemoryCheck::none, bool second_space = false) {
    kernel = *ModelKernel::create({.memory_check = check, .dma_entry_limit = 4'000'000});
    if (iommufd) {
      fd = kernel->open("/dev/iommu", 0);
      for (std::size_t i = 0; i < (second_space ? 2U : 1U); ++i) {
        fd_api::IoasAlloc alloc;
        kernel->ioctl(fd, alloc.request, &alloc);
        ioas[i] = alloc.out_ioas_id;
        const int cdev = kernel->open(("/dev/vfio/devices/vfio" + std::to_string(i)).c_str(), 0);
        vfio_api::DeviceBindIommufd bind{.iommufd = fd};
        kernel->ioctl(cdev, bind.request, &bind);
        vfio_api::DeviceAttachIommufdPt attach{.pt_id = ioas[i]};
        kernel->ioctl(cdev, attach.request, &attach);
      }
    } else {
      fd = kernel->open("/dev/vfio/vfio", 0);
      const int group = kernel->open("/dev/vfio/0", 0);
      kernel->ioctl(group, vfio_api::group_set_container, &fd);
      kernel->ioctl_value(fd, vfio_api::set_iommu, vfio_api::type1_v2_iommu);
    }
    for (std::uint64_t i = 0; i < live; ++i) {
      const std::uint64_t iova = base_iova + 2 * i * k4;
      if ((iommufd ? map_iommufd(0, iova, k4) : map_type1(iova, k4)) != 0) std::abort();
    }
    page[0].bytes[0] = std::byte{1};
  }
  long map_iommufd(std::size_t space, std::uint64_t iova, std::uint64_t bytes) {
    fd_api::IoasMap c{.flags = 7, .ioas_id = ioas[space], .user_va = address(), .length = bytes, .iova = iova};
    return kernel->ioctl(fd, c.request, &c);
  }
  long unmap_iommufd(std::size_t space, std::uint64_t iova, std::uint64_t bytes) {
    fd_api::IoasUnmap c{.ioas_id = ioas[space], .iova = iova, .length = bytes};
    return kernel->ioctl(fd, c.request, &c);
  }
  long map_type1(std::uint64_t iova, std::uint64_t bytes) {
    vfio_api::Type1DmaMap c{.flags = 3, .vaddr = address(), .iova = iova, .size = bytes};
    return kernel->ioctl(fd, c.request, &c);
  }
  long unmap_type1(std::uint64_t iova, std::uint64_t bytes) {
    vfio_api::Type1DmaUnmap c{.iova = iova, .size = bytes};
    return kernel->ioctl(fd, c.request, &c);
  }
  std::uint64_t address() const { return std::bit_cast<std::uint64_t>(page.get()); }

  std::unique_ptr<OsPage[]> page = std::make_unique<OsPage[]>(512);
  std::unique_ptr<ModelKernel> kernel;
  int fd = -1;
  std::uint32_t ioas[2] = {0, 0};
};

// The gap between two live mappings in the middle.
std::uint64_t gap(std::uint64_t live) { return base_iova + (live / 2 * 2 + 1) * k4; }

void iommufd_pair(benchmark::State& state, MemoryCheck check) {
  const auto live = static_cast<std::uint64_t>(state.range(0));
  Attached host{true, live, check};
  const std::uint64_t iova = gap(live);
  for (auto unused : state) {
    if (host.map_iommufd(0, iova, k4) != 0 || host.unmap_iommufd(0, iova, k4) != 0) {
      state.SkipWithError("refused");
      break;
    }
  }
}
void BM_IommufdPair(benchmark::State& state) { iommufd_pair(state, MemoryCheck::none); }
void BM_IommufdPairPopulated(benchmark::State& state) { iommufd_pair(state, MemoryCheck::populate); }
BENCHMARK(BM_IommufdPair)->Arg(0)->Arg(1000)->Arg(100000);
BENCHMARK(BM_IommufdPairPopulated)->Arg(1000);

void BM_Type1Pair(benchmark::State& state) {
  const auto live = static_cast<std::uint64_t>(state.range(0));
  Attached host{false, live};
  const std::uint64_t iova = gap(live);
  for (auto unused : state) {
    if (host.map_type1(iova, k4) != 0 || host.unmap_type1(iova, k4) != 0) {
      state.SkipWithError("refused");
      break;
    }
  }
}
BENCHMARK(BM_Type1Pair)->Arg(0)->Arg(1000)->Arg(50000);

// The baseline: an ordered map under a mutex, overlap check included, no page table, no accounting, no devices.
void BM_MutexAndMapPair(benchmark::State& state) {
  const auto live = static_cast<std::uint64_t>(state.range(0));
  struct Area {
    std::uint64_t last;
    std::uint64_t memory;
  };
  std::mutex mutex;
  std::map<std::uint64_t, Area> areas;
  for (std::uint64_t i = 0; i < live; ++i) areas[base_iova + 2 * i * k4] = {base_iova + 2 * i * k4 + k4 - 1, 0};
  const std::uint64_t iova = gap(live);
  for (auto unused : state) {
    {
      const std::lock_guard lock{mutex};
      const auto next = areas.lower_bound(iova);
      const bool clash = (next != areas.end() && next->first < iova + k4) ||
                         (next != areas.begin() && std::prev(next)->second.last >= iova);
      if (!clash) areas.emplace_hint(next, iova, Area{iova + k4 - 1, 1});
    }
    const std::lock_guard lock{mutex};
    const auto found = areas.find(iova);
    if (found != areas.end()) areas.erase(found);
    benchmark::DoNotOptimize(areas);
  }
}
BENCHMARK(BM_MutexAndMapPair)->Arg(0)->Arg(1000)->Arg(100000);

// Two threads on one /dev/iommu, a space each.
void BM_IommufdPairTwoSpaces(benchmark::State& state) {
  static std::unique_ptr<Attached> host;
  if (state.thread_index() == 0) host = std::make_unique<Attached>(true, 1000, MemoryCheck::none, true);
  const std::uint64_t iova = 1ULL << 40;
  for (auto unused : state) {
    const auto space = static_cast<std::size_t>(state.thread_index());
    if (host->map_iommufd(space, iova, k4) != 0 || host->unmap_iommufd(space, iova, k4) != 0) {
      state.SkipWithError("refused");
      break;
    }
  }
  if (state.thread_index() == 0) host.reset();
}
BENCHMARK(BM_IommufdPairTwoSpaces)->Threads(1)->Threads(2)->UseRealTime();

void BM_IommufdPair2MiBOfSmallPages(benchmark::State& state) {
  Attached host{true, 0};
  for (auto unused : state) {
    // An IOVA that is not aligned like the memory: 512 entries.
    if (host.map_iommufd(0, base_iova + k4, 512 * k4) != 0 || host.unmap_iommufd(0, base_iova + k4, 512 * k4) != 0) {
      state.SkipWithError("refused");
      break;
    }
  }
}
BENCHMARK(BM_IommufdPair2MiBOfSmallPages);

void BM_DeviceReads64Bytes(benchmark::State& state) {
  Attached host{true, 16};
  std::vector<std::byte> bytes(64);
  std::uint64_t i = 0;
  for (auto unused : state) {
    if (!host.kernel->device(0).dma_read(Iova{base_iova + 2 * (i++ % 16) * k4}, bytes).ok()) {
      state.SkipWithError("fault");
      break;
    }
  }
}
BENCHMARK(BM_DeviceReads64Bytes);

}  // namespace
}  // namespace iovane::backends::model
