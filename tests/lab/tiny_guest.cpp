#include "lab/tiny_guest.hpp"

#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>

// r20 to r23 arguments, r24 number, r25 count, r26 what the third argument alternates by. `sc 1` is spelled out: the
// assembler has no name for it.
extern "C" const char tiny_guest_code[], tiny_guest_code_end[];
asm(".pushsection .rodata\n.balign 16\n.globl tiny_guest_code\ntiny_guest_code:\n"
    "1: mr 3,24\n mr 4,20\n mr 5,21\n mr 6,22\n mr 7,23\n .long 0x44000022\n mr 30,3\n"
    " xor 22,22,26\n addi 25,25,-1\n cmpdi 25,0\n bgt 1b\n"
    " lis 3,1\n ori 3,3,0x0004\n mr 4,30\n .long 0x44000022\n b 1b\n"
    ".globl tiny_guest_code_end\ntiny_guest_code_end: nop\n.popsection\n");

namespace iovane::test {
namespace {

// Under emulation KVM_RUN was seen to return with the caller's floating-point and vector registers changed, also those
// that a call keeps. Said to the compiler, it saves them.
inline void registers_may_have_changed() {
  asm volatile(""
               :
               :
               : "fr14", "fr15", "fr16", "fr17", "fr18", "fr19", "fr20", "fr21", "fr22", "fr23", "fr24", "fr25", "fr26",
                 "fr27", "fr28", "fr29", "fr30", "fr31", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28",
                 "v29", "v30", "v31", "memory");
}

constexpr std::uint64_t code_at = 0x1000;
constexpr std::uint64_t stop_hypercall = 0x10004;  // no such call: comes to userspace

}  // namespace

TinyGuest::TinyGuest(std::byte* ram, std::size_t bytes) {
  std::memcpy(ram + code_at, tiny_guest_code, static_cast<std::size_t>(tiny_guest_code_end - tiny_guest_code));
  __builtin___clear_cache(reinterpret_cast<char*>(ram + code_at), reinterpret_cast<char*>(ram + code_at + 4096));
  error_ = "open /dev/kvm";
  if ((kvm_ = ::open("/dev/kvm", O_RDWR | O_CLOEXEC)) < 0) return;
  error_ = "KVM_CREATE_VM";
  if ((vm_ = ::ioctl(kvm_, KVM_CREATE_VM, 0)) < 0) return;
  error_ = "KVM_SET_USER_MEMORY_REGION";
  kvm_userspace_memory_region slot{};
  slot.memory_size = bytes;
  slot.userspace_addr = reinterpret_cast<std::uintptr_t>(ram);
  if (::ioctl(vm_, KVM_SET_USER_MEMORY_REGION, &slot) != 0) return;
  // Real mode needs no tables; a KVM that insists on some other shape of them says so, and the guest runs all the same.
  kvm_ppc_mmuv3_cfg mmu{};
  mmu.flags = KVM_PPC_MMUV3_RADIX | KVM_PPC_MMUV3_GTSE;
  static_cast<void>(::ioctl(vm_, KVM_PPC_CONFIGURE_V3_MMU, &mmu));
  error_ = "KVM_ENABLE_CAP(ENABLE_HCALL)";
  for (const std::uint64_t number : {0x138, 0x13c}) {
    kvm_enable_cap enable{};
    enable.cap = KVM_CAP_PPC_ENABLE_HCALL;
    enable.args[0] = number;
    enable.args[1] = 1;
    if (::ioctl(vm_, KVM_ENABLE_CAP, &enable) != 0) return;
  }
  error_ = "KVM_CREATE_VCPU";
  if ((vcpu_ = ::ioctl(vm_, KVM_CREATE_VCPU, 0)) < 0) return;
  error_ = "KVM_ENABLE_CAP(PPC_PAPR)";
  kvm_enable_cap papr{};
  papr.cap = KVM_CAP_PPC_PAPR;
  if (::ioctl(vcpu_, KVM_ENABLE_CAP, &papr) != 0) return;
  error_ = "mmap of the vCPU";
  run_bytes_ = static_cast<std::size_t>(::ioctl(kvm_, KVM_GET_VCPU_MMAP_SIZE, 0));
  run_ = ::mmap(nullptr, run_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_, 0);
  if (run_ == MAP_FAILED) return;
  error_ = nullptr;
}

TinyGuest::~TinyGuest() {
  if (run_ != nullptr && run_ != MAP_FAILED) ::munmap(run_, run_bytes_);
  for (const int fd : {vcpu_, vm_, kvm_})
    if (fd >= 0) ::close(fd);
}

TinyGuest::Outcome TinyGuest::call(std::uint64_t number, const std::array<std::uint64_t, 4>& arguments,
                                   std::uint64_t times, const Answer& answer, std::uint64_t alternate) {
  Outcome outcome;
  auto* const run = static_cast<kvm_run*>(run_);
  kvm_regs registers{};
  registers.pc = code_at;
  registers.msr = 0x8000'0000'0000'1001;  // 64 bit, machine checks, little endian; no translation
  for (std::size_t i = 0; i < arguments.size(); ++i) registers.gpr[20 + i] = arguments[i];
  registers.gpr[24] = number;
  registers.gpr[25] = times;
  registers.gpr[26] = alternate;
  if (::ioctl(vcpu_, KVM_SET_REGS, &registers) != 0) return outcome;
  const auto before = std::chrono::steady_clock::now();
  for (std::uint64_t turns = 0; turns < 10 * times + 1000; ++turns) {
    const int ran = ::ioctl(vcpu_, KVM_RUN, 0);
    registers_may_have_changed();
    if (ran < 0) {
      if (errno == EINTR) continue;
      return outcome;
    }
    if (run->exit_reason != KVM_EXIT_PAPR_HCALL) return outcome;
    if (run->papr_hcall.nr == stop_hypercall) {
      outcome.ok = true;
      break;
    }
    ++outcome.exits;
    const std::array<std::uint64_t, 4> given{run->papr_hcall.args[0], run->papr_hcall.args[1], run->papr_hcall.args[2],
                                             run->papr_hcall.args[3]};
    run->papr_hcall.ret = static_cast<std::uint64_t>(answer(run->papr_hcall.nr, given));
  }
  outcome.nanoseconds = static_cast<std::uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - before).count());
  outcome.status = static_cast<std::int64_t>(run->papr_hcall.args[0]);  // the stop call passes on r30
  run->papr_hcall.ret = 0;
  return outcome;
}

}  // namespace iovane::test
