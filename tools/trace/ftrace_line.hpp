// One line of the kernel's ftrace text.
#pragma once

#include <cstdint>
#include <string_view>
#include <variant>

#include "trace/event.hpp"

namespace iovane::trace {

/// Comment, header or empty.
struct BlankLine {};
/// "CPU:1 [LOST 12 EVENTS]".
struct LostLine {
  std::uint64_t events = 0;
};
/// An event of another kind.
struct ForeignLine {};
/// A map or unmap event that cannot be believed; a static text says what is wrong.
struct MalformedLine {
  std::string_view reason;
};

using FtraceLine = std::variant<BlankLine, LostLine, ForeignLine, MalformedLine, Event>;

/// Understands lines as tracefs' `trace` file and `trace-cmd report` print them, for example
///   fio-69  [000] .....  4.820119: map: IOMMU: iova=0x00000000fff90000 - 0x00000000fffa0000 paddr=0x... size=65536
/// Kernels before 5.17 print no end address; both forms are read. An unmap that removed less than was asked for is
/// taken as what it removed. Any thread.
FtraceLine parse_ftrace_line(std::string_view line) noexcept;

}  // namespace iovane::trace
