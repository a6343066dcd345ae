#include "cli/probe_command.hpp"

#include <fmt/format.h>

#include <memory>

#include "backends/model/model_kernel.hpp"
#include "backends/probe.hpp"
#include "backends/system_kernel.hpp"
#include "cli/probe_report.hpp"

namespace iovane::cli {
namespace {

struct Arguments {
  bool json = false;
  bool attach = true;
  bool model = false;
  std::string measure = "when-new";
};

ExitStatus run_probe(const Arguments& arguments) {
  std::unique_ptr<backends::Kernel> kernel = std::make_unique<backends::SystemKernel>();
  if (arguments.model) {
    auto model = backends::model::ModelKernel::create();
    if (!model) return report(model.error());
    kernel = *std::move(model);
  }
  using Measure = backends::ProbeOptions::Measure;
  backends::ProbeOptions options{.attach_devices = arguments.attach};
  // --no-attach promises to open nothing but device nodes, and the software IOMMU's numbers are not this host's.
  options.measure = arguments.measure == "always"     ? Measure::always
                    : arguments.measure == "when-new" ? Measure::when_new
                    : arguments.measure == "cached"   ? Measure::cached
                                                      : Measure::never;
  if (options.measure != Measure::never && (!arguments.attach || arguments.model)) options.measure = Measure::cached;
  if (arguments.model && arguments.measure == "always") options.measure = Measure::always;
  const auto host = backends::probe_host(*kernel, options);
  if (!host) return report(host.error());
  if (arguments.json)
    fmt::print("{}\n", probe_json(*host).dump(2));
  else
    fmt::print("{}", probe_text(*host));
  return ExitStatus::ok;
}

}  // namespace

void add_probe_command(CLI::App& app, std::function<ExitStatus()>& run) {
  auto arguments = std::make_shared<Arguments>();
  CLI::App* const probe = app.add_subcommand("probe", "Say what this host offers, and what 'auto' picks and why");
  probe->add_flag("--json", arguments->json, "Print one JSON object");
  probe->add_flag("--attach,!--no-attach", arguments->attach,
                  "Attach idle devices to learn their ranges and page sizes, which resets them (default)");
  probe->add_flag("--model", arguments->model, "Probe the software IOMMU instead of this host");
  probe
      ->add_option("--measure", arguments->measure,
                   "Time maps and unmaps on each interface to choose between them: never, cached (what is on file), "
                   "when-new (once per boot), always")
      ->check(CLI::IsMember({"never", "cached", "when-new", "always"}))
      ->capture_default_str();
  probe->callback([&run, arguments] { run = [arguments] { return run_probe(*arguments); }; });
}

}  // namespace iovane::cli
