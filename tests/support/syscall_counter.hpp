// How many system calls the calling thread makes, whoever makes them: seen at the kernel's entry, not at a seam of
// ours.
//
// Syscall User Dispatch (prctl(2), Linux 5.11 on x86-64): while the selector byte says so, each system call of this
// thread becomes a SIGSYS. The handler counts it, makes the call and hands its result back, so that the counted code
// notices nothing. Its own way out, rt_sigreturn, lies in the one code range that is let through.
#pragma once

#include <pthread.h>
#include <sys/prctl.h>
#include <ucontext.h>

#include <csignal>
#include <cstdint>
#include <optional>

namespace iovane::test {

class SyscallCounter {
 public:
  struct Count {
    std::uint64_t calls = 0;
    long last = -1;  ///< the last one's number
  };

  /// Runs f() and counts. Nothing where the kernel or the processor cannot, and under ThreadSanitizer, which has
  /// signal handlers run later. One thread at a time in the process.
  template <typename F>
  static std::optional<Count> of(F&& f) {
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
    if (!arm()) return std::nullopt;
    selector() = block;
    f();
    selector() = allow;
    disarm();
    return count();
#else
    static_cast<void>(f);
    return std::nullopt;
#endif
  }

#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
 private:
  static constexpr unsigned char allow = 0;  // SYSCALL_DISPATCH_FILTER_ALLOW and _BLOCK
  static constexpr unsigned char block = 1;
  static constexpr int set_dispatch = 59;  // PR_SET_SYSCALL_USER_DISPATCH; older C libraries do not name them
  static constexpr unsigned long restorer_bytes = 16;

  static volatile unsigned char& selector() {
    static volatile unsigned char byte = allow;
    return byte;
  }
  static Count& count() {
    static Count value;
    return value;
  }
  static std::uintptr_t& restorer() {
    static std::uintptr_t address = 0;
    return address;
  }
  static struct sigaction& before() {
    static struct sigaction action {};
    return action;
  }

  __attribute__((noinline, no_sanitize("address", "undefined"))) static void handle(int, siginfo_t*, void* context) {
    selector() = allow;
    if (restorer() == 0) {  // the first one is raised by arm(), to learn where a handler returns to
      restorer() = reinterpret_cast<std::uintptr_t>(__builtin_return_address(0));
      return;
    }
    auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    ++count().calls;
    count().last = registers[REG_RAX];
    long result = registers[REG_RAX];
    register long r10 asm("r10") = registers[REG_R10];
    register long r8 asm("r8") = registers[REG_R8];
    register long r9 asm("r9") = registers[REG_R9];
    asm volatile("syscall"
                 : "+a"(result)
                 : "D"(registers[REG_RDI]), "S"(registers[REG_RSI]), "d"(registers[REG_RDX]), "r"(r10), "r"(r8), "r"(r9)
                 : "rcx", "r11", "memory");
    registers[REG_RAX] = result;
    selector() = block;
  }

  static bool arm() {
    struct sigaction action {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO;
    sigfillset(&action.sa_mask);
    if (sigaction(SIGSYS, &action, &before()) != 0) return false;
    restorer() = 0;
    raise(SIGSYS);
    count() = {};
    if (prctl(set_dispatch, 1UL, restorer(), restorer_bytes, &selector()) == 0) return true;
    sigaction(SIGSYS, &before(), nullptr);
    return false;
  }
  static void disarm() {
    prctl(set_dispatch, 0UL, 0UL, 0UL, 0UL);
    sigaction(SIGSYS, &before(), nullptr);
  }
#endif
};

}  // namespace iovane::test
