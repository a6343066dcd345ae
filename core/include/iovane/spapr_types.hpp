// Values of what only sPAPR has: windows of I/O addresses (windows.hpp) and error handling (error_handling.hpp).
#pragma once

#include <cstdint>
#include <string_view>

#include "iovane/types.hpp"

namespace iovane {

/// A window of I/O addresses with a table behind it.
struct Window {
  IovaRange range{};
  Bytes page{4096};          ///< what one entry translates
  std::uint32_t levels = 1;  ///< of its table; 0 for a default window, whose shape the kernel does not tell
  Bytes table{};             ///< what it added to the process's locked memory
  bool is_default = false;
};

/// What the platform can make.
struct WindowLimits {
  IovaRange default_window{};
  std::uint64_t page_sizes = 0;   ///< bit n: entries of 2^n bytes; 0 where no window can be made
  std::uint32_t windows_max = 0;  ///< the default one included, as far as it exists
  std::uint32_t levels_max = 0;
};

struct WindowRequest {
  Bytes length{};            ///< a power of two
  Bytes page{65536};         ///< one of WindowLimits::page_sizes
  std::uint32_t levels = 0;  ///< 0: as few as the kernel can find memory for
};

enum class EehState : std::uint8_t {
  normal,       ///< registers and DMA work
  reset,        ///< in reset
  stopped,      ///< frozen: neither registers nor DMA
  stopped_dma,  ///< registers work, DMA does not
  unavailable,  ///< the platform gave it up for now, or for good
};
std::string_view to_string(EehState state) noexcept;

enum class EehReset : std::uint8_t { hot, fundamental };

/// An error to be made up by the platform, for tests of recovery.
struct EehInjection {
  bool wide = false;  ///< a 64-bit error instead of a 32-bit one
  /// LoPAR's ibm,errinjct function: 0 load from memory, 4 load from configuration space, ...
  std::uint32_t function = 0;
  std::uint64_t address = 0;
  std::uint64_t mask = 0;
};

/// A change of state that check() found.
struct EehEvent {
  EehState before = EehState::normal;
  EehState now = EehState::normal;
  bool frozen() const noexcept { return now == EehState::stopped || now == EehState::stopped_dma; }
};

}  // namespace iovane
