#include "replay/guest_memory.hpp"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "base/error_text.hpp"
#include "trace/event.hpp"

namespace iovane::replay {

Result<GuestMemory> GuestMemory::create(Bytes size) {
  if (size.value == 0) return GuestMemory{nullptr, {}};
  void* const memory =
      ::mmap(nullptr, size.value, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED)
    return base::fail(Errc::out_of_memory, Stage::pin, errno,
                      "no {} MiB of memory for the guest; replay fewer events (--events) or free some",
                      size.value >> 20);
  GuestMemory guest{static_cast<std::byte*>(memory), size};
  for (std::uint64_t offset = 0; offset < size.value; offset += trace::granule) {
    const std::uint64_t mark = stamp(offset);
    std::memcpy(guest.data_ + offset, &mark, sizeof mark);
  }
  return guest;
}

GuestMemory::GuestMemory(GuestMemory&& o) noexcept
    : data_{std::exchange(o.data_, nullptr)}, size_{std::exchange(o.size_, Bytes{})} {}

GuestMemory& GuestMemory::operator=(GuestMemory&& o) noexcept {
  std::swap(data_, o.data_);
  std::swap(size_, o.size_);
  return *this;
}

GuestMemory::~GuestMemory() {
  if (data_ != nullptr) ::munmap(data_, size_.value);
}

}  // namespace iovane::replay
