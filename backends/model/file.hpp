// Open files of the software host and their fake descriptors.
//
// Descriptor numbers begin far above what a process can have, so that none is ever mistaken for a real one.
// Files are type-stable: a closed file's object is reused for the next file of its kind and freed with the host only.
// An ioctl that races with close() of its descriptor therefore acts on a live object, possibly on its successor, as a
// racing program would on a real kernel. Nothing on the ioctl path counts references.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace iovane::backends::model {

inline constexpr int first_descriptor = 1 << 24;

class File {
 public:
  File() noexcept = default;
  virtual ~File() = default;
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  /// `argument`: an address or a number, as the request defines. Any thread. A result or -errno.
  virtual long ioctl(unsigned long request, std::uint64_t argument) noexcept = 0;
  /// Bytes of a region that can be mapped at `offset`; nullptr when there are none. The memory lives as long as the
  /// host.
  virtual void* mappable(std::uint64_t offset, std::size_t length) noexcept;
  /// read(2), write(2), and what poll(2) may wait on. Most files have none of them.
  virtual long read(void*, std::size_t) noexcept { return -22; }
  virtual long write(const void*, std::size_t) noexcept { return -22; }
  virtual int pollable() const noexcept { return -1; }
  /// The last reference is gone: undo everything. The object may be reused afterwards.
  virtual void release() noexcept = 0;

 private:
  friend class DescriptorTable;
  std::uint32_t references_ = 0;  // descriptors and other files; under the table's mutex
  std::vector<File*>* pool_ = nullptr;
};

class DescriptorTable {
 public:
  explicit DescriptorTable(std::size_t descriptors_max);
  ~DescriptorTable();

  /// A fresh or reused file of kind F with no references; nullptr without memory.
  template <typename F, typename... Args>
  F* make(Args&&... args) noexcept;
  /// Gives the file the lowest free descriptor and a reference; -EMFILE.
  int install(File* file) noexcept;
  int duplicate(int fd) noexcept;
  int close(int fd) noexcept;
  /// nullptr when it is not open. Lock-free.
  File* find(int fd) const noexcept;

  /// References from other files (a bound device holds its iommufd, a device file its group).
  void add_reference(File* file) noexcept;
  void drop_reference(File* file) noexcept;
  /// A file that was made and then not installed.
  void discard(File* file) noexcept;

  std::size_t open_count() const noexcept;
  /// Every file ever made, the closed ones (which hold nothing) included.
  template <typename Visit>
  void for_each(Visit&& visit) const {
    std::vector<File*> all;
    {
      const std::lock_guard lock{mutex_};
      for (const auto& file : files_) all.push_back(file.get());
    }
    for (File* file : all) visit(*file);
  }

 private:
  template <typename F>
  static std::size_t kind_of() noexcept;
  static std::size_t next_kind() noexcept;

  mutable std::mutex mutex_;
  std::vector<std::atomic<File*>> slots_;
  std::size_t lowest_free_ = 0;
  std::size_t open_ = 0;
  std::vector<std::unique_ptr<File>> files_;                // all ever made
  std::vector<std::unique_ptr<std::vector<File*>>> pools_;  // by kind: those without references
};

template <typename F>
std::size_t DescriptorTable::kind_of() noexcept {
  static const std::size_t kind = next_kind();
  return kind;
}

template <typename F, typename... Args>
F* DescriptorTable::make(Args&&... args) noexcept {
  try {
    const std::lock_guard lock{mutex_};
    while (pools_.size() <= kind_of<F>()) pools_.push_back(std::make_unique<std::vector<File*>>());
    std::vector<File*>& pool = *pools_[kind_of<F>()];
    if (!pool.empty()) {
      F* file = static_cast<F*>(pool.back());
      pool.pop_back();
      return file;
    }
    files_.reserve(files_.size() + 1);
    pool.reserve(files_.size() + 1);
    auto file = std::make_unique<F>(static_cast<Args&&>(args)...);
    F* const made = file.get();
    made->pool_ = &pool;
    files_.push_back(std::move(file));
    return made;
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

}  // namespace iovane::backends::model
