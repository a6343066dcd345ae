// Where metadata comes from, in large pieces.
#pragma once

#include <cstddef>

namespace iovane::base {

/// Hands out and takes back blocks of memory, each at least a page. Structures that grow keep one and call it rarely.
/// Implementations say which threads may call them; a source outlives everything that was taken from it.
class MemorySource {
 public:
  MemorySource() = default;
  MemorySource(const MemorySource&) = delete;
  MemorySource& operator=(const MemorySource&) = delete;
  virtual ~MemorySource() = default;

  /// `bytes` of memory aligned to `alignment` (a power of two), contents undefined; nullptr when there is none.
  virtual void* allocate(std::size_t bytes, std::size_t alignment) noexcept = 0;
  /// Takes back what allocate() gave for the same `bytes` and `alignment`.
  virtual void release(void* memory, std::size_t bytes, std::size_t alignment) noexcept = 0;
};

/// The process's ordinary heap. Any thread; lives for ever.
MemorySource& heap_memory() noexcept;

}  // namespace iovane::base
