// fork(2) without the library's handlers, as the kernel offers it on every architecture: arm64 has no call of that
// name.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <csignal>

namespace iovane::test {

/// The child's number, 0 in the child, -1 and errno. The child may only make system calls.
inline long raw_fork() noexcept { return ::syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0); }

}  // namespace iovane::test
