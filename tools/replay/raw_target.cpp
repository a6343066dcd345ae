#include "replay/raw_target.hpp"

#include <cerrno>
#include <utility>

#include "base/error_text.hpp"
#include "base/os_error.hpp"
#include "trace/event.hpp"

namespace iovane::replay {
namespace {

namespace iommufd = backends::uapi::iommufd;
namespace vfio = backends::uapi::vfio;
using trace::granule;

void aim(iommufd::IoasMap& call, IovaRange range, std::uint64_t memory) noexcept {
  call.iova = range.start.value;
  call.length = range.span() + 1;
  call.user_va = memory;
}
void aim(iommufd::IoasCopy& call, IovaRange range, std::uint64_t memory) noexcept {
  call.dst_iova = range.start.value;
  call.length = range.span() + 1;
  call.src_iova = memory;
}
void aim(vfio::Type1DmaMap& call, IovaRange range, std::uint64_t memory) noexcept {
  call.iova = range.start.value;
  call.size = range.span() + 1;
  call.vaddr = memory;
}
void aim(iommufd::IoasUnmap& call, IovaRange range) noexcept {
  call.iova = range.start.value;
  call.length = range.span() + 1;
}
void aim(vfio::Type1DmaUnmap& call, IovaRange range) noexcept {
  call.iova = range.start.value;
  call.size = range.span() + 1;
}
std::uint64_t memory_of(const iommufd::IoasMap& call) noexcept { return call.user_va; }
std::uint64_t memory_of(const iommufd::IoasCopy& call) noexcept { return call.src_iova; }
std::uint64_t memory_of(const vfio::Type1DmaMap& call) noexcept { return call.vaddr; }
std::uint64_t removed_by(const iommufd::IoasUnmap& call) noexcept { return call.length; }
std::uint64_t removed_by(const vfio::Type1DmaUnmap& call) noexcept { return call.size; }

/// 0, or a positive errno; a positive answer is part of the work done, and a failure.
int errno_of(long answer) noexcept { return answer == 0 ? 0 : answer < 0 ? static_cast<int>(-answer) : EIO; }

Error refused(Stage stage, int os_errno, IovaRange range) noexcept {
  return base::fail(base::errc_from_errno(os_errno), stage, os_errno, "the kernel refused to {} [{:#x}, {:#x}]: {}",
                    to_string(stage), range.start.value, range.last.value,
                    make_error(base::errc_from_errno(os_errno), stage, "").detail());
}

}  // namespace

/// Passes calls on; while `recording`, keeps the last one that maps and the last one that unmaps.
class RawTarget::Recorder final : public backends::KernelDecorator {
 public:
  using KernelDecorator::KernelDecorator;

  long ioctl(int fd, unsigned long request, void* argument) noexcept override {
    if (recording) {
      switch (request) {
        case iommufd::IoasMap::request: map = *static_cast<iommufd::IoasMap*>(argument); break;
        case iommufd::IoasCopy::request: map = *static_cast<iommufd::IoasCopy*>(argument); break;
        case vfio::Type1DmaMap::request: map = *static_cast<vfio::Type1DmaMap*>(argument); break;
        case iommufd::IoasUnmap::request: unmap = *static_cast<iommufd::IoasUnmap*>(argument); break;
        case vfio::Type1DmaUnmap::request: unmap = *static_cast<vfio::Type1DmaUnmap*>(argument); break;
        default: return inner().ioctl(fd, request, argument);
      }
      call_fd = fd;
    }
    return inner().ioctl(fd, request, argument);
  }

