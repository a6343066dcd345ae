#include "trace/import.hpp"

#include <utility>
#include <variant>

#include "base/error_text.hpp"
#include "trace/ftrace_line.hpp"
#include "trace/line_reader.hpp"
#include "trace/reference.hpp"

namespace iovane::trace {
namespace {

constexpr std::uint64_t lines_between_progress = 8192;

std::string file_name(const std::string& path) {
  const auto slash = path.rfind('/');
  return slash == std::string::npos ? path : path.substr(slash + 1);
}

Result<std::vector<Event>> read_events(const std::string& path, const ImportOptions& options, SourceFacts& facts) {
  auto reader = LineReader::open(path);
  if (!reader) return reader.error();
  std::vector<Event> events;
  for (;;) {
    const auto line = reader->next();
    if (!line) return line.error();
    if (!line->has_value()) break;
    const FtraceLine parsed = parse_ftrace_line(**line);
    if (const auto* const event = std::get_if<Event>(&parsed)) {
      if (events.size() == events_max)
        return base::fail(Errc::limit_reached, Stage::validate, 0, "{}:{}: more than {} events: split the recording",
                          path, reader->line_number(), events_max);
      ++(event->kind == EventKind::map ? facts.maps_read : facts.unmaps_read);
      events.push_back(*event);
    } else if (const auto* const bad = std::get_if<MalformedLine>(&parsed)) {
      if (!options.skip_malformed)
        return base::fail(Errc::bad_format, Stage::validate, 0,
                          "{}:{}: {}; expected a line such as \"task-1 [000] ..... 1.000001: map: IOMMU: iova=0x1000 - "
                          "0x2000 paddr=0x3000 size=4096\"; --skip-malformed leaves such lines out and counts them",
                          path, reader->line_number(), bad->reason);
      ++facts.malformed_lines;
    } else if (const auto* const lost = std::get_if<LostLine>(&parsed)) {
      facts.lost_events += lost->events;
    } else if (std::holds_alternative<ForeignLine>(parsed)) {
      ++facts.foreign_lines;
    }
    if (options.progress && reader->line_number() % lines_between_progress == 0)
      options.progress(reader->bytes_read(), reader->bytes_total());
  }
  facts.lines = reader->line_number();
  if (events.empty())
    return base::fail(Errc::bad_format, Stage::validate, 0,
                      "{}: no iommu:map or iommu:unmap event in {} lines; record with: echo 1 > "
                      "/sys/kernel/tracing/events/iommu/enable; cat /sys/kernel/tracing/trace > FILE",
                      path, facts.lines);
  return events;
}

}  // namespace

Result<Trace> import_ftrace(const std::string& path, const ImportOptions& options) {
  Trace trace;
  trace.facts.source = file_name(path);
  const auto recorded = read_events(path, options, trace.facts);
  if (!recorded) return recorded.error();
  auto repaired = repair(*recorded, options.repair, trace.facts);
  if (!repaired) return repaired.error();
  trace.events = *std::move(repaired);
  if (trace.events.empty())
    return base::fail(Errc::bad_format, Stage::validate, 0,
                      "{}: none of its {} events can be replayed: it holds unmaps without their maps only; record "
                      "from before the devices start",
                      path, recorded->size());
  if (const auto fits = check_order(trace, path); !fits) return fits.error();
  return trace;
}

}  // namespace iovane::trace
