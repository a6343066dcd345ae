#include "cli/replay_command.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cli/progress.hpp"
#include "cli/replay_comparison.hpp"
#include "cli/replay_report.hpp"
#include "replay/engine_target.hpp"
#include "replay/front_end_target.hpp"
#include "replay/guest_memory.hpp"
#include "replay/host.hpp"
#include "replay/plan.hpp"
#include "replay/raw_target.hpp"
#include "replay/replayer.hpp"
#include "trace/format.hpp"

namespace iovane::cli {
namespace {

struct Arguments {
  std::vector<std::string> traces;
  std::vector<std::string> backends{"auto"};
  std::string device;
  std::vector<std::string> targets{"engine"};
  std::vector<std::string> front_ends;
  std::size_t batch_max = 64;
  std::uint64_t events_max = 0;
  std::uint64_t memory_mib_max = 4096;
  std::uint32_t rounds = 1;
  bool verify = true;
  bool measure = true;
  bool stats = false;
  bool json = false;
  bool compare = false;
};

struct LoadedTrace {
  std::string name;
  replay::Plan plan;
};

/// "tests/data/traces/mixed.iovtrace" -> "mixed"
std::string short_name(const std::string& path) {
  std::string name = path.substr(path.rfind('/') + 1);
  constexpr std::string_view suffix = ".iovtrace";
  if (name.size() > suffix.size() && name.ends_with(suffix)) name.resize(name.size() - suffix.size());
  return name;
}

/// On an error `refused` says whose: the file's, or the command line's, which allows too little memory for it.
Result<LoadedTrace> load(const std::string& path, const Arguments& arguments, ExitStatus& refused) {
  refused = ExitStatus::bad_input;
  const auto trace = trace::read_file(path);
  if (!trace) return trace.error();
  refused = ExitStatus::usage;
  auto plan = replay::make_plan(*trace, arguments.events_max, Bytes{arguments.memory_mib_max << 20});
  if (!plan) return plan.error();
  return LoadedTrace{short_name(path), *std::move(plan)};
}

Result<std::unique_ptr<replay::ReplayTarget>> open_target(const std::string& name, replay::Host& host,
                                                          const replay::GuestMemory& memory,
                                                          const Arguments& arguments) {
  const auto up = [](auto opened) -> Result<std::unique_ptr<replay::ReplayTarget>> {
    if (!opened) return opened.error();
    return std::unique_ptr<replay::ReplayTarget>{*std::move(opened)};
  };
  if (name.starts_with("engine")) {
    const auto unmap = name == "engine-relaxed" ? UnmapMode::relaxed : UnmapMode::strict;
    return up(replay::EngineTarget::open(host, memory, arguments.batch_max, {unmap, arguments.stats}));
  }
  if (std::find(arguments.front_ends.begin(), arguments.front_ends.end(), name) != arguments.front_ends.end())
    return up(replay::FrontEndTarget::open(name, host, memory, arguments.batch_max));
  const auto unit = name.starts_with("leaf") ? replay::RawUnit::leaf : replay::RawUnit::event;
  const auto map = name.ends_with("-copy") ? replay::RawMap::copy : replay::RawMap::memory;
  return up(replay::RawTarget::open(host, memory, unit, map));
}

Result<replay::RunReport> run_one(const LoadedTrace& trace, const std::string& target_name, replay::Host& host,
                                  const replay::GuestMemory& memory, const Arguments& arguments) {
  Progress progress{fmt::format("{} by {}", trace.name, target_name)};
  replay::RunOptions options{.batch_max = arguments.batch_max, .verify = arguments.verify, .progress = {}};
  options.progress = [&](std::uint64_t done, std::uint64_t total) { progress.update(done, total); };
  auto report = [&]() -> Result<replay::RunReport> {
    const auto target = open_target(target_name, host, memory, arguments);
    if (!target) return target.error();
    return replay::replay(host, **target, trace.plan, options, trace.name, target_name);
  }();
  // The target is gone: whatever it left behind stays for ever.
  if (report && arguments.verify)
    if (const auto clean = host.check_nothing_left(); !clean) return clean.error();
  return report;
}

/// Of a comparison: `auto` is compared by what the engine takes on it, and only iommufd shares pins.
bool belongs(const std::string& target, const HostRuns& on) {
  if (on.asked == "auto" && !target.starts_with("engine")) return false;
  return !target.ends_with("-copy") || on.host->backend() == "iommufd";
}

void print(const std::vector<HostRuns>& all, const Arguments& arguments) {
  const auto rows = compare(all);
  if (arguments.json && all.size() == 1) {
    fmt::print("{}\n", replay_json(*all[0].host, all[0].runs, arguments.batch_max).dump(2));
  } else if (arguments.json) {
    auto hosts = nlohmann::ordered_json::array();
    for (const HostRuns& on : all) hosts.push_back(replay_json(*on.host, on.runs, arguments.batch_max));
    const nlohmann::ordered_json document{
        {"format", 1}, {"hosts", std::move(hosts)}, {"comparison", comparison_json(rows)}};
    fmt::print("{}\n", document.dump(2));
  } else {
    for (const HostRuns& on : all) fmt::print("{}", replay_text(*on.host, on.runs, arguments.batch_max));
    if (all.size() > 1) fmt::print("\n{}", comparison_text(rows));
  }
}

ExitStatus run_replay(Arguments arguments) {
  arguments.targets.insert(arguments.targets.end(), arguments.front_ends.begin(), arguments.front_ends.end());
  // All input is read and checked before anything is opened: nothing is left half done.
  std::vector<LoadedTrace> traces;
  for (const std::string& path : arguments.traces) {
    ExitStatus refused = ExitStatus::ok;
    auto loaded = load(path, arguments, refused);
    if (!loaded) {
      (void)report(loaded.error());
      return refused;
    }
    traces.push_back(*std::move(loaded));
  }
  const auto measure =
      arguments.measure ? backends::ProbeOptions::Measure::when_new : backends::ProbeOptions::Measure::never;
  std::vector<std::unique_ptr<replay::Host>> hosts;
  std::vector<HostRuns> all;
  for (const std::string& backend : arguments.backends) {
    auto host = replay::Host::open(backend, arguments.device, measure);
    if (!host) {
      const ExitStatus status = report(host.error());
      return host.error().code == Errc::invalid_argument ? ExitStatus::usage : status;  // an unknown backend
    }
    hosts.push_back(*std::move(host));
    all.push_back({backend, hosts.back().get(), {}});
  }
  for (const LoadedTrace& trace : traces) {
    const auto memory = replay::GuestMemory::create(trace.plan.memory);
    if (!memory) return report(memory.error());
    std::vector<std::size_t> first;
    for (const HostRuns& on : all) first.push_back(on.runs.size());
    // Round by round, not target by target: what else the machine does meanwhile then hits all of them alike.
    for (std::uint32_t round = 0; round < arguments.rounds; ++round) {
      for (std::size_t h = 0; h < all.size(); ++h) {
        std::size_t at = first[h];
        for (const std::string& target : arguments.targets) {
          if (arguments.compare && !belongs(target, all[h])) continue;
          auto done = run_one(trace, target, *hosts[h], *memory, arguments);
          if (!done) {
            const bool differs = replay::is_verification_failure(done.error());
            const ExitStatus status = report(done.error());
            return differs ? ExitStatus::unverified : status;
          }
          if (round == 0)
            all[h].runs.push_back(*std::move(done));
          else
            replay::keep_fastest(all[h].runs[at], *std::move(done));
          ++at;
        }
      }
    }
  }
  print(all, arguments);
  return ExitStatus::ok;
}

}  // namespace

void add_replay_command(CLI::App& app, std::function<ExitStatus()>& run) {
  auto arguments = std::make_shared<Arguments>();
  CLI::App* const replay = app.add_subcommand("replay", "Replay traces through the engine, check and time it");
  replay->add_option("trace", arguments->traces, "Files that 'iovane trace import' wrote")->required();
  CLI::Option* const backend =
      replay
          ->add_option("--backend", arguments->backends,
                       "auto (what 'iovane probe' picks, else model), stage1, iommufd, type1, type1-v1, compat, "
                       "compat-v1, or the software IOMMU imitating one: model, model:type1, ...; several, and a table "
                       "puts them side by side")
          ->delimiter(',')
          ->allow_extra_args(false)
          ->capture_default_str();
  replay->add_option("--device", arguments->device,
                     "PCI address of the device to attach (default: the first possible)");
  CLI::Option* const baseline =
      replay
          ->add_option("--baseline", arguments->targets,
                       "What replays, several allowed: engine; engine-relaxed (unmaps deferred for at most 10 ms; with "
                       "--no-verify, else every batch is flushed to be verified); event (one kernel call per event, no "
                       "engine); leaf (one per "
                       "4 KiB entry); event-copy and leaf-copy (the same sharing pins, iommufd)")
          ->delimiter(',')
          ->allow_extra_args(false)  // one word, so that a trace may follow it
          ->check(CLI::IsMember({"engine", "engine-relaxed", "event", "leaf", "event-copy", "leaf-copy"}))
          ->capture_default_str();
  replay
      ->add_option("--front-end", arguments->front_ends,
                   "Also replay as a guest's own IOMMU driver would, through these vIOMMU front ends: virtio-iommu "
                   "and vtd (a notification per batch), vtd-each and papr (one per event)")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(CLI::IsMember({"virtio-iommu", "vtd", "vtd-each", "papr"}));
  replay->add_option("--batch", arguments->batch_max, "Most events that are submitted together")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  replay->add_option("--events", arguments->events_max, "Replay only the first N events (0: all)")
      ->capture_default_str();
  replay
      ->add_option("--rounds", arguments->rounds,
                   "Replay everything N times in turn, count each stretch of some hundred events with its fastest time")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  replay->add_option("--memory", arguments->memory_mib_max, "Most memory to map, in MiB")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  replay->add_flag("--verify,!--no-verify", arguments->verify,
                   "Compare with the reference after every batch (default)");
  replay->add_flag("--measure,!--no-measure", arguments->measure,
                   "With auto and iommufd: measure this host's interfaces once per boot, and choose by it (default)");
  replay->add_flag("--compare", arguments->compare,
                   "Everything side by side, not verified: --backend iommufd,type1,auto, and as --baseline both loops, "
                   "the engine strict and relaxed; either may be given");
  replay->add_flag("--stats", arguments->stats, "Publish the engine's counters, for 'iovane top' in another terminal");
  replay->add_flag("--json", arguments->json, "Print one JSON object");
  replay->callback([&run, arguments, backend, baseline] {
    if (arguments->compare) {
      arguments->verify = false;
      if (backend->empty()) arguments->backends = {"iommufd", "type1", "auto"};
      if (baseline->empty())
        arguments->targets = {"leaf", "leaf-copy", "event", "event-copy", "engine", "engine-relaxed"};
    }
    run = [arguments] { return run_replay(*arguments); };
  });
}

}  // namespace iovane::cli
