// The IOVA allocator and what it is compared with, behind one shape: allocate(length) -> start, free(start, length).
//
// Starts and lengths are bytes, lengths multiples of 4 KiB; 0 means that there was no room. enter(thread) is called
// once by each thread before it does anything else. Those that are no peers of IOVA allocators, but of ours: general
// allocators as sources of offsets. There one granule stands for 16 bytes, the smallest block that they align as asked,
// so that they are measured where they are best and need little memory of which nothing is used.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <vector>

#include <jemalloc/jemalloc.h>
#include <oneapi/tbb/scalable_allocator.h>

#if defined(IOVANE_HAVE_MIMALLOC)
#include <mimalloc.h>
#endif
#if defined(IOVANE_HAVE_LINUX_IOVA)
#include "peers/linux_iova/domain.h"
#endif

#include "iova/interval_allocator.hpp"

namespace iovane::bench {

inline constexpr std::uint64_t granule = 4096;
/// A 57-bit host with the interrupt window of x86 in it.
inline constexpr std::uint64_t space_last = (std::uint64_t{1} << 57) - 1;
inline constexpr std::array<IovaRange, 2> space_windows{IovaRange{Iova{0x100000}, Iova{0xfedfffff}},
                                                        IovaRange{Iova{0xfef00000}, Iova{space_last}}};

template <bool magazines>
class IovanePeer {
 public:
  static constexpr const char* name = magazines ? "iovane" : "iovane_shared";
  static constexpr std::uint64_t bytes_max = ~std::uint64_t{0};
  IovanePeer() {
    auto made = iova::IntervalAllocator::create({.windows = space_windows, .magazines = magazines});
    if (!made) std::abort();
    allocator_ = std::move(*made);
  }
  void enter(unsigned /*thread*/) {}
  [[gnu::always_inline]] std::uint64_t allocate(std::uint64_t length) {
    const auto got = allocator_->allocate(Bytes{length});
    return got ? got->start.value : 0;
  }
  [[gnu::always_inline]] void free(std::uint64_t start, std::uint64_t length) {
    if (!allocator_->free({Iova{start}, Iova{start + (length - 1)}})) std::abort();
  }
  bool claim(std::uint64_t start, std::uint64_t length) {
    return allocator_->claim({Iova{start}, Iova{start + (length - 1)}}).has_value();
  }
  std::uint64_t find(std::uint64_t address) {
    const auto found = allocator_->find(Iova{address});
    return found ? found->start.value : 0;
  }
  iova::IntervalAllocator& allocator() { return *allocator_; }

 private:
  std::unique_ptr<iova::IntervalAllocator> allocator_;
};

/// The floor: each thread pops from and pushes to an array of its own for each length. Knows nothing, checks nothing.
class ArrayPeer {
 public:
  static constexpr const char* name = "floor_array";
  static constexpr std::uint64_t bytes_max = ~std::uint64_t{0};
  void enter(unsigned thread) { mine_ = &of_thread_[thread % of_thread_.size()]; }
  std::uint64_t allocate(std::uint64_t length) {
    Stack& stack = mine_->stacks[index_of(length)];
    if (stack.count != 0) [[likely]]
      return stack.starts[--stack.count];
    return next_.fetch_add(length, std::memory_order_relaxed);  // relaxed: a number of its own is all that is needed
  }
  void free(std::uint64_t start, std::uint64_t length) {
    Stack& stack = mine_->stacks[index_of(length)];
    if (stack.count == stack.starts.size()) [[unlikely]]
      stack.starts.resize(2 * stack.starts.size());
    stack.starts[stack.count++] = start;
  }

 private:
  struct Stack {
    std::vector<std::uint64_t> starts = std::vector<std::uint64_t>(64);
    std::size_t count = 0;
  };
  struct PerThread {
    std::array<Stack, 600> stacks;
  };
  static std::size_t index_of(std::uint64_t length) {
    const std::uint64_t units = length / granule;
    return units <= 512 ? units : 512 + static_cast<std::size_t>(std::countr_zero(units));
  }
  std::vector<PerThread> of_thread_ = std::vector<PerThread>(8);
  std::atomic<std::uint64_t> next_{granule};
  inline static thread_local PerThread* mine_ = nullptr;
};

/// What is usually written first: ordered maps of what is free, best fit, one mutex.
class LockedMapPeer {
 public:
  static constexpr const char* name = "mutex_map";
  static constexpr std::uint64_t bytes_max = ~std::uint64_t{0};
  LockedMapPeer() {
    for (const IovaRange& window : space_windows) add(window.start.value, window.span() + 1);
  }
  void enter(unsigned /*thread*/) {}
  std::uint64_t allocate(std::uint64_t length) {
    const std::lock_guard held{lock_};
    const auto best = by_length_.lower_bound({length, 0});
    if (best == by_length_.end()) return 0;
    const auto [room, start] = *best;
    by_length_.erase(best);
    by_start_.erase(start);
    if (room != length) add(start + length, room - length);
    live_.emplace(start, length);
    return start;
  }
  void free(std::uint64_t start, std::uint64_t length) {
    const std::lock_guard held{lock_};
    const auto live = live_.find(start);
    if (live == live_.end() || live->second != length) std::abort();
    live_.erase(live);
    auto next = by_start_.lower_bound(start);
    if (next != by_start_.end() && next->first == start + length) {
      length += next->second;
      by_length_.erase({next->second, next->first});
      next = by_start_.erase(next);
    }
    if (next != by_start_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == start) {
        start = before->first;
        length += before->second;
        by_length_.erase({before->second, before->first});
        by_start_.erase(before);
      }
    }
    add(start, length);
  }
  std::uint64_t find(std::uint64_t address) {
    const std::lock_guard held{lock_};
    auto live = live_.upper_bound(address);
    if (live == live_.begin()) return 0;
    --live;
    return address - live->first < live->second ? live->first : 0;
  }
  bool claim(std::uint64_t start, std::uint64_t length) {
    const std::lock_guard held{lock_};
    auto room = by_start_.upper_bound(start);
    if (room == by_start_.begin()) return false;
    --room;
    const auto [first, size] = *room;
    if (start - first >= size || size - (start - first) < length) return false;
    by_length_.erase({size, first});
    by_start_.erase(room);
    if (start != first) add(first, start - first);
    if (first + size != start + length) add(start + length, first + size - start - length);
    live_.emplace(start, length);
    return true;
  }

