#include "backends/stage1/table_pool.hpp"

#include <sys/mman.h>

#include <cerrno>

#include "base/error_text.hpp"
#include "base/fault_point.hpp"
#include "base/yield_point.hpp"

namespace iovane::backends::stage1 {
namespace {

constexpr std::uint64_t index_mask = 0xffff'ffff;
constexpr std::uint64_t next_tag(std::uint64_t word) noexcept { return (word & ~index_mask) + (index_mask + 1); }

}  // namespace

TablePool::~TablePool() { close(); }

void TablePool::close() noexcept {
  if (base_ != nullptr) ::munmap(base_, std::uint64_t{pages_max_} * page_bytes);
  if (states_ != nullptr) ::munmap(states_, pages_max_ * sizeof(PageState));
  base_ = nullptr;
  states_ = nullptr;
}

Result<void> TablePool::open(TableMemory& memory, std::uint64_t address, std::uint32_t pages_max) {
  close();  // of an attempt that failed
  memory_ = &memory;
  address_ = address;
  pages_max_ = pages_max;
  // Untouched parts cost address space only.
  const auto reserve = [](std::size_t bytes, int protection) {
    void* const at = ::mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? nullptr : at;
  };
  base_ = static_cast<std::byte*>(reserve(std::uint64_t{pages_max} * page_bytes, PROT_NONE));
  states_ = static_cast<PageState*>(reserve(pages_max * sizeof(PageState), PROT_READ | PROT_WRITE));
  if (base_ == nullptr || states_ == nullptr)
    return base::fail(Errc::out_of_memory, Stage::open, ENOMEM, "no address space for {} first-stage tables",
                      pages_max);
  if (!grow())
    return base::fail(last_errno() == ENOMEM ? Errc::out_of_memory : Errc::io_error, Stage::open, last_errno(),
                      "the first {} pages for first-stage tables cannot be pinned; look at RLIMIT_MEMLOCK",
                      chunk_pages);
  return {};
}

bool TablePool::grow() noexcept {
  // relaxed: claims a chunk, publishes nothing; push() does.
  std::uint32_t first = claimed_pages_.load(std::memory_order_relaxed);
  do {
    if (pages_max_ - first < chunk_pages) {
      last_errno_.store(ENOSPC, std::memory_order_relaxed);  // relaxed: for error texts
      return false;
    }
  } while (!claimed_pages_.compare_exchange_weak(first, first + chunk_pages, std::memory_order_relaxed));
  std::byte* const at = base_ + std::uint64_t{first} * page_bytes;
  constexpr std::uint64_t bytes = std::uint64_t{chunk_pages} * page_bytes;
  int why = base::fault_now(base::FaultKind::allocation) ? ENOMEM : 0;
  if (why == 0 && ::mprotect(at, bytes, PROT_READ | PROT_WRITE) != 0) why = ENOMEM;
  if (why == 0) why = memory_->pin(address_ + std::uint64_t{first} * page_bytes, at, bytes);
  if (why != 0) {
    last_errno_.store(why, std::memory_order_relaxed);  // relaxed: for error texts
    // The chunk can be tried again if nobody claimed one after it; otherwise its addresses are lost to the pool.
    std::uint32_t mine = first + chunk_pages;
    claimed_pages_.compare_exchange_strong(mine, first, std::memory_order_relaxed);  // relaxed: as the claim
    return false;
  }
  pinned_pages_.fetch_add(chunk_pages, std::memory_order_relaxed);  // relaxed: a number for people
  // relaxed: nobody has these pages yet; push() publishes.
  for (std::uint32_t page = first; page < first + chunk_pages; ++page) {
    states_[page].users.store(1, std::memory_order_relaxed);
    states_[page].next_free.store(page + 2, std::memory_order_relaxed);
  }
  push(first, first + chunk_pages - 1);
  return true;
}

// The pages first ... last are linked already.
void TablePool::push(std::uint32_t first, std::uint32_t last) noexcept {
  std::uint64_t word = free_.load(std::memory_order_relaxed);  // relaxed: the exchange checks it
  do {
    // relaxed: published by the exchange.
    states_[last].next_free.store(static_cast<std::uint32_t>(word & index_mask), std::memory_order_relaxed);
    base::yield_point("table_pool.push");
    // R.free - pairs with A.free in take_free(): links and contents of the pages.
  } while (!free_.compare_exchange_weak(word, next_tag(word) | (first + 1), std::memory_order_release,
                                        std::memory_order_relaxed));
}

Table* TablePool::take_free() noexcept {
  // A.free - pairs with R.free in push().
  std::uint64_t word = free_.load(std::memory_order_acquire);
  while (true) {
    const auto index = static_cast<std::uint32_t>(word & index_mask);
    if (index == 0) return nullptr;
    // relaxed: may be stale when the page is taken meanwhile; then the tag has changed and the exchange fails.
    const std::uint64_t next = states_[index - 1].next_free.load(std::memory_order_relaxed);
    base::yield_point("table_pool.take");
    // A.free - as above, also when another thread's push came in between.
    if (free_.compare_exchange_weak(word, next_tag(word) | next, std::memory_order_acquire,
                                    std::memory_order_acquire)) {
      taken_.fetch_add(1, std::memory_order_relaxed);  // relaxed: a hint
      return reinterpret_cast<Table*>(base_) + (index - 1);
    }
  }
}

Table* TablePool::take() noexcept {
  while (true) {
    if (Table* const table = take_free(); table != nullptr) return table;
    if (!grow()) return take_free();  // somebody may have given one back
  }
}

void TablePool::give(Table* table) noexcept {
  const auto index = static_cast<std::uint32_t>(table - reinterpret_cast<Table*>(base_));
  taken_.fetch_sub(1, std::memory_order_relaxed);                     // relaxed: a hint
  states_[index].generation.fetch_add(1, std::memory_order_relaxed);  // relaxed: push() publishes
  push(index, index);
}

}  // namespace iovane::backends::stage1
