// Ioctl arguments as the kernels take them in and give them back.
//
// The argument is the caller's own structure at an address in this process. A null address is EFAULT; any other must be
// good, because there is no fault handler to turn a bad one into an errno.
#pragma once

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>

// Where `member` ends in `Structure`: how interfaces say how short an old caller's structure may be.
#define IOVANE_UP_TO(Structure, member) (offsetof(Structure, member) + sizeof(Structure::member))

namespace iovane::backends::model {

inline const std::byte* bytes_at(std::uint64_t address) noexcept { return std::bit_cast<const std::byte*>(address); }
inline std::byte* writable_bytes_at(std::uint64_t address) noexcept { return std::bit_cast<std::byte*>(address); }

/// iommufd's convention: the structure says its own size. `minimum` is where the first kernel's structure ended; a
/// shorter one is EINVAL, a longer one with a non-zero tail E2BIG.
template <typename Command>
class IommufdArgument {
 public:
  static int read(std::uint64_t address, std::size_t minimum, IommufdArgument& out) noexcept {
    if (address == 0) return -EFAULT;
    std::memcpy(&out.user_size_, bytes_at(address), sizeof out.user_size_);
    out.address_ = address;
    if (out.user_size_ < minimum) return -EINVAL;
    if (out.user_size_ == sizeof(Command)) [[likely]] {
      std::memcpy(&out.command, bytes_at(address), sizeof(Command));
    } else {
      const std::byte* const tail = bytes_at(address) + sizeof(Command);
      if (out.user_size_ > sizeof(Command) &&
          std::any_of(tail, tail + (out.user_size_ - sizeof(Command)), [](std::byte b) { return b != std::byte{0}; })) {
        return -E2BIG;
      }
      std::memset(static_cast<void*>(&out.command), 0, sizeof(Command));
      std::memcpy(&out.command, bytes_at(address), std::min<std::size_t>(out.user_size_, sizeof(Command)));
    }
    return 0;
  }
  /// Copies the structure back, as far as the caller has room.
  void respond() const noexcept {
    if (user_size_ >= sizeof(Command)) [[likely]] {
      std::memcpy(writable_bytes_at(address_), &command, sizeof(Command));
    } else {
      std::memcpy(writable_bytes_at(address_), &command, user_size_);
    }
  }

  Command command{};

 private:
  std::uint64_t address_ = 0;
  std::uint32_t user_size_ = 0;
};

/// VFIO's convention: `argsz` says how much room there is; only the first `minimum` bytes are read and written.
template <typename Structure>
int read_vfio(std::uint64_t address, std::size_t minimum, Structure& out) noexcept {
  if (address == 0) return -EFAULT;
  std::memcpy(&out.argsz, bytes_at(address), sizeof out.argsz);
  if (out.argsz < minimum) return -EINVAL;
  std::memcpy(static_cast<void*>(&out), bytes_at(address), minimum);
  return 0;
}
template <typename Structure>
void write_vfio(std::uint64_t address, const Structure& structure, std::size_t bytes) noexcept {
  std::memcpy(writable_bytes_at(address), &structure, bytes);
}

}  // namespace iovane::backends::model
