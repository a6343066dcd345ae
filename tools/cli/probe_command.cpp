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
};

ExitStatus run_probe(const Arguments& arguments) {
  std::unique_ptr<backends::Kernel> kernel = std::make_unique<backends::SystemKernel>();
  if (arguments.model) {
    auto model = backends::model::ModelKernel::create();
    if (!model) return report(model.error());
    kernel = *std::move(model);
  }
  const auto host = backends::probe_host(*kernel, {.attach_devices = arguments.attach});
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
  probe->callback([&run, arguments] { run = [arguments] { return run_probe(*arguments); }; });
}

}  // namespace iovane::cli
