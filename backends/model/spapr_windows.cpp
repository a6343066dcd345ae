#include "backends/model/spapr_windows.hpp"

#include <sys/mman.h>

#include <bit>
#include <new>

#include "base/fault_point.hpp"

namespace iovane::backends::model {

std::unique_ptr<TceTable> TceTable::make(IovaRange range, unsigned page_shift, std::uint32_t levels) noexcept {
  if (base::fault_now(base::FaultKind::allocation)) return nullptr;
  const std::uint64_t bytes = ((range.span() >> page_shift) + 1) * sizeof(std::atomic<std::uint64_t>);
  void* const memory =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  // Zeroed memory is an array of atomics that are 0: lock-free ones have no other state.
  static_assert(std::atomic<std::uint64_t>::is_always_lock_free);
  auto* const entries = static_cast<std::atomic<std::uint64_t>*>(memory);
  return std::unique_ptr<TceTable>{new (std::nothrow) TceTable{range, page_shift, levels, entries}};
}

TceTable::TceTable(IovaRange range, unsigned page_shift, std::uint32_t levels,
                   std::atomic<std::uint64_t>* entries) noexcept
    : range_{range},
      page_shift_{page_shift},
      levels_{levels},
      count_{(range.span() >> page_shift) + 1},
      entries_{entries} {}

TceTable::~TceTable() { ::munmap(entries_, count_ * sizeof(std::atomic<std::uint64_t>)); }

Translation TceTable::walk(Iova address) const noexcept {
  const std::uint64_t offset = address.value - range_.start.value;
  const std::uint64_t index = offset >> page_shift_;
  const std::uint64_t entry = at(index);
  if (entry == 0) return {};
  const std::uint64_t inside = offset & (page() - 1);
  return {.memory = std::bit_cast<std::byte*>((entry & ~std::uint64_t{3}) + inside),
          .run_bytes = page() - inside,
          .leaf_bytes = page(),
          .access = static_cast<Access>(entry & 3U),
          .entry = &entries_[index],
          .entry_value = entry};
}

TceTable* TceWindows::find(std::uint64_t address) const noexcept {
  for (std::size_t slot = 0; slot < windows_max; ++slot)
    if (TceTable* const table = at(slot); table != nullptr && table->range().contains(Iova{address})) return table;
  return nullptr;
}

Translation TceWindows::walk(Iova address) const noexcept {
  if (frozen_.load(std::memory_order_relaxed)) return {};  // relaxed: see freeze()
  const TceTable* const table = find(address.value);
  return table == nullptr ? Translation{} : table->walk(address);
}

}  // namespace iovane::backends::model
