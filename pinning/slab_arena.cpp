#include "pinning/slab_arena.hpp"

#include <sys/mman.h>

#include <new>

namespace iovane::pinning {

void* map_zeroed(std::size_t bytes, std::size_t alignment, bool huge) noexcept {
  const std::size_t total = bytes + (alignment > 4096 ? alignment : 0);
  void* memory = mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  auto* first = static_cast<std::byte*>(memory);
  std::byte* start = first;
  if (total != bytes) {
    const auto at = reinterpret_cast<std::uintptr_t>(first);
    start = first + (((at + alignment - 1) & ~(alignment - 1)) - at);
    if (start != first) munmap(first, static_cast<std::size_t>(start - first));
    const auto tail = static_cast<std::size_t>(first + total - (start + bytes));
    if (tail != 0) munmap(start + bytes, tail);
  }
  // Advice only: where it is refused, the memory is the same with more TLB misses.
  madvise(start, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  return start;
}

void unmap(void* memory, std::size_t bytes) noexcept { munmap(memory, bytes); }

SlabArena::~SlabArena() {
  while (chunk_ != nullptr) {
    ChunkHeader* previous = chunk_->previous;
    unmap(chunk_, chunk_->bytes);
    chunk_ = previous;
  }
}

void* SlabArena::take() noexcept {
  if (free_ != nullptr) {
    FreeObject* object = free_;
    free_ = object->next;
    object->next = nullptr;
    return object;
  }
  if (next_ == chunk_limit_) {
    const bool first = chunk_ == nullptr;
    const std::size_t bytes = first ? chunk_bytes_first : chunk_bytes;
    auto* memory = static_cast<std::byte*>(map_zeroed(bytes, first ? 4096 : chunk_bytes, !first));
    if (memory == nullptr) return nullptr;
    chunk_ = ::new (static_cast<void*>(memory)) ChunkHeader{chunk_, bytes};
    static_assert(sizeof(ChunkHeader) == header_bytes);
    next_ = memory + object_bytes_;  // the header takes one object's place
    chunk_limit_ = memory + bytes;
    mapped_bytes_ += bytes;
  }
  void* object = next_;
  next_ += object_bytes_;
  return object;
}

void SlabArena::put(void* object) noexcept { free_ = ::new (object) FreeObject{free_}; }

}  // namespace iovane::pinning
