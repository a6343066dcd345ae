// What is in a window's TCEs, as far as we put it there: one word per TCE.
//
// The kernel replaces a live TCE without a word, reports the requested size of an unmap whatever was mapped, and does
// not look whether a map stays inside its window. So the contract (an overlap is refused, an unmap says what it
// removed) rests on this book. It also knows the registration that each TCE's memory belongs to, so that memory is
// unregistered only after its last TCE is gone, and the memory itself, so that a replace that failed half way can be
// taken back.
//
// A word: bits 0 and 1 access, 2 to 23 registration, 24 to 63 process address / 4096 (user addresses of POWER have up
// to 52 bits). 0: free. Words live in memory that costs only what is touched; a flag per 512 of them, set for good by
// the first map there, keeps scans of a large window away from what never was.
// Threads: several, for disjoint ranges: TCEs of different ranges are different words.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>

#include "backends/spapr_tce/spapr_control.hpp"
#include "iovane/result.hpp"
#include "iovane/types.hpp"

namespace iovane::backends::spapr {

inline constexpr std::uint32_t registrations_max = 1U << 22;

struct TceWord {
  std::uint64_t bits = 0;

  static TceWord of(std::uint64_t address, std::uint32_t registration, Access access) noexcept {
    return {address >> 12 << 24 | std::uint64_t{registration} << 2 | static_cast<std::uint64_t>(access)};
  }
  /// Of the page of 2^`page_shift` bytes behind this one.
  TceWord next(unsigned page_shift) const noexcept { return {bits + (std::uint64_t{1} << (page_shift + 12))}; }
  bool live() const noexcept { return bits != 0; }
  Access access() const noexcept { return static_cast<Access>(bits & 3U); }
  std::uint32_t registration() const noexcept {
    return static_cast<std::uint32_t>(bits >> 2) & (registrations_max - 1);
  }
  std::uint64_t address() const noexcept { return bits >> 24 << 12; }
};

/// TCEs [first, last] of a window.
struct TceRun {
  std::uint64_t first = 0;
  std::uint64_t last = 0;
  std::uint64_t count() const noexcept { return last - first + 1; }
};

/// The book of one window.
class TceBook {
 public:
  /// Errors: out_of_memory (address space).
  static Result<TceBook> make(const SpaprWindow& window);
  TceBook(TceBook&& o) noexcept;
  TceBook& operator=(TceBook&& o) noexcept;
  ~TceBook();

  const SpaprWindow& window() const noexcept { return window_; }
  /// What the kernel turned out to charge for it.
  void set_charge(Bytes table) noexcept { window_.table = table; }
  std::uint64_t page() const noexcept { return window_.page.value; }
  /// The TCEs that `range` touches. It lies inside the window.
  TceRun run_of(IovaRange range) const noexcept {
    const std::uint64_t start = window_.range.start.value;
    return {(range.start.value - start) >> page_shift_, (range.last.value - start) >> page_shift_};
  }
  IovaRange range_of(TceRun run) const noexcept {
    const std::uint64_t start = window_.range.start.value;
    return {Iova{start + (run.first << page_shift_)}, Iova{start + (run.last << page_shift_) + (page() - 1)}};
  }

  TceWord at(std::uint64_t index) const noexcept { return words_[index]; }
  /// Memory from `address` on, page by page.
  void fill(TceRun run, std::uint64_t address, std::uint32_t registration, Access access) noexcept;

  /// Nothing is there.
  bool is_free(TceRun run) const noexcept {
    if (run.count() > chunk_tces) return !first_live(run);
    std::uint64_t any = 0;
    for (std::uint64_t i = run.first; i <= run.last; ++i) any |= words_[i].bits;
    return any == 0;
  }
  /// All of it is there, of one registration and with one access: which one; otherwise nothing.
  std::optional<std::uint32_t> sole_registration(TceRun run) const noexcept {
    const TceWord first = words_[run.first];
    std::uint64_t differ = 0;
    for (std::uint64_t i = run.first + 1; i <= run.last; ++i) differ |= words_[i].bits ^ first.bits;
    if (!first.live() || (differ & access_and_registration) != 0) return std::nullopt;
    return first.registration();
  }
  /// The last TCE up to `last` to which all from `index` on, which is there, have its registration and access.
  std::uint64_t last_like(std::uint64_t index, std::uint64_t last) const noexcept {
    const std::uint64_t bits = words_[index].bits;
    while (index < last && ((words_[index + 1].bits ^ bits) & access_and_registration) == 0) ++index;
    return index;
  }
  void clear(TceRun run) noexcept { std::fill_n(words_ + run.first, run.count(), TceWord{}); }

  std::optional<std::uint64_t> first_live(TceRun run) const noexcept;
  bool all_live(TceRun run) const noexcept;
  /// All of them, counted: control plane.
  std::uint64_t live_count() const noexcept;
  /// What to unmap in one call: from the first live TCE of `run` to a live one, with holes of at most `hole_max` TCEs.
  std::optional<TceRun> next_stretch(TceRun run, std::uint64_t hole_max) const noexcept;

 private:
  static constexpr std::uint64_t access_and_registration = (std::uint64_t{1} << 24) - 1;
  static constexpr unsigned chunk_shift = 9;
  static constexpr std::uint64_t chunk_tces = std::uint64_t{1} << chunk_shift;
  TceBook(const SpaprWindow& window, TceWord* words, std::uint64_t count,
          std::unique_ptr<std::atomic<bool>[]> touched) noexcept;

  SpaprWindow window_;
  unsigned page_shift_ = 12;
  TceWord* words_ = nullptr;
  std::uint64_t count_ = 0;
  std::unique_ptr<std::atomic<bool>[]> touched_;
};

}  // namespace iovane::backends::spapr
