// Process memory for mappings: whole os_pages of its own, with contents that cannot be mistaken.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <span>
#include <utility>

#include "iovane/types.hpp"

namespace iovane::test {

inline std::size_t os_page_bytes() { return static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)); }

/// Anonymous private memory, populated, filled with bytes that depend on their position and on `salt`.
class Memory {
 public:
  explicit Memory(std::size_t pages, unsigned salt = 1) : length_{pages * os_page_bytes()} {
    void* const address =
        ::mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (address == MAP_FAILED) throw std::bad_alloc{};
    data_ = static_cast<std::byte*>(address);
    scramble(salt);
  }
  Memory(Memory&& o) noexcept : data_{std::exchange(o.data_, nullptr)}, length_{o.length_} {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    if (data_ != nullptr) ::munmap(data_, length_);
  }

  std::byte* data() const { return data_; }
  Bytes length() const { return {length_}; }
  std::uint64_t address(std::size_t page = 0) const {
    return reinterpret_cast<std::uintptr_t>(data_) + page * os_page_bytes();
  }
  std::span<std::byte> bytes() const { return {data_, length_}; }
  std::span<std::byte> page(std::size_t index) const {
    return bytes().subspan(index * os_page_bytes(), os_page_bytes());
  }
  void fill(int value) { std::memset(data_, value, length_); }
  void scramble(unsigned salt) {
    for (std::size_t i = 0; i < length_; ++i)
      data_[i] = static_cast<std::byte>((i * 31 + i / 256 * 7 + salt * 59 + 13) & 0xff);
  }

 private:
  std::byte* data_;
  std::size_t length_;
};

}  // namespace iovane::test
