#include "engine/memory_table.hpp"

#include <new>

#include "base/error_text.hpp"
#include "base/fault_point.hpp"

namespace iovane::engine {

Result<MemoryId> MemoryTable::add(backends::RegionId region, Bytes length) noexcept {
  std::uint32_t index = 0;
  if (!free_.empty()) {
    index = free_.back();
    free_.pop_back();
  } else {
    if (entries_.size() >= entries_max_)
      return base::fail(Errc::limit_reached, Stage::pin, 0,
                        "this address space has {} registered memories, its limit; unregister some or raise "
                        "AddressSpaceConfig::memories_max",
                        entries_max_);
    try {
      if (base::fault_now(base::FaultKind::allocation)) throw std::bad_alloc{};
      free_.reserve(entries_.size() == entries_.capacity() ? 2 * entries_.size() + 1 : entries_.size() + 1);
      entries_.emplace_back();  // after the reserve, so that forget() can never fail
    } catch (const std::bad_alloc&) {
      return make_error(Errc::out_of_memory, Stage::pin, "no memory for the table of registered memories");
    }
    index = static_cast<std::uint32_t>(entries_.size() - 1);
  }
  Entry& entry = entries_[index];
  entry = Entry{.region = region, .length = length, .generation = entry.generation + 1, .owned = true, .used = true};
  return id_of(index);
}

Result<std::uint32_t> MemoryTable::find(MemoryId memory) const noexcept {
  const std::uint32_t index = index_of(memory);
  if (index == none)
    return make_error(Errc::stale_handle, Stage::validate,
                      "the registered memory it names is gone, or belongs to another address space");
  return index;
}

void MemoryTable::forget(std::uint32_t index) noexcept {
  entries_[index].used = false;
  free_.push_back(index);  // within the reserve of add()
}

}  // namespace iovane::engine
