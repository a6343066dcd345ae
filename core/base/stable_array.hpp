// An array that grows without moving its elements.
//
// Chunk k holds `first << k` elements, so that 32 pointers inside the object reach every index, an index finds its
// chunk with one bit scan, and at most half of what was taken is unused. Unused tails of large chunks are never
// touched, so the operating system does not back them. Memory is given back by the destructor only.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "base/memory_source.hpp"

namespace iovane::base {

/// Raw storage for at most `entries_max` objects of T. One thread at a time. Does not construct or destroy.
template <typename T>
class StableArray {
 public:
  StableArray(std::uint32_t entries_max, MemorySource& source) noexcept : source_{&source}, entries_max_{entries_max} {}
  StableArray(StableArray&& o) noexcept
      : source_{o.source_},
        entries_max_{std::exchange(o.entries_max_, 0)},
        capacity_{std::exchange(o.capacity_, 0)},
        chunks_{std::exchange(o.chunks_, {})} {}
  StableArray& operator=(StableArray&& o) noexcept {
    if (this != &o) {
      release_all();
      source_ = o.source_;
      entries_max_ = std::exchange(o.entries_max_, 0);
      capacity_ = std::exchange(o.capacity_, 0);
      chunks_ = std::exchange(o.chunks_, {});
    }
    return *this;
  }
  ~StableArray() { release_all(); }

  std::uint32_t entries_max() const noexcept { return entries_max_; }
  /// Elements there is storage for.
  std::uint32_t capacity() const noexcept { return capacity_; }

  /// Adds a chunk. False when entries_max is reached or the source has no memory; nothing has changed then.
  bool grow() noexcept {
    if (capacity_ == entries_max_) return false;
    const unsigned chunk = chunk_of(capacity_);
    const std::uint32_t entries = entries_in(chunk);
    void* memory = source_->allocate(std::size_t{entries} * sizeof(T), alignment);
    if (memory == nullptr) return false;
    chunks_[chunk] = static_cast<T*>(memory);
    capacity_ += entries;
    return true;
  }

  /// Precondition: index < capacity().
  T* at(std::uint32_t index) const noexcept {
    const unsigned chunk = chunk_of(index);
    return chunks_[chunk] + (index - start_of(chunk));
  }

 private:
  static constexpr std::size_t alignment = alignof(T) < 64 ? 64 : alignof(T);
  // The first chunk fills a page.
  static constexpr std::uint32_t first =
      static_cast<std::uint32_t>(std::bit_floor(sizeof(T) < 4096 ? std::size_t{4096} / sizeof(T) : std::size_t{1}));
  static constexpr unsigned first_bits = static_cast<unsigned>(std::countr_zero(first));

  static unsigned chunk_of(std::uint32_t index) noexcept {
    return static_cast<unsigned>(std::bit_width((index >> first_bits) + 1)) - 1;
  }
  static std::uint32_t start_of(unsigned chunk) noexcept { return (first << chunk) - first; }
  std::uint32_t entries_in(unsigned chunk) const noexcept {
    const std::uint32_t left = entries_max_ - start_of(chunk);
    const std::uint64_t full = std::uint64_t{first} << chunk;
    return full < left ? static_cast<std::uint32_t>(full) : left;
  }
  void release_all() noexcept {
    for (unsigned chunk = 0; chunk < chunks_.size(); ++chunk) {
      if (chunks_[chunk] == nullptr) continue;
      source_->release(chunks_[chunk], std::size_t{entries_in(chunk)} * sizeof(T), alignment);
      chunks_[chunk] = nullptr;
    }
  }

  MemorySource* source_;
  std::uint32_t entries_max_;
  std::uint32_t capacity_ = 0;
  std::array<T*, 32> chunks_{};
};

}  // namespace iovane::base
