#include "backends/kvm_tce/kvm_tce.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "backends/kernel_error.hpp"
#include "backends/uapi/kvm.hpp"
#include "base/checked_math.hpp"
#include "base/error_text.hpp"

namespace iovane::backends {
namespace {

namespace kvm = uapi::kvm;

std::size_t mapped_bytes(const KvmTableShape& shape) noexcept {
  const auto os_page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  return base::align_up(shape.entries * sizeof(std::uint64_t), os_page).value_or(0);
}

}  // namespace

Result<std::unique_ptr<KvmTce>> KvmTce::open(Kernel& kernel, const DescriptorSource& vm, int vfio_device) {
  if (vm.fd < 0) return make_error(Errc::invalid_argument, Stage::open, "hand in the descriptor of a KVM VM");
  auto fd = open_descriptor(kernel, "the VM", vm);
  if (!fd) return fd.error();
  std::unique_ptr<KvmTce> made{new KvmTce{kernel, *std::move(fd)}};
  const auto has = [&](unsigned long capability) {
    return kernel.ioctl_value(made->vm_.get(), kvm::check_extension, capability) > 0;
  };
  made->any_window_ = has(kvm::cap_spapr_tce_64);
  if (!made->any_window_ && !has(kvm::cap_spapr_tce))
    return base::fail(Errc::unsupported, Stage::open, 0,
                      "descriptor {} is no VM with TCE tables: KVM on POWER has them (KVM_CAP_SPAPR_TCE)", vm.fd);
  made->lists_in_kernel_ = has(kvm::cap_spapr_multitce);
  made->can_couple_ = has(kvm::cap_spapr_tce_vfio) && has(kvm::cap_device_ctrl);
  if (vfio_device >= 0) made->device_ = KernelFd{kernel, vfio_device, false};
  return made;
}

Result<void> KvmTce::need_device() {
  if (device_) return {};
  kvm::CreateDevice create{.type = kvm::device_type_vfio};
  if (const int why = call(kernel_, vm_.get(), create); why != 0) {
    if (why == EBUSY || why == EEXIST)
      return base::fail(Errc::busy, Stage::attach, why,
                        "the VM has a VFIO device already, and can have one: hand in its descriptor");
    return explain_call(Stage::attach, "KVM_CREATE_DEVICE(VFIO)", why);
  }
  device_ = KernelFd{kernel_, static_cast<int>(create.fd), true};
  return {};
}

int KvmTce::set_attribute(std::uint64_t attribute, void* argument) noexcept {
  kvm::DeviceAttribute set{
      .group = kvm::vfio_group, .attr = attribute, .addr = reinterpret_cast<std::uintptr_t>(argument)};
  return call(kernel_, device_.get(), set);
}

Result<void> KvmTce::add_group(int group) {
  Member& member = groups_[group];
  if (member.users++ != 0) return {};
  std::int32_t fd = group;
  const int why = set_attribute(kvm::vfio_group_add, &fd);
  member.ours = why == 0;
  if (why == 0 || why == EEXIST) return {};
  groups_.erase(group);
  return explain_call(Stage::attach, "KVM_DEV_VFIO_GROUP_ADD", why);
}

void KvmTce::drop_group(int group) noexcept {
  const auto at = groups_.find(group);
  if (at == groups_.end() || --at->second.users != 0) return;
  std::int32_t fd = group;
  if (at->second.ours) set_attribute(kvm::vfio_group_del, &fd);
  groups_.erase(at);
}

Result<std::unique_ptr<KvmTable>> KvmTce::create_table(const KvmTableShape& shape) {
  if (shape.page_shift >= 64 || shape.entries == 0 ||
      !base::is_aligned(shape.address, std::uint64_t{1} << shape.page_shift) ||
      shape.entries > ~std::uint64_t{0} >> shape.page_shift)
    return base::fail(
        Errc::invalid_argument, Stage::open, 0,
        "a table of {} entries of 2^{} bytes at {:#x} is no window: the address is a multiple of the page",
        shape.entries, shape.page_shift, shape.address);
  long fd = 0;
  if (any_window_) {
    kvm::CreateSpaprTce64 create{.liobn = shape.liobn,
                                 .page_shift = shape.page_shift,
                                 .flags = 0,
                                 .offset = shape.address >> shape.page_shift,
                                 .size = shape.entries};
    fd = kernel_.ioctl(vm_.get(), kvm::CreateSpaprTce64::request, &create);
  } else {
    if (shape.page_shift != 12 || shape.address != 0 || shape.entries > 0xffff'f000U >> 12)
      return make_error(Errc::unsupported, Stage::open,
                        "this kernel has tables of 4 KiB pages at bus address 0 below 4 GiB only (no "
                        "KVM_CAP_SPAPR_TCE_64)");
    kvm::CreateSpaprTce create{.liobn = shape.liobn, .window_size = static_cast<std::uint32_t>(shape.entries << 12)};
    fd = kernel_.ioctl(vm_.get(), kvm::create_spapr_tce, &create);
  }
  if (fd < 0) {
    const int why = static_cast<int>(-fd);
    if (why == EBUSY)
      return base::fail(Errc::busy, Stage::open, why, "LIOBN {:#x} has a table in this VM already", shape.liobn);
    if (why == ENOMEM)
      return explain_no_memory(kernel_, MemlockAccount::process_locked, Stage::open, "KVM_CREATE_SPAPR_TCE",
                               Bytes{shape.entries * sizeof(std::uint64_t)});
    return explain_call(Stage::open, "KVM_CREATE_SPAPR_TCE", why);
  }
  KernelFd table{kernel_, static_cast<int>(fd), true};
  auto memory = kernel_.map_memory(table.get(), 0, mapped_bytes(shape), true);
  if (!memory) return memory.error();
  return std::unique_ptr<KvmTable>{
      new KvmTable{*this, shape, std::move(table), {static_cast<std::uint64_t*>(*memory), shape.entries}}};
}

KvmTable::KvmTable(KvmTce& owner, const KvmTableShape& shape, KernelFd fd, std::span<std::uint64_t> entries) noexcept
    : owner_{owner}, shape_{shape}, fd_{std::move(fd)}, entries_{entries} {}

KvmTable::~KvmTable() {
  owner_.kernel_.unmap_memory(entries_.data(), mapped_bytes(shape_));
  fd_.reset();
  for (const int group : groups_) owner_.drop_group(group);
}

Result<void> KvmTable::couple(BackendSpace& space) {
  SpaprControl* const control = space.spapr();
  if (control == nullptr || !owner_.can_couple_)
    return base::fail(Errc::unsupported, Stage::attach, 0, "LIOBN {:#x} cannot be coupled: {}", shape_.liobn,
                      control == nullptr ? "the address space is no sPAPR container"
                                         : "this kernel's KVM does not know VFIO groups (KVM_CAP_SPAPR_TCE_VFIO)");
  if (const auto ready = owner_.need_device(); !ready) return ready;
  const std::vector<int> wanted = control->group_descriptors();
  groups_.reserve(groups_.size() + wanted.size());
  const std::size_t before = groups_.size();
  Error error{};
  for (const int group : wanted) {
    if (std::find(groups_.begin(), groups_.end(), group) != groups_.end()) continue;
    if (const auto added = owner_.add_group(group); !added) {
      error = added.error();
      break;
    }
    groups_.push_back(group);
    kvm::VfioSpaprTce pair{.groupfd = group, .tablefd = fd_.get()};
    const int why = owner_.set_attribute(kvm::vfio_group_set_tce, &pair);
    if (why == 0) continue;
    error = why == EINVAL
                ? base::fail(Errc::invalid_argument, Stage::attach, why,
                             "LIOBN {:#x}: the container has no window at {:#x} of {} bytes with pages of at most {} "
                             "bytes; windows must match the table's place and size exactly",
                             shape_.liobn, shape_.address, shape_.entries << shape_.page_shift,
                             std::uint64_t{1} << shape_.page_shift)
                : explain_call(Stage::attach, "KVM_DEV_VFIO_GROUP_SET_SPAPR_TCE", why);
    break;
  }
  if (!error) return {};
  // Taking a group out of the VFIO device uncouples it, as long as no other table needs it there.
  while (groups_.size() > before) {
    owner_.drop_group(groups_.back());
    groups_.pop_back();
  }
  return error;
}

}  // namespace iovane::backends
