#include "trace/ftrace_line.hpp"

#include <charconv>
#include <optional>

#include "base/checked_math.hpp"

namespace iovane::trace {
namespace {

/// Takes words and fields off the front of a line.
class Cursor {
 public:
  explicit Cursor(std::string_view text) noexcept : rest_{text} {}

  std::string_view rest() const noexcept { return rest_; }
  void skip_spaces() noexcept {
    const auto at = rest_.find_first_not_of(" \t");
    rest_ = at == std::string_view::npos ? std::string_view{} : rest_.substr(at);
  }
  bool take(std::string_view text) noexcept {
    skip_spaces();
    if (!rest_.starts_with(text)) return false;
    rest_.remove_prefix(text.size());
    return true;
  }
  std::optional<std::uint64_t> number(int base) noexcept {
    std::uint64_t value = 0;
    const auto [end, failure] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), value, base);
    if (failure != std::errc{}) return std::nullopt;
    rest_.remove_prefix(static_cast<std::size_t>(end - rest_.data()));
    return value;
  }
  /// "name" and the number behind it; nothing when either is missing.
  std::optional<std::uint64_t> field(std::string_view name, int base) noexcept {
    return take(name) ? number(base) : std::nullopt;
  }

 private:
  std::string_view rest_;
};

/// "4.820119" in nanoseconds. Microseconds are the usual resolution; up to nine decimals are read.
std::optional<std::uint64_t> parse_time(std::string_view word) noexcept {
  Cursor cursor{word};
  const auto seconds = cursor.number(10);
  if (!seconds || !cursor.take(".")) return std::nullopt;
  const std::size_t digits = cursor.rest().size();
  auto fraction = cursor.number(10);
  if (!fraction || !cursor.rest().empty() || digits > 9) return std::nullopt;
  for (std::size_t i = digits; i < 9; ++i) *fraction *= 10;
  const auto whole = base::checked_multiply<std::uint64_t>(*seconds, 1'000'000'000);
  return whole ? base::checked_add(*whole, *fraction) : std::nullopt;
}

FtraceLine parse_lost(std::string_view line) noexcept {
  Cursor cursor{line.substr(line.find("[LOST"))};
  cursor.take("[LOST");
  cursor.skip_spaces();
  return LostLine{cursor.number(10).value_or(1)};
}

/// What precedes the event's name: "task-pid [cpu] flags time:". Task names may hold spaces, brackets and colons, so
/// the time is the last word and the CPU the last bracketed number.
bool parse_prefix(std::string_view prefix, Event& event) noexcept {
  const auto time_at = prefix.find_last_of(" \t");
  if (time_at == std::string_view::npos) return false;
  const auto time = parse_time(prefix.substr(time_at + 1));
  const auto open = prefix.rfind('[');
  if (!time || open == std::string_view::npos) return false;
  Cursor cursor{prefix.substr(open + 1)};
  const auto cpu = cursor.number(10);
  if (!cpu || !cursor.take("]")) return false;
  event.time_ns = *time;
  event.cpu = static_cast<std::uint8_t>(*cpu & 0xff);
  return true;
}

FtraceLine parse_event(Event event, std::string_view prefix, std::string_view body) noexcept {
  if (!parse_prefix(prefix, event)) return MalformedLine{"no \"[CPU] time:\" before the event's name"};
  Cursor cursor{body};
  const auto start = cursor.field("iova=0x", 16);
  if (!start) return MalformedLine{"no \"iova=0x\" with a hexadecimal number behind it"};
  std::optional<std::uint64_t> stop;
  if (cursor.take("-")) {
    stop = cursor.field("0x", 16);
    if (!stop) return MalformedLine{"no end address after \"-\""};
  }
  if (event.kind == EventKind::map) {
    const auto physical = cursor.field("paddr=0x", 16);
    if (!physical) return MalformedLine{"no \"paddr=0x\" with a hexadecimal number behind it"};
    event.physical = *physical;
  }
  const auto size = cursor.field("size=", 10);
  if (!size) return MalformedLine{"no \"size=\" with a number behind it"};
  std::uint64_t length = *size;
  // The printed end is start + size, which is 0 for a range that reaches 2^64-1.
  if (stop && *stop != *start + length) return MalformedLine{"end address minus start address is not the size"};
  if (event.kind == EventKind::unmap) {
    const auto removed = cursor.field("unmapped_size=", 10);
    if (!removed) return MalformedLine{"no \"unmapped_size=\" with a number behind it"};
    if (*removed > length) return MalformedLine{"more bytes unmapped than asked for"};
    if (*removed == 0) return BlankLine{};  // the kernel removed nothing: nothing happened
    length = *removed;
  }
  cursor.skip_spaces();
  if (!cursor.rest().empty()) return MalformedLine{"text after the last field"};
  const auto range = IovaRange::from_length(Iova{*start}, Bytes{length});
  if (!range) return MalformedLine{"the size is 0 or reaches beyond 2^64"};
  if (!base::is_aligned(*start | length | event.physical, granule))
    return MalformedLine{"an address or size is not a multiple of 4096"};
  if (event.kind == EventKind::map && event.physical > ~std::uint64_t{0} - (length - 1))
    return MalformedLine{"the physical range reaches beyond 2^64"};
  event.range = *range;
  return event;
}

}  // namespace

FtraceLine parse_ftrace_line(std::string_view line) noexcept {
  while (!line.empty() && (line.back() == '\r' || line.back() == ' ')) line.remove_suffix(1);
  const auto first = line.find_first_not_of(" \t");
  if (first == std::string_view::npos || line[first] == '#') return BlankLine{};

  static constexpr std::string_view map_mark = ": map: IOMMU: ";
  static constexpr std::string_view unmap_mark = ": unmap: IOMMU: ";
  Event event;
  if (const auto at = line.find(map_mark); at != std::string_view::npos)
    return parse_event(event, line.substr(0, at), line.substr(at + map_mark.size()));
  if (const auto at = line.find(unmap_mark); at != std::string_view::npos) {
    event.kind = EventKind::unmap;
    return parse_event(event, line.substr(0, at), line.substr(at + unmap_mark.size()));
  }
  if (line.find("[LOST") != std::string_view::npos) return parse_lost(line);
  if (line.find(": map: ") != std::string_view::npos || line.find(": unmap: ") != std::string_view::npos)
    return MalformedLine{"no \"IOMMU:\" after the event's name"};
  return ForeignLine{};
}

}  // namespace iovane::trace
