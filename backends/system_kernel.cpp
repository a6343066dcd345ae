#include "backends/system_kernel.hpp"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string_view>

#include "backends/sysfs_inventory.hpp"
#include "base/error_text.hpp"
#include "base/os_error.hpp"

namespace iovane::backends {
namespace {

template <typename T>
T or_negative_errno(T answer) noexcept {
  return answer >= 0 ? answer : static_cast<T>(-errno);
}

/// The number after "Name:" in a line of /proc/self/status; hexadecimal for the capability masks.
std::optional<std::uint64_t> status_number(std::string_view line, std::string_view name, int base) noexcept {
  if (line.substr(0, name.size()) != name) return std::nullopt;
  line.remove_prefix(name.size());
  while (!line.empty() && (line.front() == ' ' || line.front() == '\t')) line.remove_prefix(1);
  std::uint64_t value = 0;
  const auto [stop, problem] = std::from_chars(line.data(), line.data() + line.size(), value, base);
  if (problem != std::errc{}) return std::nullopt;
  return value;
}

constexpr std::uint64_t cap_ipc_lock = 1U << 14;

}  // namespace

int SystemKernel::open(const char* path, int flags) noexcept {
  return or_negative_errno(::open(path, flags | O_CLOEXEC));
}

int SystemKernel::close(int fd) noexcept { return or_negative_errno(::close(fd)); }

int SystemKernel::duplicate(int fd) noexcept { return or_negative_errno(::fcntl(fd, F_DUPFD_CLOEXEC, 0)); }

long SystemKernel::ioctl(int fd, unsigned long request, void* argument) noexcept {
  return or_negative_errno(static_cast<long>(::ioctl(fd, request, argument)));
}

long SystemKernel::ioctl_value(int fd, unsigned long request, unsigned long value) noexcept {
  return or_negative_errno(static_cast<long>(::ioctl(fd, request, value)));
}

long SystemKernel::read(int fd, void* buffer, std::size_t bytes) noexcept {
  return or_negative_errno(static_cast<long>(::read(fd, buffer, bytes)));
}

long SystemKernel::write(int fd, const void* buffer, std::size_t bytes) noexcept {
  return or_negative_errno(static_cast<long>(::write(fd, buffer, bytes)));
}

Result<void*> SystemKernel::map_memory(int fd, std::uint64_t offset, std::size_t length, bool writable) noexcept {
  void* const address = ::mmap(nullptr, length, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd,
                               static_cast<off_t>(offset));
  if (address != MAP_FAILED) return address;
  const int why = errno;
  return base::fail(base::errc_from_errno(why), Stage::open, why,
                    "cannot mmap {} bytes at offset {:#x} of descriptor {}", length, offset, fd);
}

void SystemKernel::unmap_memory(void* address, std::size_t length) noexcept { ::munmap(address, length); }

Result<std::vector<PciDevice>> SystemKernel::pci_devices() { return read_pci_inventory(sysfs_); }

MemlockUse SystemKernel::memlock() noexcept {
  MemlockUse use;
  rlimit limit{};
  if (::getrlimit(RLIMIT_MEMLOCK, &limit) == 0) {
    if (limit.rlim_cur != RLIM_INFINITY) use.limit = Bytes{limit.rlim_cur};
    if (limit.rlim_max != RLIM_INFINITY) use.hard_limit = Bytes{limit.rlim_max};
  }
  try {
    std::ifstream status{"/proc/self/status"};
    for (std::string line; std::getline(status, line);) {
      if (const auto kib = status_number(line, "VmLck:", 10)) use.locked = Bytes{*kib << 10};
      if (const auto kib = status_number(line, "VmPin:", 10)) use.pinned = Bytes{*kib << 10};
      if (const auto mask = status_number(line, "CapEff:", 16)) use.exempt = (*mask & cap_ipc_lock) != 0;
    }
  } catch (...) {
    // Out of memory while describing a failure: the limit alone is still worth saying.
  }
  return use;
}

std::string SystemKernel::description() {
  utsname name{};
  if (::uname(&name) != 0) return "unknown kernel";
  return std::string{static_cast<const char*>(name.sysname)} + " " + static_cast<const char*>(name.release);
}

}  // namespace iovane::backends