  bool recording = false;
  int call_fd = -1;
  MapCall map;
  UnmapCall unmap;
};

RawTarget::RawTarget(Host& host, RawUnit unit) noexcept : host_{host}, unit_{unit} {}

RawTarget::~RawTarget() = default;

Result<std::unique_ptr<RawTarget>> RawTarget::open(Host& host, const GuestMemory& memory, RawUnit unit, RawMap map) {
  std::unique_ptr<RawTarget> target{new RawTarget{host, unit}};
  target->recorder_ = std::make_unique<Recorder>(host.kernel());
  auto backend = host.open_backend(*target->recorder_);
  if (!backend) return backend.error();
  if ((*backend)->interface() == backends::Interface::stage1)
    return base::fail(Errc::unsupported, Stage::open, 0,
                      "stage-1 mode maps without kernel calls: there is no raw loop of them; use the baselines of "
                      "iommufd or type1");
  target->backend_ = *std::move(backend);
  auto space = target->backend_->create_space({});
  if (!space) return space.error();
  target->space_ = *std::move(space);
  const auto attached = target->space_->attach({.pci_address = host.device()});
  if (!attached) return attached.error();
  if (const auto recorded = target->record_calls(memory, map); !recorded) return recorded.error();
  return target;
}

/// Lets the backend map and unmap the first granule of the memory at the first usable address.
Result<void> RawTarget::record_calls(const GuestMemory& memory, RawMap map) {
  backends::BackendOp op{.kind = backends::OpKind::map, .access = Access::read_write};
  op.memory = reinterpret_cast<std::uintptr_t>(memory.data());
  if (map == RawMap::copy) {
    if (!has(space_->facts().capabilities, backends::Capability::copy_reuses_pin))
      return base::fail(Errc::unsupported, Stage::map, 0,
                        "{} cannot share pins between mappings; the -copy baselines need iommufd", host_.backend());
    const auto region = space_->register_memory({.address = memory.data(), .length = memory.size()});
    if (!region) return region.error();
    op = {.kind = backends::OpKind::copy, .access = Access::read_write, .region = *region};
  }
  const auto usable = space_->usable_ranges();
  if (!usable) return usable.error();
  for (const IovaRange& range : *usable) {
    const auto first = IovaRange::from_length(range.start, Bytes{granule});
    if (!first || !range.contains(*first)) continue;
    op.range = *first;
    const std::array ops{op, backends::BackendOp{.kind = backends::OpKind::unmap, .range = *first}};
    std::array<backends::BackendOpResult, 2> results;
    recorder_->recording = true;
    space_->execute(ops, results);
    recorder_->recording = false;
    for (const auto& result : results)
      if (result.error) return result.error;
    fd_ = recorder_->call_fd;
    map_ = recorder_->map;
    unmap_ = recorder_->unmap;
    memory_base_ = std::visit([](const auto& call) { return memory_of(call); }, map_);
    return {};
  }
  return base::fail(Errc::iova_exhausted, Stage::reserve, 0, "the device leaves no IOVA range of 4 KiB usable");
}

Verdict RawTarget::map(IovaRange range, std::uint64_t memory) noexcept {
  const int failed = std::visit(
      [&](const auto& recorded) {
        auto call = recorded;
        aim(call, range, memory_base_ + memory);
        return errno_of(host_.kernel().ioctl(fd_, call.request, &call));
      },
      map_);
  return failed == 0 ? Verdict{{}, range.length()} : Verdict{refused(Stage::map, failed, range), {}};
}

Verdict RawTarget::unmap(IovaRange range) noexcept {
  return std::visit(
      [&](const auto& recorded) {
        auto call = recorded;
        aim(call, range);
        const int failed = errno_of(host_.kernel().ioctl(fd_, call.request, &call));
        return failed == 0 ? Verdict{{}, Bytes{removed_by(call)}} : Verdict{refused(Stage::unmap, failed, range), {}};
      },
      unmap_);
}

Verdict RawTarget::run_one(const Operation& op) noexcept {
  const bool is_map = op.kind == trace::EventKind::map;
  if (unit_ == RawUnit::event) return is_map ? map(op.range, op.memory) : unmap(op.range);
  Verdict all;
  for (std::uint64_t done = 0; done <= op.range.span(); done += granule) {
    const Iova start{op.range.start.value + done};
    const IovaRange leaf{start, Iova{start.value + (granule - 1)}};
    const Verdict one = is_map ? map(leaf, op.memory + done) : unmap(leaf);
    if (one.error) return {one.error, all.bytes};
    all.bytes.value += one.bytes.value;
  }
  return all;
}

void RawTarget::run(std::span<const Operation> batch, std::span<Verdict> verdicts) noexcept {
  for (std::size_t i = 0; i < batch.size(); ++i) verdicts[i] = run_one(batch[i]);
}

Result<Bytes> RawTarget::unmap_all() noexcept { return space_->unmap_all(); }

}  // namespace iovane::replay
