// From the errno of a map or unmap to an Error that says which limit, which hole, which cure.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "backends/backend.hpp"
#include "backends/kernel.hpp"

namespace iovane::backends {

/// How an interface charges pins to RLIMIT_MEMLOCK; see MemlockUse.
enum class MemlockAccount : std::uint8_t {
  user_pinned,     ///< iommufd: all processes of the user together
  process_locked,  ///< type1: per process
};

/// What is left under the limit, and the account; says nothing about entries. Reads /proc.
Headroom memlock_headroom(Kernel& kernel, MemlockAccount account) noexcept;

/// A map that the kernel refused.
struct MapFailure {
  std::string_view call;  ///< "IOAS_MAP"
  int os_errno = 0;
  IovaRange range{};
  std::uint64_t memory = 0;  ///< process address, or offset in the file
  Access access = Access::none;
  MemlockAccount account = MemlockAccount::user_pinned;
  std::uint64_t entries_max = 0;  ///< the limit that ENOSPC stands for; 0 when unknown
};

/// True when explain_map() needs the usable ranges to tell a reserved IOVA from other mistakes.
constexpr bool needs_usable_ranges(int os_errno) noexcept {
  // EINVAL 22, EOVERFLOW 75, EADDRINUSE 98: all three can mean "outside what can be mapped".
  return os_errno == 22 || os_errno == 75 || os_errno == 98;
}

/// `usable`: normalized; ignored unless needs_usable_ranges(). Does not allocate beyond what the kernel's memlock()
/// does.
Error explain_map(Kernel& kernel, const MapFailure& failure, std::span<const IovaRange> usable) noexcept;

/// ENOMEM while pinning: memlock_exceeded with limit, use and need where the limit is the reason, else out_of_memory.
Error explain_no_memory(Kernel& kernel, MemlockAccount account, Stage stage, std::string_view call,
                        Bytes need) noexcept;

/// Any other failed call: the general code and the call's name.
Error explain_call(Stage stage, std::string_view call, int os_errno) noexcept;

}  // namespace iovane::backends
