// The process's memory as the kernels would look at it before pinning: is it there, may it be written, is it a BAR.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "backends/model/options.hpp"

namespace iovane::backends::model {

class HostMemory {
 public:
  explicit HostMemory(MemoryCheck check) noexcept : check_{check} {}

  /// What pinning it would say: 0 or -EFAULT. `address` and `bytes` are multiples of an os_page. Any thread; a system
  /// call or none, see MemoryCheck.
  [[nodiscard]] int check(std::uint64_t address, std::uint64_t bytes, bool write) const noexcept {
    return check_ == MemoryCheck::none ? 0 : ask_kernel(address, bytes, write);
  }

  /// Device memory that was mapped into the process (VM_PFNMAP): type1 maps it, iommufd refuses it.
  void add_mmio(std::uint64_t address, std::uint64_t bytes);
  void remove_mmio(std::uint64_t address) noexcept;
  bool touches_mmio(std::uint64_t address, std::uint64_t bytes) const noexcept {
    // relaxed: whoever maps a BAR for a device has its address from add_mmio()'s caller, which orders the two.
    return mmio_count_.load(std::memory_order_relaxed) != 0 && in_mmio(address, bytes);
  }

 private:
  int ask_kernel(std::uint64_t address, std::uint64_t bytes, bool write) const noexcept;
  bool in_mmio(std::uint64_t address, std::uint64_t bytes) const noexcept;

  struct Mmio {
    std::uint64_t address;
    std::uint64_t bytes;
  };
  const MemoryCheck check_;
  mutable std::mutex mutex_;
  std::vector<Mmio> mmio_;
  std::atomic<std::size_t> mmio_count_{0};
};

/// Pages of a file, mapped into this process for as long as they are pinned. Not thread-safe.
class FileWindow {
 public:
  FileWindow() noexcept = default;
  ~FileWindow() { unmap(); }
  FileWindow(const FileWindow&) = delete;
  FileWindow& operator=(const FileWindow&) = delete;

  /// Maps `bytes` at `offset` (multiples of an os_page) of a memfd, shmem or hugetlbfs file.
  /// 0, -EINVAL (another kind of file, or beyond its last byte), -ENOMEM, -EACCES.
  [[nodiscard]] int map(int fd, std::uint64_t offset, std::uint64_t bytes, bool write) noexcept;
  void unmap() noexcept;
  std::byte* memory() const noexcept { return memory_; }

 private:
  void* base_ = nullptr;
  std::size_t base_bytes_ = 0;
  std::byte* memory_ = nullptr;
};

}  // namespace iovane::backends::model
