// A slab: type-stable objects with names that survive them.
//
// Purpose: objects that come and go at full speed and are referred to by handles which callers may keep too long, or
//   make up. A handle is `generation << 32 | number + 1`; zero is none.
// Roles: one thread at a time. No locks, no atomics.
// State: a cell's generation is odd while it is live and even while it is free, and grows by one at each change. A
//   handle carries an odd generation, so neither a stale nor an invented handle ever names a free cell.
// Wrap: the generation of a cell repeats after 2^31 lives of that cell; a handle kept for exactly so many would be
//   accepted again.
// Reclamation: free cells are reused last in, first out, because the last one is warm; storage goes back with the slab.
// Failure: acquire() needs at most one chunk and changes nothing without it.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "base/memory_source.hpp"
#include "base/stable_array.hpp"

namespace iovane::base {

template <typename T>
class Slab {
  static_assert(std::is_trivially_destructible_v<T>, "cells are reused without destroying what was in them");

  struct Cell {
    Cell() noexcept {}  // NOLINT(modernize-use-equals-default): the union's member is made by acquire()
    union {
      T value;
      Cell* next_free;
    };
    std::uint32_t generation = 0;
    std::uint32_t number = 0;
  };

 public:
  /// What one object takes.
  static constexpr std::size_t cell_bytes = sizeof(Cell);

  explicit Slab(std::uint32_t entries_max, MemorySource& source = heap_memory()) noexcept
      : cells_{entries_max, source} {}
  Slab(Slab&& o) noexcept
      : cells_{std::move(o.cells_)}, used_{std::exchange(o.used_, 0)}, free_{std::exchange(o.free_, nullptr)} {}
  Slab& operator=(Slab&& o) noexcept {
    cells_ = std::move(o.cells_);
    used_ = std::exchange(o.used_, 0);
    free_ = std::exchange(o.free_, nullptr);
    return *this;
  }

  /// A live object T{arguments...}; nullptr when entries_max are live or there is no memory. Stays where it is until
  /// released.
  template <typename... Arguments>
  T* acquire(Arguments&&... arguments) noexcept {
    Cell* cell = free_;
    if (cell != nullptr) [[likely]] {
      free_ = cell->next_free;
    } else {
      if (used_ == cells_.capacity() && !cells_.grow()) return nullptr;
      cell = std::construct_at(cells_.at(used_));
      cell->number = used_++;
    }
    ++cell->generation;
    return ::new (&cell->value) T{std::forward<Arguments>(arguments)...};
  }

  /// Precondition: `object` came from acquire() and is live. Its handles are stale from now on.
  void release(T* object) noexcept {
    Cell* cell = cell_of(object);
    ++cell->generation;
    cell->next_free = free_;
    free_ = cell;
  }

  /// Makes the object's handles stale without releasing it; handle_of() has its new one.
  void renew(T* object) noexcept { cell_of(object)->generation += 2; }

  std::uint64_t handle_of(const T* object) const noexcept {
    const Cell* cell = cell_of(object);
    return (std::uint64_t{cell->generation} << 32) | (cell->number + 1);
  }

  /// The object that a handle names; nullptr when it is gone or never was.
  T* find(std::uint64_t handle) const noexcept {
    const auto number = static_cast<std::uint32_t>(handle) - 1;  // none wraps to a number that is never used
    const auto generation = static_cast<std::uint32_t>(handle >> 32);
    if (number >= used_ || (generation & 1) == 0) return nullptr;
    Cell* cell = cells_.at(number);
    return cell->generation == generation ? &cell->value : nullptr;
  }

  std::uint32_t entries_max() const noexcept { return cells_.entries_max(); }

 private:
  static_assert(std::is_standard_layout_v<T>, "cell_of() relies on a cell and its object sharing an address");

  static Cell* cell_of(T* object) noexcept { return reinterpret_cast<Cell*>(object); }
  static const Cell* cell_of(const T* object) noexcept { return reinterpret_cast<const Cell*>(object); }

  StableArray<Cell> cells_;
  std::uint32_t used_ = 0;  // cells that were ever live
  Cell* free_ = nullptr;
};

}  // namespace iovane::base
