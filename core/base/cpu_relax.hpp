// The hint of a spinning loop.
#pragma once

namespace iovane::base {

/// Tells the core that this is a spin, for the sake of its sibling thread and of the power it draws.
inline void cpu_relax() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#elif defined(__powerpc64__)
  asm volatile("or 27,27,27" ::: "memory");
#endif
}

}  // namespace iovane::base
