// Memory registered for sPAPR version 2 (VFIO_IOMMU_SPAPR_REGISTER_MEMORY), with counts.
//
// Only registered memory can be mapped. The kernel knows registrations per process: they must not overlap, except that
// two containers may register exactly the same range, which is then pinned and charged once; and each is undone with
// exactly its own address and size. Callers want neither rule. So this keeps disjoint pieces: what a caller names is
// covered by pieces that exist, and new ones for the gaps. A piece is undone when nobody holds it and no TCE leads into
// it. ProcessMemory knows the pieces of all spaces of one backend; SpaceMemory those that one container registered.
//
// Threads. A mutex per SpaceMemory and one per ProcessMemory around registering, which is control plane, and around
//   maps of memory that nobody registered. The hot path, maps of held memory and their unmaps, takes neither: it adds
//   to `tces` of a registration that a region holds.
// A registration's number stays its own while it is in use; its storage never moves.
//
// Memory that changes. A registration goes by address, and holds the pages that were there when it was made. Once the
// process has other pages there, nothing new may be mapped through it, and the kernel makes no second one beside it:
// until its last user is gone, the answer is busy. Who knows of a change says so by changed(); it is remembered
// without memory from malloc and without the mutex, because a thread inside malloc's munmap() may be waiting for it.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "backends/kernel.hpp"
#include "backends/spapr_tce/tce_book.hpp"
#include "iovane/result.hpp"

namespace iovane::backends::spapr {

/// A closed range of process addresses, on os_pages.
struct MemorySpan {
  std::uint64_t start = 0;
  std::uint64_t last = 0;
  std::uint64_t bytes() const noexcept { return last - start + 1; }
};

/// Ranges that changed since somebody looked. Any thread; no malloc.
class ChangeLog {
 public:
  void add(MemorySpan span) noexcept;
  /// Calls `visit` for each and forgets it.
  template <class Visit>
  void drain(Visit&& visit) {
    std::array<MemorySpan, spans_max> spans;
    std::size_t count = 0;
    {
      const std::lock_guard lock{mutex_};
      count = std::exchange(count_, 0);
      std::copy_n(spans_.begin(), count, spans.begin());
    }
    for (std::size_t i = 0; i < count; ++i) visit(spans[i]);
  }

 private:
  /// More than so many become one with what lies nearest: then memory in between counts as changed, too.
  static constexpr std::size_t spans_max = 64;
  std::mutex mutex_;
  std::array<MemorySpan, spans_max> spans_{};
  std::size_t count_ = 0;
};

/// The pieces that the containers of one process have registered. Any thread.
class ProcessMemory {
 public:
  /// Disjoint pieces that together cover `wanted`: those that exist, whole, and what is missing between them. Each is
  /// counted as used once more. Errors: busy (one of them leads to pages that are no longer there).
  Result<std::vector<MemorySpan>> take(MemorySpan wanted);
  /// One user less.
  void give_back(std::uint64_t start) noexcept;
  /// The pieces that overlap `span` are not given to anybody any more.
  void changed(MemorySpan span) noexcept { changes_.add(span); }

 private:
  struct Piece {
    std::uint64_t last = 0;
    std::uint32_t users = 0;
    bool stale = false;
  };
  void mark_changed();

  std::mutex mutex_;
  std::map<std::uint64_t, Piece> pieces_;
  ChangeLog changes_;
};

/// One range registered in one container.
struct Registration {
  MemorySpan span{};
  std::atomic<std::uint64_t> tces{0};   ///< TCEs that lead into it
  std::atomic<std::uint32_t> holds{0};  ///< regions, and maps under way
  bool used = false;                    ///< under the SpaceMemory's mutex
};

class SpaceMemory {
 public:
  /// `kernel` and `process` outlive it. `container` may change with the next attach: see drop_all().
  SpaceMemory(Kernel& kernel, int container, ProcessMemory& process) noexcept;

  /// Registers what of [address, address + length) is not, and holds all of it: the numbers, in order of address.
  /// Errors: bad_memory, memlock_exceeded (limit, use, need), busy (registered by somebody else in this process, or
  /// changed while it is in use).
  Result<std::vector<std::uint32_t>> hold(std::uint64_t address, std::uint64_t length);
  void release(const std::vector<std::uint32_t>& held) noexcept;
  /// See ProcessMemory. Without this one's mutex.
  void changed(MemorySpan span) noexcept { process_.changed(span); }

  Registration& at(std::uint32_t number) const noexcept {
    const auto chunk = static_cast<unsigned>(std::bit_width((number >> first_chunk_bits) + 1)) - 1;
    const std::uint32_t start = ((1U << chunk) - 1) << first_chunk_bits;
    return chunks_[chunk][number - start];
  }
  /// `count` TCEs lead into it no longer. The last one of memory that nobody holds unregisters it.
  void drop_tces(std::uint32_t number, std::uint64_t count) noexcept;
  /// Unregisters everything, whatever holds it. No TCE is live.
  void drop_all() noexcept;
  /// Registered bytes now.
  std::uint64_t bytes() const noexcept;

 private:
  Result<std::uint32_t> hold_piece(MemorySpan span);
  Result<std::uint32_t> fresh_number();
  void forget_if_idle(std::uint32_t number) noexcept;
  void unregister(Registration& registration) noexcept;

  Kernel& kernel_;
  int container_;
  ProcessMemory& process_;
  std::uint64_t os_page_;
  mutable std::mutex mutex_;
  std::map<std::uint64_t, std::uint32_t> by_start_;
  std::vector<std::uint32_t> free_;
  std::uint32_t count_ = 0;
  static constexpr unsigned first_chunk_bits = 4;  // 16 in the first chunk, each one twice as large as the one before
  std::array<std::unique_ptr<Registration[]>, 19> chunks_;
};

}  // namespace iovane::backends::spapr
