#include "backends/stage1/own_pins.hpp"

#include <new>
#include <utility>

#include "base/fault_point.hpp"

namespace iovane::backends::stage1 {

Result<IovaRange> OwnPins::take(std::uint64_t address, Bytes length, bool writable) noexcept {
  try {
    if (base::fault_now(base::FaultKind::allocation)) throw std::bad_alloc{};
    const auto room = parent_.reserve(length);
    if (!room) return room.error();
    {
      const std::lock_guard lock{mutex_};
      pins_.emplace(room->start.value, Pin{room->last.value, length.value});
    }
    const int why = parent_.map_at(room->start, address, length, writable);
    if (why == 0) return *room;
    const std::lock_guard lock{mutex_};
    pins_.erase(room->start.value);
    parent_.release(*room);
    return make_error(Errc::io_error, Stage::map, why, "");
  } catch (const std::bad_alloc&) {
    return make_error(Errc::out_of_memory, Stage::map, "no memory to remember what was pinned");
  }
}

void OwnPins::unmapped(std::uint64_t address, std::uint64_t bytes, Dying& dying) noexcept {
  const std::lock_guard lock{mutex_};
  auto at = pins_.upper_bound(address);
  if (at == pins_.begin()) return;
  --at;
  if (at->second.last < address) return;
  at->second.live -= bytes;
  if (at->second.live == 0) dying.insert(pins_.extract(at));
}

void OwnPins::let_go(Dying& dying) noexcept {
  for (const auto& [start, pin] : dying) {
    const IovaRange room{Iova{start}, Iova{pin.last}};
    // What the kernel does not unmap stays pinned until the descriptor closes, and its room is not used again.
    if (parent_.unmap_at(room) == 0) parent_.release(room);
  }
  dying.clear();
}

void OwnPins::hold(Dying& dying) noexcept {
  const std::lock_guard lock{mutex_};
  held_.merge(dying);
}

void OwnPins::let_go_held() noexcept {
  Dying held;
  {
    const std::lock_guard lock{mutex_};
    held.swap(held_);
  }
  let_go(held);
}

void OwnPins::let_go_all() noexcept {
  let_go(pins_);
  let_go(held_);
}

}  // namespace iovane::backends::stage1
