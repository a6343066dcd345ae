#include "support/failing_process.hpp"

#include <dlfcn.h>
#include <fcntl.h>
#include <liburing.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdarg>
#include <cstdlib>
#include <new>

#include "base/fault_point.hpp"

namespace iovane::test {
namespace {

thread_local int own_business = 0;

bool fails(base::FaultKind kind) noexcept { return own_business == 0 && base::fault_now(kind); }

/// True, and errno says why, when this system call is to fail.
bool call_fails(int os_errno) noexcept {
  if (!fails(base::FaultKind::system_call)) return false;
  errno = os_errno;
  return true;
}

/// What the program would have called without this file. Looked up once: the loader allocates.
template <typename Function>
Function* next(const char* name, Function*& found) noexcept {
  if (found == nullptr) found = reinterpret_cast<Function*>(::dlsym(RTLD_NEXT, name));
  return found;
}

void* allocate(std::size_t bytes, std::size_t alignment) noexcept {
  if (fails(base::FaultKind::allocation)) return nullptr;
  if (bytes == 0) bytes = 1;
  if (alignment <= __STDCPP_DEFAULT_NEW_ALIGNMENT__) return std::malloc(bytes);
  return std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}
void* allocate_or_throw(std::size_t bytes, std::size_t alignment) {
  void* const memory = allocate(bytes, alignment);
  if (memory == nullptr) throw std::bad_alloc{};
  return memory;
}

}  // namespace

OwnBusiness::OwnBusiness() noexcept { ++own_business; }
OwnBusiness::~OwnBusiness() { --own_business; }

}  // namespace iovane::test

using iovane::test::allocate;
using iovane::test::allocate_or_throw;
using iovane::test::call_fails;
using iovane::test::next;

void* operator new(std::size_t n) { return allocate_or_throw(n, 1); }
void* operator new[](std::size_t n) { return allocate_or_throw(n, 1); }
void* operator new(std::size_t n, const std::nothrow_t&) noexcept { return allocate(n, 1); }
void* operator new[](std::size_t n, const std::nothrow_t&) noexcept { return allocate(n, 1); }
void* operator new(std::size_t n, std::align_val_t a) { return allocate_or_throw(n, static_cast<std::size_t>(a)); }
void* operator new[](std::size_t n, std::align_val_t a) { return allocate_or_throw(n, static_cast<std::size_t>(a)); }
void* operator new(std::size_t n, std::align_val_t a, const std::nothrow_t&) noexcept {
  return allocate(n, static_cast<std::size_t>(a));
}
void* operator new[](std::size_t n, std::align_val_t a, const std::nothrow_t&) noexcept {
  return allocate(n, static_cast<std::size_t>(a));
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, const std::nothrow_t&) noexcept { std::free(p); }
void operator delete[](void* p, const std::nothrow_t&) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t, const std::nothrow_t&) noexcept { std::free(p); }
void operator delete[](void* p, std::align_val_t, const std::nothrow_t&) noexcept { std::free(p); }

// Those that take something from the kernel, with the error of a host that has no more of it; and those that wait or
// look, which a kernel short of memory, or a signal, ends early.
extern "C" {

int eventfd(unsigned count, int flags) noexcept {
  static int (*real)(unsigned, int) = nullptr;
  return call_fails(EMFILE) ? -1 : next("eventfd", real)(count, flags);
}

int open(const char* path, int flags, ...) {
  static int (*real)(const char*, int, ...) = nullptr;
  std::va_list more;
  va_start(more, flags);
  const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(more, mode_t) : 0;
  va_end(more);
  return call_fails(EMFILE) ? -1 : next("open", real)(path, flags, mode);
}

int posix_fallocate(int fd, off_t start, off_t length) {
  static int (*real)(int, off_t, off_t) = nullptr;
  return call_fails(ENOSPC) ? ENOSPC : next("posix_fallocate", real)(fd, start, length);
}

void* mmap(void* at, std::size_t length, int protection, int flags, int fd, off_t offset) noexcept {
  if (call_fails(ENOMEM)) return MAP_FAILED;
  // By number: the loader maps too, before anything can be looked up.
  return reinterpret_cast<void*>(::syscall(SYS_mmap, at, length, protection, flags, fd, offset));
}

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*main)(void*), void* argument) noexcept {
  static int (*real)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*) = nullptr;
  return call_fails(EAGAIN) ? EAGAIN : next("pthread_create", real)(thread, attributes, main, argument);
}

int poll(pollfd* fds, nfds_t count, int timeout) {
  static int (*real)(pollfd*, nfds_t, int) = nullptr;
  return call_fails(ENOMEM) ? -1 : next("poll", real)(fds, count, timeout);
}

int ppoll(pollfd* fds, nfds_t count, const timespec* timeout, const sigset_t* mask) {
  static int (*real)(pollfd*, nfds_t, const timespec*, const sigset_t*) = nullptr;
  return call_fails(ENOMEM) ? -1 : next("ppoll", real)(fds, count, timeout, mask);
}

int io_uring_queue_init(unsigned entries, io_uring* ring, unsigned flags) noexcept {
  static int (*real)(unsigned, io_uring*, unsigned) = nullptr;
  return call_fails(ENOMEM) ? -ENOMEM : next("io_uring_queue_init", real)(entries, ring, flags);
}

int io_uring_submit(io_uring* ring) noexcept {
  static int (*real)(io_uring*) = nullptr;
  return call_fails(EAGAIN) ? -EAGAIN : next("io_uring_submit", real)(ring);
}

int io_uring_submit_and_wait(io_uring* ring, unsigned count) noexcept {
  static int (*real)(io_uring*, unsigned) = nullptr;
  return call_fails(EINTR) ? -EINTR : next("io_uring_submit_and_wait", real)(ring, count);
}

int io_uring_submit_and_wait_timeout(io_uring* ring, io_uring_cqe** cqe, unsigned count, __kernel_timespec* limit,
                                     sigset_t* mask) noexcept {
  static int (*real)(io_uring*, io_uring_cqe**, unsigned, __kernel_timespec*, sigset_t*) = nullptr;
  return call_fails(EINTR) ? -EINTR : next("io_uring_submit_and_wait_timeout", real)(ring, cqe, count, limit, mask);
}

}  // extern "C"
