#include "backends/type1/type1_info.hpp"

#include <cstring>

#include "backends/kernel_call.hpp"
#include "backends/kernel_error.hpp"
#include "backends/range_list.hpp"
#include "backends/uapi/vfio.hpp"
#include "base/error_text.hpp"

namespace iovane::backends::type1 {
namespace {

namespace uapi = backends::uapi::vfio;

constexpr std::uint32_t info_bytes_max = 1U << 20;

template <typename T>
std::optional<T> read_at(const std::vector<std::byte>& bytes, std::size_t offset) noexcept {
  if (offset > bytes.size() || bytes.size() - offset < sizeof(T)) return std::nullopt;
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

void read_ranges(const std::vector<std::byte>& bytes, std::size_t offset, ContainerInfo& info) {
  const auto cap = read_at<uapi::Type1CapIovaRange>(bytes, offset);
  if (!cap) return;
  std::vector<IovaRange> usable;
  for (std::uint32_t i = 0; i < cap->nr_iovas; ++i) {
    const auto range = read_at<uapi::Type1IovaRange>(bytes, offset + sizeof *cap + i * sizeof(uapi::Type1IovaRange));
    if (!range) break;
    if (range->start <= range->end) usable.push_back({Iova{range->start}, Iova{range->end}});
  }
  info.usable = normalized(std::move(usable));
}

void read_capability(const std::vector<std::byte>& bytes, std::size_t offset, std::uint16_t id, ContainerInfo& info) {
  if (id == uapi::type1_cap_iova_range) read_ranges(bytes, offset, info);
  if (id == uapi::type1_cap_dma_avail) {
    if (const auto cap = read_at<uapi::Type1CapDmaAvail>(bytes, offset)) info.entries_left = cap->avail;
  }
  if (id == uapi::type1_cap_migration) {
    if (const auto cap = read_at<uapi::Type1CapMigration>(bytes, offset)) info.dirty_page_sizes = cap->pgsize_bitmap;
  }
}

}  // namespace

Result<ContainerInfo> query_container(Kernel& kernel, int container) {
  std::vector<std::byte> bytes(sizeof(uapi::Type1Info));
  for (int attempt = 0; attempt < 4; ++attempt) {
    uapi::Type1Info head;
    head.argsz = static_cast<std::uint32_t>(bytes.size());
    std::memcpy(bytes.data(), &head, sizeof head);
    if (const int why = errno_of(kernel.ioctl(container, uapi::Type1Info::request, bytes.data())); why != 0)
      return explain_call(Stage::query, "VFIO_IOMMU_GET_INFO", why);
    std::memcpy(&head, bytes.data(), sizeof head);
    if (head.argsz > bytes.size() && head.argsz <= info_bytes_max) {
      bytes.assign(head.argsz, std::byte{});
      continue;
    }
    ContainerInfo info;
    if ((head.flags & uapi::type1_info_pgsizes) != 0) info.page_sizes = head.iova_pgsizes;
    std::size_t offset = (head.flags & uapi::type1_info_caps) != 0 ? head.cap_offset : 0;
    // Links only lead forward, so the walk ends.
    while (offset != 0) {
      const auto cap = read_at<uapi::InfoCapHeader>(bytes, offset);
      if (!cap) break;
      read_capability(bytes, offset, cap->id, info);
      offset = cap->next > offset ? cap->next : 0;
    }
    return info;
  }
  return base::fail(Errc::busy, Stage::query, 0, "VFIO_IOMMU_GET_INFO: its answer grew with every question; ask again");
}

}  // namespace iovane::backends::type1