 private:
  void add(std::uint64_t start, std::uint64_t length) {
    by_start_.emplace(start, length);
    by_length_.emplace(length, start);
  }
  std::mutex lock_;
  std::map<std::uint64_t, std::uint64_t> by_start_;
  std::set<std::pair<std::uint64_t, std::uint64_t>> by_length_;
  std::map<std::uint64_t, std::uint64_t> live_;
};

#if defined(IOVANE_HAVE_LINUX_IOVA)
/// Linux, compiled as it is.
class LinuxPeer {
 public:
  static constexpr const char* name = "linux";
  static constexpr std::uint64_t bytes_max = ~std::uint64_t{0};
  LinuxPeer() : domain_{linux_iova_create(space_windows[0].start.value / granule)} {
    if (domain_ == nullptr) std::abort();
    linux_iova_reserve(domain_, 0xfee00, 0xfeeff);
  }
  ~LinuxPeer() { linux_iova_destroy(domain_); }
  LinuxPeer(const LinuxPeer&) = delete;
  LinuxPeer& operator=(const LinuxPeer&) = delete;
  void enter(unsigned thread) { linux_iova_enter(thread); }
  std::uint64_t allocate(std::uint64_t length) {
    return linux_iova_allocate(domain_, length / granule, space_last / granule) * granule;
  }
  void free(std::uint64_t start, std::uint64_t length) { linux_iova_free(domain_, start / granule, length / granule); }
  std::uint64_t find(std::uint64_t address) { return linux_iova_find(domain_, address / granule) * granule; }

 private:
  iova_domain* domain_;
};
#endif

// General allocators: see above. 1 GiB is 4 MiB to them.
struct JemallocCalls {
  static constexpr const char* name = "jemalloc";
  static void* take(std::size_t n) { return ::mallocx(n, 0); }
  static void give(void* p, std::size_t n) { ::sdallocx(p, n, 0); }
};
struct TbbCalls {
  static constexpr const char* name = "tbbmalloc";
  static void* take(std::size_t n) { return ::scalable_malloc(n); }
  static void give(void* p, std::size_t /*n*/) { ::scalable_free(p); }
};
#if defined(IOVANE_HAVE_MIMALLOC)
struct MimallocCalls {
  static constexpr const char* name = "mimalloc";
  static void* take(std::size_t n) { return ::mi_malloc(n); }
  static void give(void* p, std::size_t n) { ::mi_free_size(p, n); }
};
#endif

template <typename Calls>
class OffsetPeer {
 public:
  static constexpr const char* name = Calls::name;
  static constexpr std::uint64_t scale = granule / 16;
  /// Live at most, so that a benchmark fits the machine.
  static constexpr std::uint64_t bytes_max = std::uint64_t{1} << 42;
  void enter(unsigned /*thread*/) {}
  std::uint64_t allocate(std::uint64_t length) {
    return std::bit_cast<std::uintptr_t>(Calls::take(length / scale)) * scale;
  }
  void free(std::uint64_t start, std::uint64_t length) {
    Calls::give(std::bit_cast<void*>(static_cast<std::uintptr_t>(start / scale)), length / scale);
  }
};

/// Calls add.operator()<Peer>() for the floor, for us and for each peer, in the order in which tables show them.
template <typename Add>
void for_each_peer(const Add& add) {
  add.template operator()<ArrayPeer>();
  add.template operator()<IovanePeer<true>>();
#if defined(IOVANE_HAVE_LINUX_IOVA)
  add.template operator()<LinuxPeer>();
#endif
  add.template operator()<LockedMapPeer>();
  add.template operator()<OffsetPeer<JemallocCalls>>();
  add.template operator()<OffsetPeer<TbbCalls>>();
#if defined(IOVANE_HAVE_MIMALLOC)
  add.template operator()<OffsetPeer<MimallocCalls>>();
#endif
}

}  // namespace iovane::bench
