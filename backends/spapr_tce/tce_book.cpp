#include "backends/spapr_tce/tce_book.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <new>
#include <utility>

#include "base/error_text.hpp"

namespace iovane::backends::spapr {

Result<TceBook> TceBook::make(const SpaprWindow& window) {
  const std::uint64_t count = (window.range.span() >> std::countr_zero(window.page.value)) + 1;
  std::unique_ptr<std::atomic<bool>[]> touched { new (std::nothrow) std::atomic<bool>[(count >> chunk_shift) + 1] {} };
  void* const memory = ::mmap(nullptr, count * sizeof(TceWord), PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory != MAP_FAILED && touched) return TceBook{window, static_cast<TceWord*>(memory), count, std::move(touched)};
  if (memory != MAP_FAILED) ::munmap(memory, count * sizeof(TceWord));
  return base::fail(Errc::out_of_memory, Stage::reserve, 0,
                    "no address space for the book of a window with {} entries; create a smaller one, or one with "
                    "larger pages",
                    count);
}

TceBook::TceBook(const SpaprWindow& window, TceWord* words, std::uint64_t count,
                 std::unique_ptr<std::atomic<bool>[]> touched) noexcept
    : window_{window},
      page_shift_{static_cast<unsigned>(std::countr_zero(window.page.value))},
      words_{words},
      count_{count},
      touched_{std::move(touched)} {}

TceBook::TceBook(TceBook&& o) noexcept
    : window_{o.window_},
      page_shift_{o.page_shift_},
      words_{std::exchange(o.words_, nullptr)},
      count_{std::exchange(o.count_, 0)},
      touched_{std::move(o.touched_)} {}

TceBook& TceBook::operator=(TceBook&& o) noexcept {
  std::swap(window_, o.window_);
  std::swap(page_shift_, o.page_shift_);
  std::swap(words_, o.words_);
  std::swap(count_, o.count_);
  std::swap(touched_, o.touched_);
  return *this;
}

TceBook::~TceBook() {
  if (words_ != nullptr) ::munmap(words_, count_ * sizeof(TceWord));
}

void TceBook::fill(TceRun run, std::uint64_t address, std::uint32_t registration, Access access) noexcept {
  for (std::uint64_t chunk = run.first >> chunk_shift; chunk <= run.last >> chunk_shift; ++chunk)
    // relaxed: says only where to look; whoever looks for these TCEs is ordered behind their map.
    touched_[chunk].store(true, std::memory_order_relaxed);
  TceWord word = TceWord::of(address, registration, access);
  for (std::uint64_t i = run.first; i <= run.last; ++i, word = word.next(page_shift_)) words_[i] = word;
}

std::optional<std::uint64_t> TceBook::first_live(TceRun run) const noexcept {
  for (std::uint64_t i = run.first; i <= run.last;) {
    const std::uint64_t chunk = i >> chunk_shift;
    const std::uint64_t stop = std::min(run.last, ((chunk + 1) << chunk_shift) - 1);
    // relaxed: see fill().
    if (touched_[chunk].load(std::memory_order_relaxed)) {
      for (; i <= stop; ++i)
        if (words_[i].live()) return i;
    }
    i = stop + 1;
  }
  return std::nullopt;
}

bool TceBook::all_live(TceRun run) const noexcept {
  for (std::uint64_t i = run.first; i <= run.last; ++i)
    if (!words_[i].live()) return false;
  return true;
}

std::uint64_t TceBook::live_count() const noexcept {
  std::uint64_t count = 0;
  TceRun rest{0, count_ - 1};
  while (const auto at = first_live(rest)) {
    ++count;
    if (*at == rest.last) break;
    rest.first = *at + 1;
  }
  return count;
}

std::optional<TceRun> TceBook::next_stretch(TceRun run, std::uint64_t hole_max) const noexcept {
  const auto first = first_live(run);
  if (!first) return std::nullopt;
  TceRun stretch{*first, *first};
  for (std::uint64_t i = *first;;) {
    while (i < run.last && words_[i + 1].live()) ++i;
    stretch.last = i;
    const std::uint64_t stop = std::min(run.last - i, hole_max + 1);
    std::uint64_t hole = 1;
    while (hole <= stop && !words_[i + hole].live()) ++hole;
    if (hole > stop) return stretch;
    i += hole;
  }
}

}  // namespace iovane::backends::spapr
