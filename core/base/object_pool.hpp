// A pool: objects of one type, without names.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

#include "base/memory_source.hpp"
#include "base/stable_array.hpp"

namespace iovane::base {

/// Like Slab, for objects that only their owner refers to. One thread at a time; last in, first out.
template <typename T>
class ObjectPool {
  static_assert(std::is_trivially_destructible_v<T> && std::is_nothrow_default_constructible_v<T>);

 public:
  explicit ObjectPool(std::uint32_t entries_max, MemorySource& source = heap_memory()) noexcept
      : cells_{entries_max, source} {}
  ObjectPool(ObjectPool&& o) noexcept
      : cells_{std::move(o.cells_)}, used_{std::exchange(o.used_, 0)}, free_{std::exchange(o.free_, nullptr)} {}
  ObjectPool& operator=(ObjectPool&& o) noexcept {
    cells_ = std::move(o.cells_);
    used_ = std::exchange(o.used_, 0);
    free_ = std::exchange(o.free_, nullptr);
    return *this;
  }

  /// A value-initialised object; nullptr when entries_max are in use or there is no memory.
  T* acquire() noexcept {
    Cell* cell = free_;
    if (cell != nullptr) [[likely]] {
      free_ = cell->next_free;
    } else {
      if (used_ == cells_.capacity() && !cells_.grow()) return nullptr;
      cell = std::construct_at(cells_.at(used_++));
    }
    return std::construct_at(&cell->value);
  }

  void release(T* object) noexcept {
    auto* cell = reinterpret_cast<Cell*>(object);  // a union and its members share an address
    cell->next_free = free_;
    free_ = cell;
  }

 private:
  union Cell {
    Cell() noexcept {}  // NOLINT(modernize-use-equals-default): acquire() makes the member
    T value;
    Cell* next_free;
  };

  StableArray<Cell> cells_;
  std::uint32_t used_ = 0;
  Cell* free_ = nullptr;
};

}  // namespace iovane::base
