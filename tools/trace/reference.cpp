#include "trace/reference.hpp"

#include <iterator>
#include <string_view>
#include <utility>

#include "base/error_text.hpp"

namespace iovane::trace {
namespace {

/// The first live range whose last address is not below `address`.
template <typename Map>
auto first_reaching(Map& live, Iova address) {
  auto at = live.upper_bound(address);
  if (at != live.begin() && std::prev(at)->second.last >= address) --at;
  return at;
}

}  // namespace

Result<void> Reference::map(IovaRange range, std::uint64_t memory) {
  const auto at = first_reaching(live_, range.start);
  if (at != live_.end() && at->first <= range.last)
    return base::fail(Errc::iova_busy, Stage::validate, 0, "map of [{:#x}, {:#x}] overlaps live [{:#x}, {:#x}]",
                      range.start.value, range.last.value, at->first.value, at->second.last.value);
  live_.emplace_hint(at, range.start, Live{range.last, memory});
  live_bytes_.value += range.length().value;
  return {};
}

Result<Bytes> Reference::unmap(IovaRange range) {
  const auto first = first_reaching(live_, range.start);
  Bytes removed{};
  auto stop = first;
  for (; stop != live_.end() && stop->first <= range.last; ++stop) {
    const IovaRange mapping{stop->first, stop->second.last};
    if (!range.contains(mapping))
      return base::fail(Errc::would_bisect, Stage::validate, 0, "unmap of [{:#x}, {:#x}] cuts live [{:#x}, {:#x}]",
                        range.start.value, range.last.value, mapping.start.value, mapping.last.value);
    removed.value += mapping.length().value;
  }
  if (stop == first)
    return base::fail(Errc::not_found, Stage::validate, 0, "unmap of [{:#x}, {:#x}] where nothing is mapped",
                      range.start.value, range.last.value);
  live_.erase(first, stop);
  live_bytes_.value -= removed.value;
  return removed;
}

Result<void> Reference::apply(const Event& event) {
  if (event.kind == EventKind::map) return map(event.range, event.physical);
  const auto removed = unmap(event.range);
  return removed ? Result<void>{} : Result<void>{removed.error()};
}

std::optional<std::pair<IovaRange, Reference::Live>> Reference::find(Iova address) const {
  const auto at = first_reaching(live_, address);
  if (at == live_.end() || at->first > address) return std::nullopt;
  return std::pair{IovaRange{at->first, at->second.last}, at->second};
}

bool Reference::overlaps(IovaRange range) const {
  const auto at = first_reaching(live_, range.start);
  return at != live_.end() && at->first <= range.last;
}

void Reference::clear() noexcept {
  live_.clear();
  live_bytes_ = {};
}

Result<void> check_order(const Trace& trace, std::string_view name) {
  Reference reference;
  for (std::size_t i = 0; i < trace.events.size(); ++i) {
    const auto applied = reference.apply(trace.events[i]);
    if (!applied)
      return base::fail(Errc::bad_format, Stage::validate, 0,
                        "{}: event {} of {} does not fit those before it: {}; expected a trace as 'iovane trace "
                        "import' writes it; import the recording again",
                        name, i + 1, trace.events.size(), applied.error().detail());
  }
  return {};
}

}  // namespace iovane::trace
