#include "backends/model/host_memory.hpp"

#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <algorithm>
#include <bit>
#include <cerrno>

#include "backends/model/page_table.hpp"
#include "base/checked_math.hpp"

namespace iovane::backends::model {
namespace {
// In <linux/mman.h> since 5.14; spelled here because C libraries' headers lag behind.
constexpr int advice_populate_read = 22;
constexpr int advice_populate_write = 23;
}  // namespace

int HostMemory::ask_kernel(std::uint64_t address, std::uint64_t bytes, bool write) const noexcept {
  void* const start = std::bit_cast<void*>(address);
  int rc = 0;
  switch (check_) {
    case MemoryCheck::none: return 0;
    case MemoryCheck::mapped: rc = ::msync(start, bytes, MS_ASYNC); break;
    case MemoryCheck::populate:
      do {  // bounded by the signals that arrive
        rc = ::madvise(start, bytes, write ? advice_populate_write : advice_populate_read);
      } while (rc != 0 && errno == EINTR);
      break;
  }
  return rc == 0 ? 0 : -EFAULT;
}

void HostMemory::add_mmio(std::uint64_t address, std::uint64_t bytes) {
  const std::lock_guard lock{mutex_};
  mmio_.push_back({address, bytes});
  mmio_count_.store(mmio_.size(), std::memory_order_relaxed);  // relaxed: a hint; the list is read under the mutex
}

void HostMemory::remove_mmio(std::uint64_t address) noexcept {
  const std::lock_guard lock{mutex_};
  std::erase_if(mmio_, [address](const Mmio& m) { return m.address == address; });
  mmio_count_.store(mmio_.size(), std::memory_order_relaxed);  // relaxed: as above
}

bool HostMemory::in_mmio(std::uint64_t address, std::uint64_t bytes) const noexcept {
  const std::lock_guard lock{mutex_};
  return std::any_of(mmio_.begin(), mmio_.end(), [address, bytes](const Mmio& m) {
    return m.address <= address + (bytes - 1) && address <= m.address + (m.bytes - 1);
  });
}

int FileWindow::map(int fd, std::uint64_t offset, std::uint64_t bytes, bool write) noexcept {
  struct statfs fs {};
  struct stat file {};
  if (::fstatfs(fd, &fs) != 0 || ::fstat(fd, &file) != 0) return -EINVAL;
  const bool huge = fs.f_type == HUGETLBFS_MAGIC;
  if (!huge && fs.f_type != TMPFS_MAGIC) return -EINVAL;
  const auto beyond = base::checked_add(offset, bytes);
  if (!beyond || *beyond > static_cast<std::uint64_t>(file.st_size)) return -EINVAL;
  const std::uint64_t unit = huge ? static_cast<std::uint64_t>(file.st_blksize) : os_page_bytes;
  const std::uint64_t from = base::align_down(offset, unit);
  const auto to = base::align_up(*beyond, unit);
  if (!to) return -EINVAL;
  void* const base =
      ::mmap(nullptr, *to - from, write ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, static_cast<off_t>(from));
  if (base == MAP_FAILED) return errno == ENOMEM || errno == EACCES ? -errno : -EINVAL;
  base_ = base;
  base_bytes_ = *to - from;
  memory_ = static_cast<std::byte*>(base) + (offset - from);
  return 0;
}

void FileWindow::unmap() noexcept {
  if (base_ != nullptr) ::munmap(base_, base_bytes_);
  base_ = nullptr;
  memory_ = nullptr;
}

}  // namespace iovane::backends::model
