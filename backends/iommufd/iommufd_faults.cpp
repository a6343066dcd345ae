// I/O page faults of the devices of an IOAS: one fault queue for all its page tables. The kernel hands out whole groups
// of requests, and each group takes one answer.
#include <algorithm>
#include <cerrno>

#include "backends/iommufd/ioas_calls.hpp"
#include "backends/iommufd/iommufd_space.hpp"
#include "backends/kernel_error.hpp"
#include "base/error_text.hpp"

namespace iovane::backends::iommufd {
namespace {

namespace uapi = backends::uapi::iommufd;

Access access_of(std::uint32_t permissions) noexcept {
  return static_cast<Access>(((permissions & uapi::pgfault_perm_read) != 0 ? 1U : 0U) |
                             ((permissions & uapi::pgfault_perm_write) != 0 ? 2U : 0U));
}

}  // namespace

Result<void> IommufdSpace::open_fault_queue() noexcept {
  if (fault_queue_ != 0) return {};
  uapi::FaultQueueAlloc alloc;
  const int why = call(shared_.kernel(), shared_.fd(), alloc);
  if (why == ENOTTY || why == EOPNOTSUPP)
    return make_error(Errc::unsupported, Stage::attach, why,
                      "this kernel has no I/O page-fault queues (FAULT_QUEUE_ALLOC, Linux 6.11)");
  if (why != 0) return explain_call(Stage::attach, "FAULT_QUEUE_ALLOC", why);
  fault_queue_ = alloc.out_fault_id;
  fault_fd_ = KernelFd{shared_.kernel(), static_cast<int>(alloc.out_fault_fd), true};
  return {};
}

// The descriptor holds the queue, so it goes first.
void IommufdSpace::close_fault_queue() noexcept {
  if (fault_queue_ == 0) return;
  fault_fd_.reset();
  destroy(shared_.kernel(), shared_.fd(), fault_queue_);
  fault_queue_ = 0;
}

int IommufdSpace::page_fault_fd() const noexcept { return fault_fd_ ? shared_.kernel().pollable(fault_fd_.get()) : -1; }

Result<std::size_t> IommufdSpace::read_page_faults(std::span<PageFault> out) noexcept {
  if (!fault_fd_)
    return make_error(Errc::no_device, Stage::query,
                      "there is no page-fault queue yet: attach a device to a space made with page_faults");
  std::size_t filled = 0;
  while (filled < out.size()) {
    if (fault_next_ == fault_count_) {
      const long got = shared_.kernel().read(fault_fd_.get(), faults_.data(), sizeof faults_);
      if (got < 0 && got != -EAGAIN) return explain_call(Stage::query, "read of page faults", static_cast<int>(-got));
      fault_next_ = 0;
      fault_count_ = got > 0 ? static_cast<std::size_t>(got) / sizeof faults_[0] : 0;
      if (fault_count_ == 0) break;
    }
    const uapi::PageFault& raw = faults_[fault_next_++];
    PageFault& fault = out[filled++];
    fault = {};
    const auto device =
        std::find_if(devices_.begin(), devices_.end(), [&](const BoundDevice& d) { return d.object == raw.dev_id; });
    if (device != devices_.end()) fault.device = device->id.value;
    fault.address = Iova{raw.addr};
    fault.length = Bytes{raw.length};
    fault.access = access_of(raw.perm);
    fault.execute = (raw.perm & uapi::pgfault_perm_exec) != 0;
    fault.privileged = (raw.perm & uapi::pgfault_perm_priv) != 0;
    if ((raw.flags & uapi::pgfault_pasid_valid) != 0) fault.pasid = raw.pasid;
    fault.group = raw.grpid;
    fault.last = (raw.flags & uapi::pgfault_last_page) != 0;
    fault.cookie = raw.cookie;
  }
  return filled;
}

Result<void> IommufdSpace::answer_page_fault(std::uint32_t cookie, bool retry) noexcept {
  uapi::PageResponse response{.cookie = cookie, .code = retry ? uapi::page_resp_success : uapi::page_resp_invalid};
  const long wrote = fault_fd_ ? shared_.kernel().write(fault_fd_.get(), &response, sizeof response) : -EBADF;
  if (wrote == static_cast<long>(sizeof response)) return {};
  if (wrote == -EINVAL || wrote == -EBADF)
    return base::fail(Errc::not_found, Stage::query, static_cast<int>(-wrote),
                      "no page fault waits under cookie {}: it was answered, or its device was detached", cookie);
  return explain_call(Stage::query, "write of a page response", wrote < 0 ? static_cast<int>(-wrote) : EIO);
}

}  // namespace iovane::backends::iommufd
