#include "engine/engine_core.hpp"

#include <cstdlib>
#include <string_view>
#include <utility>

#include "backends/model/model_kernel.hpp"
#include "backends/open.hpp"
#include "backends/probe.hpp"
#include "backends/system_kernel.hpp"
#include "base/error_text.hpp"
#include "engine/out_of_memory.hpp"

namespace iovane {

namespace {

using engine::EngineCore;

constexpr std::string_view model_name = "model";

// "model" alone imitates iommufd.
Result<std::shared_ptr<EngineCore>> open_model(std::string_view name, std::string reason, const WorkerConfig& workers) {
  backends::BackendChoice choice;
  choice.name = name.size() > model_name.size() ? std::string{name.substr(model_name.size() + 1)} : "iommufd";
  backends::model::ModelOptions options;
  if (choice.name == backends::to_string(backends::Interface::stage1))
    options.iommus.front().nesting = backends::model::Nesting::smmuv3;
  auto kernel = backends::model::ModelKernel::create(options);
  if (!kernel) return kernel.error();
  auto backend = backends::open_backend(**kernel, choice);
  if (!backend) return backend.error();
  return std::make_shared<EngineCore>(*std::move(kernel), *std::move(backend), std::string{name}, std::move(reason),
                                      workers);
}

Result<std::shared_ptr<EngineCore>> open_system(backends::BackendChoice choice, std::string reason,
                                                const WorkerConfig& workers, Bytes copy_from = {}) {
  auto kernel = std::make_unique<backends::SystemKernel>();
  auto backend = backends::open_backend(*kernel, choice);
  if (!backend) return backend.error();
  std::string name{backends::to_string((*backend)->interface())};
  return std::make_shared<EngineCore>(std::move(kernel), *std::move(backend), std::move(name), std::move(reason),
                                      workers, copy_from);
}

std::string environment(const char* name) {
  const char* const value = ::secure_getenv(name);
  return value != nullptr ? value : "";
}

Result<backends::ProbeOptions::Measure> measure_mode(AutoMeasure configured) {
  using Measure = backends::ProbeOptions::Measure;
  const std::string name = environment("IOVANE_MEASURE");
  if (name == "never") return Measure::never;
  if (name == "cached") return Measure::cached;
  if (name == "when-new") return Measure::when_new;
  if (name == "always") return Measure::always;
  if (!name.empty())
    return base::fail(Errc::invalid_argument, Stage::open, 0,
                      "IOVANE_MEASURE is \"{}\"; it can be never, cached, when-new or always", name);
  switch (configured) {
    case AutoMeasure::never: return Measure::never;
    case AutoMeasure::cached: return Measure::cached;
    case AutoMeasure::when_new: return Measure::when_new;
    case AutoMeasure::always: return Measure::always;
  }
  return Measure::never;
}

Result<std::shared_ptr<EngineCore>> open_auto(const EngineConfig& config) {
  backends::SystemKernel kernel;
  backends::ProbeOptions options;
  options.attach_devices = false;
  options.ask_nesting = true;
  const auto mode = measure_mode(config.measure);
  if (!mode) return mode.error();
  options.measure = *mode;
  options.measurement_file = config.measurement_file;
  const auto report = backends::probe_host(kernel, options);
  if (!report) return report.error();
  if (!report->choice) return open_model(model_name, report->why, config.workers);
  backends::BackendChoice choice;
  choice.name = backends::to_string(*report->choice);
  std::string reason = report->why;
  if (!report->measurement) reason += "; not measured: " + report->not_measured;
  return open_system(std::move(choice), std::move(reason), config.workers,
                     report->measurement ? report->measurement->copy_from() : Bytes{});
}

/// For iommufd by name: which lengths are copied, as measured. Who names an interface did not ask for devices to be
/// opened, so only Measure::always makes a measurement here. Nothing fails for want of one.
Result<Bytes> measured_copy_from(const EngineConfig& config) {
  backends::ProbeOptions options;
  options.attach_devices = false;
  const auto mode = measure_mode(config.measure);
  if (!mode) return mode.error();
  using Measure = backends::ProbeOptions::Measure;
  if (*mode == Measure::never) return Bytes{};
  options.measure = *mode == Measure::always ? Measure::always : Measure::cached;
  options.measurement_file = config.measurement_file;
  backends::SystemKernel kernel;
  const auto report = backends::probe_host(kernel, options);
  return report && report->measurement ? report->measurement->copy_from() : Bytes{};
}

Result<std::shared_ptr<EngineCore>> open_core(const EngineConfig& config);

/// With IOVANE_BACKEND in the place of "auto", where nothing else says what is wanted.
Result<std::shared_ptr<EngineCore>> open_by_environment(const EngineConfig& config) {
  const std::string wanted = environment("IOVANE_BACKEND");
  if (config.backend != "auto" || config.iommu_fd >= 0 || config.container_fd >= 0 || wanted.empty() ||
      wanted == "auto")
    return open_core(config);
  EngineConfig named = config;
  named.backend = wanted;
  return open_core(named);
}

Result<std::shared_ptr<EngineCore>> open_core(const EngineConfig& config) {
  const bool wants_iommu = config.iommu_fd >= 0;
  const bool wants_container = config.container_fd >= 0;
  if (wants_iommu && wants_container)
    return make_error(Errc::invalid_argument, Stage::open,
                      "both an iommufd and a container descriptor were given; an engine uses one backend, open two");
  const std::string_view name = config.backend;
  if (name == model_name || name.starts_with("model:")) {
    if (wants_iommu || wants_container)
      return make_error(Errc::invalid_argument, Stage::open,
                        "a descriptor was given, but the software IOMMU uses none; name the kernel's interface");
    return open_model(name, "it was asked for by name", config.workers);
  }
  if (name == "auto" && !wants_iommu && !wants_container) return open_auto(config);

  backends::BackendChoice choice;
  choice.name = name == "auto" ? (wants_iommu ? "iommufd" : "type1") : config.backend;
  const bool on_iommu = choice.name == "iommufd" || choice.name == "stage1" || choice.name.starts_with("compat");
  if ((wants_iommu && !on_iommu) || (wants_container && on_iommu))
    return base::fail(Errc::invalid_argument, Stage::open, 0,
                      "the descriptor that was given does not belong to backend \"{}\": iommufd and compat use "
                      "iommu_fd, type1 uses container_fd",
                      choice.name);
  choice.descriptor.fd = wants_iommu ? config.iommu_fd : config.container_fd;
  choice.descriptor.duplicate = config.descriptors == DescriptorUse::duplicate;
  Bytes copy_from{};
  if (choice.name == "iommufd" && !wants_iommu) {  // with a descriptor handed in, no path is opened
    const auto measured = measured_copy_from(config);
    if (!measured) return measured.error();
    copy_from = *measured;
  }
  return open_system(std::move(choice),
                     name == "auto" ? "a descriptor of it was handed in" : "it was asked for by name", config.workers,
                     copy_from);
}

}  // namespace

Result<Engine> Engine::open(const EngineConfig& config) {
  return engine::or_out_of_memory(Stage::open, [&]() -> Result<Engine> {
    std::unique_ptr<engine::StatsPage> stats_page;
    if (!config.stats_page.empty()) {
      auto made = engine::StatsPage::create(config.stats_page);
      if (!made) return made.error();
      stats_page = *std::move(made);
    }
    auto core = open_by_environment(config);
    if (!core) return core.error();
    (*core)->publish(std::move(stats_page));
    (*core)->pins().configure(config.pins, config.userfault_fd);
    return Engine{*std::move(core)};
  });
}

Engine EngineAccess::open(std::unique_ptr<backends::Backend> backend, std::string name, WorkerConfig workers,
                          std::unique_ptr<engine::StatsPage> stats_page, Bytes copy_from) {
  auto core = std::make_shared<EngineCore>(nullptr, std::move(backend), std::move(name), "it was handed in",
                                           std::move(workers), copy_from);
  core->publish(std::move(stats_page));
  return Engine{std::move(core)};
}

}  // namespace iovane
