#include "cli/top_command.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "base/error_text.hpp"
#include "cli/stats_reader.hpp"
#include "cli/table.hpp"
#include "cli/units.hpp"

namespace iovane::cli {
namespace {

struct Arguments {
  std::uint32_t process = 0;
  std::string page;
  double interval = 1.0;
  std::uint32_t times = 0;
  bool json = false;
};

using Clock = std::chrono::steady_clock;

struct Look {
  std::vector<SpaceStats> rows;
  Clock::time_point at;
};

Result<Look> look(const Arguments& arguments) {
  Look now{{}, Clock::now()};
  const bool given = !arguments.page.empty();
  for (const std::string& path : given ? std::vector{arguments.page} : find_pages(arguments.process)) {
    auto rows = read_page(path);
    if (rows) {
      now.rows.insert(now.rows.end(), rows->begin(), rows->end());
    } else if (given) {
      return rows.error();  // of those that were found, one may have gone meanwhile, or not be ours to read
    }
  }
  return now;
}

std::string text(const Look& now, const Look& before) {
  using Align = Table::Align;
  Table table{{{"process", Align::right},
               {"address space"},
               {"backend"},
               {"maps", Align::right},
               {"unmaps", Align::right},
               {"calls/op", Align::right},
               {"failures", Align::right},
               {"live", Align::right},
               {"bytes", Align::right},
               {"stale", Align::right},
               {"quarantined", Align::right},
               {"batch p50", Align::right},
               {"p99", Align::right}}};
  std::map<std::tuple<std::string, std::uint32_t, std::uint32_t>, const Stats*> earlier;
  for (const SpaceStats& row : before.rows) earlier[{row.page, row.slot, row.tenant}] = &row.stats;
  const auto elapsed =
      static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now.at - before.at).count());
  for (const SpaceStats& row : now.rows) {
    const Stats& s = row.stats;
    const auto found = earlier.find({row.page, row.slot, row.tenant});
    const Stats then = found != earlier.end() ? *found->second : Stats{};
    const auto rate = [&](std::uint64_t count, std::uint64_t base) { return format_rate(count - base, elapsed); };
    table.add({fmt::format("{}{}", row.process, row.running ? "" : " (ended)"), row.name, row.backend,
               rate(s.maps, then.maps), rate(s.unmaps, then.unmaps),
               format_ratio(static_cast<double>(s.backend_ops - then.backend_ops),
                            static_cast<double>(s.maps + s.unmaps - then.maps - then.unmaps)),
               format_count(s.failures), format_count(s.live_mappings), format_bytes(s.live_bytes),
               format_count(s.stale_mappings), format_count(s.quarantined_mappings),
               format_duration(s.batch_time.p50_ns), format_duration(s.batch_time.p99_ns)});
  }
  return table.text();
}

nlohmann::ordered_json json(const Look& now) {
  nlohmann::ordered_json spaces = nlohmann::ordered_json::array();
  for (const SpaceStats& row : now.rows) {
    const Stats& s = row.stats;
    const auto durations = [](const DurationSummary& d) {
      return nlohmann::ordered_json{{"count", d.count},
                                    {"p50_ns", d.p50_ns},
                                    {"p99_ns", d.p99_ns},
                                    {"p999_ns", d.p999_ns},
                                    {"max_ns", d.greatest_ns}};
    };
    spaces.push_back({{"process", row.process},
                      {"running", row.running},
                      {"name", row.name},
                      {"backend", row.backend},
                      {"maps", s.maps},
                      {"unmaps", s.unmaps},
                      {"replaces", s.replaces},
                      {"failures", s.failures},
                      {"batches", s.batches},
                      {"backend_ops", s.backend_ops},
                      {"merged_unmaps", s.merged_unmaps},
                      {"cancelled_pairs", s.cancelled_pairs},
                      {"retries", s.retries},
                      {"combined_batches", s.combined_batches},
                      {"handed_over", s.handed_over},
                      {"live_mappings", s.live_mappings},
                      {"live_bytes", s.live_bytes.value},
                      {"quarantined_mappings", s.quarantined_mappings},
                      {"quarantined_bytes", s.quarantined_bytes.value},
                      {"flushes", s.flushes},
                      {"flushed", s.flushed},
                      {"revived", s.revived},
                      {"stale_mappings", s.stale_mappings},
                      {"stale_bytes", s.stale_bytes.value},
                      {"stale_mappings_peak", s.stale_mappings_peak},
                      {"stale_bytes_peak", s.stale_bytes_peak.value},
                      {"stale_window", durations(s.stale_window)},
                      {"batch_time", durations(s.batch_time)}});
  }
  return {{"address_spaces", std::move(spaces)}};
}

ExitStatus run_top(const Arguments& arguments) {
  const bool screen = ::isatty(STDOUT_FILENO) != 0 && !arguments.json;
  auto before = look(arguments);
  if (!before) return report_input(before.error());
  for (std::uint32_t n = 0; arguments.times == 0 || n < arguments.times; ++n) {
    std::this_thread::sleep_for(std::chrono::duration<double>{arguments.interval});
    auto now = look(arguments);
    if (!now) return report_input(now.error());
    if (arguments.json) {
      fmt::print("{}\n", json(*now).dump());
    } else {
      if (screen) fmt::print("\033[H\033[2J");
      if (now->rows.empty())
        fmt::print(
            "No statistics page in /dev/shm. A process writes one when EngineConfig::stats_page is \"auto\"; try\n"
            "'iovane replay --stats TRACE' in another terminal.\n");
      else
        fmt::print("{}", text(*now, *before));
    }
    std::fflush(stdout);
    before = std::move(now);
  }
  return ExitStatus::ok;
}

}  // namespace

void add_top_command(CLI::App& app, std::function<ExitStatus()>& run) {
  auto arguments = std::make_shared<Arguments>();
  CLI::App* const top = app.add_subcommand("top", "Show what running engines do, until interrupted");
  top->add_option("--process", arguments->process, "Only this process (0: all)")->capture_default_str();
  top->add_option("--page", arguments->page, "Read this statistics page instead of those in /dev/shm");
  top->add_option("--interval", arguments->interval, "Seconds between two looks")
      ->check(CLI::Range(0.01, 3600.0))
      ->capture_default_str();
  top->add_option("--times", arguments->times, "Look so often, then end (0: until interrupted)")->capture_default_str();
  top->add_flag("--json", arguments->json, "Print one JSON object per look, counters since the start");
  top->callback([&run, arguments] { run = [arguments] { return run_top(*arguments); }; });
}

}  // namespace iovane::cli
