#include "cli/trace_command.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/progress.hpp"
#include "cli/units.hpp"
#include "trace/format.hpp"
#include "trace/import.hpp"
#include "trace/summary.hpp"

namespace iovane::cli {
namespace {

nlohmann::ordered_json to_json(const std::string& path, const trace::Trace& t) {
  const trace::Summary s = trace::summarize(t);
  const trace::SourceFacts& f = t.facts;
  return {{"file", path},
          {"source", f.source},
          {"events", t.events.size()},
          {"maps", s.maps},
          {"unmaps", s.unmaps},
          {"duration_ns", s.duration_ns},
          {"cpus", s.cpus},
          {"mapped_bytes", s.mapped.value},
          {"leaf_entries", s.leaf_entries},
          {"distinct_granules", s.distinct_granules},
          {"live_max", s.live_max},
          {"live_max_bytes", s.live_max_bytes.value},
          {"live_at_end", s.live_at_end},
          {"iova_first", s.iova_first},
          {"iova_last", s.iova_last},
          {"physical_last", s.physical_last},
          {"import",
           {{"lines", f.lines},
            {"maps_read", f.maps_read},
            {"unmaps_read", f.unmaps_read},
            {"foreign_lines", f.foreign_lines},
            {"malformed_lines", f.malformed_lines},
            {"lost_events", f.lost_events},
            {"unmaps_moved_later", f.unmaps_moved_later},
            {"unmaps_moved_earlier", f.unmaps_moved_earlier},
            {"unmaps_trimmed", f.unmaps_trimmed},
            {"unmaps_dropped", f.unmaps_dropped},
            {"maps_dropped", f.maps_dropped},
            {"spaces", f.spaces},
            {"space_stride", f.space_stride},
            {"moved_to_space", f.moved_to_space}}}};
}

void print_repairs(const trace::SourceFacts& f) {
  const auto line = [](std::uint64_t count, std::string_view what) {
    if (count != 0) fmt::print("  {:>9}  {}\n", format_count(count), what);
  };
  fmt::print("import from {}, {} lines: {} maps and {} unmaps read\n", f.source, format_count(f.lines),
             format_count(f.maps_read), format_count(f.unmaps_read));
  line(f.foreign_lines, "events of other kinds left out");
  line(f.malformed_lines, "malformed lines left out");
  line(f.lost_events, "events lost by the recorder");
  line(f.unmaps_moved_later, "unmaps moved behind their map (clocks of two CPUs)");
  line(f.unmaps_moved_earlier, "unmaps moved before the next map (clocks of two CPUs)");
  line(f.unmaps_trimmed, "unmaps shortened: their first pieces were mapped before the recording");
  line(f.unmaps_dropped, "unmaps dropped: mapped before the recording");
  line(f.maps_dropped, "maps dropped: too many live mappings of one address");
  if (f.spaces > 1)
    fmt::print(
        "  {:>9}  events in {} further address spaces, {} apart: devices of several domains used the same "
        "IOVAs\n",
        format_count(f.moved_to_space), f.spaces - 1, format_bytes(Bytes{f.space_stride}));
}

void print_info(const std::string& path, const trace::Trace& t) {
  const trace::Summary s = trace::summarize(t);
  fmt::print("{}\n", path);
  fmt::print("  events     {}: {} maps, {} unmaps, on {} CPUs in {}\n", format_count(t.events.size()),
             format_count(s.maps), format_count(s.unmaps), s.cpus, format_duration(s.duration_ns));
  fmt::print("  mapped     {} in {} leaf entries of 4 KiB, over {} distinct ones\n", format_bytes(s.mapped),
             format_count(s.leaf_entries), format_count(s.distinct_granules));
  fmt::print("  live       at most {} mappings ({}), {} at the end\n", format_count(s.live_max),
             format_bytes(s.live_max_bytes), format_count(s.live_at_end));
  fmt::print("  IOVA       {:#x} to {:#x}\n", s.iova_first, s.iova_last);
  fmt::print("  memory     up to {:#x}\n", s.physical_last);
  print_repairs(t.facts);
}

struct ImportArguments {
  std::vector<std::string> inputs;
  std::string output;
  std::uint64_t skew_us = trace::RepairOptions{}.skew_ns_max / 1000;
  bool skip_malformed = false;
};

/// "a/b/vtd.ftrace.zst" -> "vtd.iovtrace", in the working folder.
std::string default_output(const std::string& input) {
  std::string name = input.substr(input.rfind('/') + 1);
  for (const std::string_view suffix : {".zst", ".ftrace", ".txt"})
    if (name.size() > suffix.size() && name.ends_with(suffix)) name.resize(name.size() - suffix.size());
  return name + ".iovtrace";
}

ExitStatus run_import(const ImportArguments& arguments) {
  if (!arguments.output.empty() && arguments.inputs.size() > 1) {
    fmt::print(stderr,
               "iovane: --output names one file, and there are {} recordings; import them one by one, or "
               "leave --output away\n",
               arguments.inputs.size());
    return ExitStatus::usage;
  }
  for (const std::string& input : arguments.inputs) {
    const std::string output = arguments.output.empty() ? default_output(input) : arguments.output;
    trace::ImportOptions options;
    options.repair.skew_ns_max = arguments.skew_us * 1000;
    options.skip_malformed = arguments.skip_malformed;
    Result<trace::Trace> imported = [&] {
      Progress progress{"import " + input.substr(input.rfind('/') + 1)};
      options.progress = [&](std::uint64_t done, std::uint64_t total) { progress.update(done, total); };
      return trace::import_ftrace(input, options);
    }();
    if (!imported) return report_input(imported.error());
    if (const auto written = trace::write_file(output, *imported); !written) {
      report(written.error());
      return ExitStatus::failed;
    }
    print_info(output, *imported);
  }
  return ExitStatus::ok;
}

ExitStatus run_info(const std::vector<std::string>& paths, bool json) {
  auto documents = nlohmann::ordered_json::array();
  for (const std::string& path : paths) {
    const auto read = trace::read_file(path);
    if (!read) return report_input(read.error());
    if (json)
      documents.push_back(to_json(path, *read));
    else
      print_info(path, *read);
  }
  if (json) fmt::print("{}\n", documents.dump(2));
  return ExitStatus::ok;
}

}  // namespace

void add_trace_command(CLI::App& app, std::function<ExitStatus()>& run) {
  CLI::App* const trace = app.add_subcommand("trace", "Import recordings of a kernel's IOMMU events, describe traces");
  trace->require_subcommand(1);

  auto import_arguments = std::make_shared<ImportArguments>();
  CLI::App* const import =
      trace->add_subcommand("import", "Make a trace of ftrace text (iommu:map, iommu:unmap events)");
  import->add_option("recording", import_arguments->inputs, "ftrace text, plain or compressed with zstd")->required();
  import->add_option("-o,--output", import_arguments->output, "File to write (default: RECORDING's name + .iovtrace)");
  import->add_option("--skew-us", import_arguments->skew_us, "How far clocks of two CPUs may be apart, in microseconds")
      ->capture_default_str()
      ->check(CLI::Range(0, 1'000'000));
  import->add_flag("--skip-malformed", import_arguments->skip_malformed, "Leave malformed lines out and count them");
  import->callback([&run, import_arguments] { run = [import_arguments] { return run_import(*import_arguments);
};
}  // namespace iovane::cli
);

struct InfoArguments {
  std::vector<std::string> paths;
  bool json = false;
};
auto info_arguments = std::make_shared<InfoArguments>();
CLI::App* const info = trace->add_subcommand("info", "Say what is in traces and how they were imported");
info->add_option("trace", info_arguments->paths, "Files that 'iovane trace import' wrote")->required();
info->add_flag("--json", info_arguments->json, "Print an array of JSON objects");
info->callback([&run, info_arguments] {
  run = [info_arguments] { return run_info(info_arguments->paths, info_arguments->json); };
});
}

}  // namespace iovane::cli
