#include "backends/model/file.hpp"

#include <cerrno>

namespace iovane::backends::model {

void* File::mappable(std::uint64_t, std::size_t) noexcept { return nullptr; }

DescriptorTable::DescriptorTable(std::size_t descriptors_max) : slots_(descriptors_max) {}
DescriptorTable::~DescriptorTable() = default;

std::size_t DescriptorTable::next_kind() noexcept {
  static std::atomic<std::size_t> kinds{0};
  return kinds.fetch_add(1, std::memory_order_relaxed);  // relaxed: only the number counts
}

int DescriptorTable::install(File* file) noexcept {
  const std::lock_guard lock{mutex_};
  // relaxed: slots change under the mutex only.
  while (lowest_free_ < slots_.size() && slots_[lowest_free_].load(std::memory_order_relaxed) != nullptr)
    ++lowest_free_;
  if (lowest_free_ == slots_.size()) return -EMFILE;
  ++file->references_;
  ++open_;
  // R.file - pairs with A.file in find(): the file is complete.
  slots_[lowest_free_].store(file, std::memory_order_release);
  return first_descriptor + static_cast<int>(lowest_free_++);
}

File* DescriptorTable::find(int fd) const noexcept {
  const auto slot = static_cast<std::size_t>(fd - first_descriptor);
  if (fd < first_descriptor || slot >= slots_.size()) return nullptr;
  return slots_[slot].load(std::memory_order_acquire);  // A.file - pairs with R.file in install()
}

int DescriptorTable::duplicate(int fd) noexcept {
  File* file = find(fd);
  return file == nullptr ? -EBADF : install(file);
}

int DescriptorTable::close(int fd) noexcept {
  File* file = nullptr;
  {
    const std::lock_guard lock{mutex_};
    file = find(fd);
    if (file == nullptr) return -EBADF;
    const auto slot = static_cast<std::size_t>(fd - first_descriptor);
    slots_[slot].store(nullptr, std::memory_order_relaxed);  // relaxed: nothing is published
    if (slot < lowest_free_) lowest_free_ = slot;
    --open_;
  }
  drop_reference(file);
  return 0;
}

void DescriptorTable::add_reference(File* file) noexcept {
  const std::lock_guard lock{mutex_};
  ++file->references_;
}

void DescriptorTable::drop_reference(File* file) noexcept {
  {
    const std::lock_guard lock{mutex_};
    if (--file->references_ > 0) return;
  }
  file->release();
  discard(file);
}

void DescriptorTable::discard(File* file) noexcept {
  const std::lock_guard lock{mutex_};
  file->pool_->push_back(file);  // has room for every file ever made
}

std::size_t DescriptorTable::open_count() const noexcept {
  const std::lock_guard lock{mutex_};
  return open_;
}

}  // namespace iovane::backends::model
