#include "backends/kernel_decorators.hpp"

#include <cerrno>
#include <thread>

#include "backends/uapi/iommufd.hpp"
#include "backends/uapi/vfio.hpp"
#include "base/fault_point.hpp"

namespace iovane::backends {
namespace {

constexpr std::size_t slot_of(unsigned long request) noexcept { return request & 0xff; }

/// True for calls that make a new descriptor, as their answer or in their structure.
constexpr bool returns_descriptor(unsigned long request) noexcept {
  return request == uapi::vfio::group_get_device_fd || request == uapi::iommufd::FaultQueueAlloc::request ||
         request == uapi::iommufd::VeventqAlloc::request;
}

}  // namespace

std::string_view ioctl_name(unsigned long request) noexcept {
  if ((request >> 8 & 0xff) != uapi::iommufd::ioctl_type) return "other";
  static constexpr std::array<std::string_view, 22> vfio_names{"VFIO_GET_API_VERSION",
                                                               "VFIO_CHECK_EXTENSION",
                                                               "VFIO_SET_IOMMU",
                                                               "VFIO_GROUP_GET_STATUS",
                                                               "VFIO_GROUP_SET_CONTAINER",
                                                               "VFIO_GROUP_UNSET_CONTAINER",
                                                               "VFIO_GROUP_GET_DEVICE_FD",
                                                               "VFIO_DEVICE_GET_INFO",
                                                               "VFIO_DEVICE_GET_REGION_INFO",
                                                               "VFIO_DEVICE_GET_IRQ_INFO",
                                                               "VFIO_DEVICE_SET_IRQS",
                                                               "VFIO_DEVICE_RESET",
                                                               "VFIO_IOMMU_GET_INFO",
                                                               "VFIO_IOMMU_MAP_DMA",
                                                               "VFIO_IOMMU_UNMAP_DMA",
                                                               "VFIO_IOMMU_ENABLE",
                                                               "VFIO_IOMMU_DISABLE",
                                                               "VFIO_IOMMU_DIRTY_PAGES",
                                                               "VFIO_DEVICE_BIND_IOMMUFD",
                                                               "VFIO_DEVICE_ATTACH_IOMMUFD_PT",
                                                               "VFIO_DEVICE_DETACH_IOMMUFD_PT",
                                                               "VFIO_EEH_PE_OP"};
  static constexpr std::array<std::string_view, 22> iommufd_names{"DESTROY",
                                                                  "IOAS_ALLOC",
                                                                  "IOAS_ALLOW_IOVAS",
                                                                  "IOAS_COPY",
                                                                  "IOAS_IOVA_RANGES",
                                                                  "IOAS_MAP",
                                                                  "IOAS_UNMAP",
                                                                  "OPTION",
                                                                  "VFIO_IOAS",
                                                                  "HWPT_ALLOC",
                                                                  "GET_HW_INFO",
                                                                  "HWPT_SET_DIRTY_TRACKING",
                                                                  "HWPT_GET_DIRTY_BITMAP",
                                                                  "HWPT_INVALIDATE",
                                                                  "FAULT_QUEUE_ALLOC",
                                                                  "IOAS_MAP_FILE",
                                                                  "VIOMMU_ALLOC",
                                                                  "VDEVICE_ALLOC",
                                                                  "IOAS_CHANGE_PROCESS",
                                                                  "VEVENTQ_ALLOC",
                                                                  "HW_QUEUE_ALLOC",
                                                                  "IOAS_NOIOMMU_GET_PA"};
  const std::size_t number = slot_of(request);
  if (number >= 100 && number - 100 < vfio_names.size()) return vfio_names[number - 100];
  if (number >= 0x80 && number - 0x80 < iommufd_names.size()) return iommufd_names[number - 0x80];
  return "other";
}

void CountingKernel::count(unsigned long request, long answer) noexcept {
  // relaxed throughout: statistics; nobody reads data through them.
  calls_[slot_of(request)].fetch_add(1, std::memory_order_relaxed);
  if (answer < 0) failures_.fetch_add(1, std::memory_order_relaxed);
  if (answer >= 0 && returns_descriptor(request)) open_.fetch_add(1, std::memory_order_relaxed);
}

int CountingKernel::open(const char* path, int flags) noexcept {
  const int fd = inner().open(path, flags);
  if (fd >= 0) open_.fetch_add(1, std::memory_order_relaxed);  // relaxed: a statistic
  return fd;
}

int CountingKernel::close(int fd) noexcept {
  const int answer = inner().close(fd);
  if (answer == 0) open_.fetch_sub(1, std::memory_order_relaxed);  // relaxed: a statistic
  return answer;
}

int CountingKernel::duplicate(int fd) noexcept {
  const int copy = inner().duplicate(fd);
  if (copy >= 0) open_.fetch_add(1, std::memory_order_relaxed);  // relaxed: a statistic
  return copy;
}

long CountingKernel::ioctl(int fd, unsigned long request, void* argument) noexcept {
  const long answer = inner().ioctl(fd, request, argument);
  count(request, answer);
  return answer;
}

long CountingKernel::ioctl_value(int fd, unsigned long request, unsigned long value) noexcept {
  const long answer = inner().ioctl_value(fd, request, value);
  count(request, answer);
  return answer;
}

std::uint64_t CountingKernel::calls(unsigned long request) const noexcept {
  return calls_[slot_of(request)].load(std::memory_order_relaxed);  // relaxed: a statistic
}

std::uint64_t CountingKernel::calls() const noexcept {
  std::uint64_t sum = 0;
  for (const auto& counter : calls_) sum += counter.load(std::memory_order_relaxed);  // relaxed: a statistic
  return sum;
}

std::uint64_t CountingKernel::failures() const noexcept {
  return failures_.load(std::memory_order_relaxed);  // relaxed: a statistic
}

std::int64_t CountingKernel::open_descriptors() const noexcept {
  return open_.load(std::memory_order_relaxed);  // relaxed: a statistic
}

void DelayingKernel::delay(unsigned long request, std::chrono::nanoseconds time) noexcept {
  delays_[slot_of(request)] = time;
}

void DelayingKernel::wait_before(unsigned long request) noexcept {
  const auto own = delays_[slot_of(request)];
  const auto time = own.count() != 0 ? own : all_;
  if (time.count() <= 0) return;
  if (time >= std::chrono::microseconds{50}) {
    std::this_thread::sleep_for(time);
    return;
  }
  const auto until = std::chrono::steady_clock::now() + time;
  while (std::chrono::steady_clock::now() < until) {
    // bounded by `time`, which is below 50 microseconds
  }
}

long DelayingKernel::ioctl(int fd, unsigned long request, void* argument) noexcept {
  wait_before(request);
  return inner().ioctl(fd, request, argument);
}

long DelayingKernel::ioctl_value(int fd, unsigned long request, unsigned long value) noexcept {
  wait_before(request);
  return inner().ioctl_value(fd, request, value);
}

void FailingKernel::add(const Rule& rule) {
  const std::lock_guard lock{mutex_};
  rules_.push_back({rule, 0});
}

void FailingKernel::clear() noexcept {
  const std::lock_guard lock{mutex_};
  rules_.clear();
}

FailingKernel::Verdict FailingKernel::judge(unsigned long request) noexcept {
  if (base::fault_now(base::FaultKind::kernel_call)) return {fault_errno_, false};
  const std::lock_guard lock{mutex_};
  Verdict verdict;
  for (Armed& armed : rules_) {
    if (armed.rule.request != 0 && armed.rule.request != request) continue;
    ++armed.seen;
    if (armed.seen >= armed.rule.nth && armed.seen - armed.rule.nth < armed.rule.times)
      verdict = {armed.rule.os_errno, armed.rule.after_call};
  }
  return verdict;
}

int FailingKernel::open(const char* path, int flags) noexcept {
  if (base::fault_now(base::FaultKind::kernel_call)) return -fault_errno_;
  return inner().open(path, flags);
}

int FailingKernel::duplicate(int fd) noexcept {
  if (base::fault_now(base::FaultKind::kernel_call)) return -fault_errno_;
  return inner().duplicate(fd);
}

long FailingKernel::read(int fd, void* buffer, std::size_t bytes) noexcept {
  if (base::fault_now(base::FaultKind::kernel_call)) return -fault_errno_;
  return inner().read(fd, buffer, bytes);
}

long FailingKernel::write(int fd, const void* buffer, std::size_t bytes) noexcept {
  if (base::fault_now(base::FaultKind::kernel_call)) return -fault_errno_;
  return inner().write(fd, buffer, bytes);
}

long FailingKernel::ioctl(int fd, unsigned long request, void* argument) noexcept {
  const Verdict verdict = judge(request);
  if (verdict.os_errno == 0) return inner().ioctl(fd, request, argument);
  if (verdict.after_call) inner().ioctl(fd, request, argument);
  return -verdict.os_errno;
}

long FailingKernel::ioctl_value(int fd, unsigned long request, unsigned long value) noexcept {
  const Verdict verdict = judge(request);
  if (verdict.os_errno == 0) return inner().ioctl_value(fd, request, value);
  if (verdict.after_call) inner().ioctl_value(fd, request, value);
  return -verdict.os_errno;
}

}  // namespace iovane::backends
