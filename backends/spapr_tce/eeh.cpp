#include "backends/spapr_tce/eeh.hpp"

#include <cerrno>

#include "backends/kernel_call.hpp"
#include "backends/uapi/vfio.hpp"
#include "base/error_text.hpp"
#include "base/os_error.hpp"

namespace iovane {

std::string_view to_string(EehState state) noexcept {
  switch (state) {
    case EehState::normal: return "normal";
    case EehState::reset: return "reset";
    case EehState::stopped: return "stopped";
    case EehState::stopped_dma: return "stopped_dma";
    case EehState::unavailable: return "unavailable";
  }
  return "unknown";
}

}  // namespace iovane

namespace iovane::backends {

namespace vfio = uapi::vfio;

Result<long> SpaprEeh::operate(std::uint32_t op, const char* name, const EehInjection* error) {
  vfio::EehPeOp call{.op = op};
  if (error != nullptr)
    call.err = {.type = error->wide ? 1U : 0U, .func = error->function, .addr = error->address, .mask = error->mask};
  const long answer = kernel_.ioctl(container_, vfio::EehPeOp::request, &call);
  if (answer >= 0) return answer;
  const int why = static_cast<int>(-answer);
  if (why == ENODEV)
    return base::fail(Errc::no_device, Stage::query, why,
                      "EEH {}: the container has no partitionable endpoint with a device opened from it", name);
  return base::fail(base::errc_from_errno(why), Stage::query, why, "EEH {} failed with errno {}", name, why);
}

Result<void> SpaprEeh::command(std::uint32_t op, const char* name) {
  const auto done = operate(op, name);
  if (!done) return done.error();
  if (*done == 0) return {};
  return base::fail(Errc::io_error, Stage::query, 0, "EEH {}: the platform answered {}", name, *done);
}

Result<void> SpaprEeh::enable() { return command(vfio::eeh_pe_enable, "enable"); }
Result<void> SpaprEeh::disable() { return command(vfio::eeh_pe_disable, "disable"); }
Result<void> SpaprEeh::unfreeze_io() { return command(vfio::eeh_pe_unfreeze_io, "unfreeze of registers"); }
Result<void> SpaprEeh::unfreeze_dma() { return command(vfio::eeh_pe_unfreeze_dma, "unfreeze of DMA"); }
Result<void> SpaprEeh::deactivate_reset() { return command(vfio::eeh_pe_reset_deactivate, "reset deactivation"); }
Result<void> SpaprEeh::configure() { return command(vfio::eeh_pe_configure, "configuration"); }

Result<void> SpaprEeh::assert_reset(EehReset kind) {
  return kind == EehReset::hot ? command(vfio::eeh_pe_reset_hot, "hot reset")
                               : command(vfio::eeh_pe_reset_fundamental, "fundamental reset");
}

Result<void> SpaprEeh::reset(EehReset kind) {
  if (const auto asserted = assert_reset(kind); !asserted) return asserted;
  if (const auto released = deactivate_reset(); !released) return released;
  return configure();
}

Result<void> SpaprEeh::inject(const EehInjection& error) {
  const auto done = operate(vfio::eeh_pe_inject_err, "error injection", &error);
  if (!done) return done.error();
  return {};
}

Result<EehState> SpaprEeh::state() {
  const auto answer = operate(vfio::eeh_pe_get_state, "state query");
  if (!answer) return answer.error();
  switch (*answer) {
    case vfio::eeh_pe_state_normal: return seen_ = EehState::normal;
    case vfio::eeh_pe_state_reset: return seen_ = EehState::reset;
    case vfio::eeh_pe_state_stopped: return seen_ = EehState::stopped;
    case vfio::eeh_pe_state_stopped_dma: return seen_ = EehState::stopped_dma;
    default: return seen_ = EehState::unavailable;
  }
}

Result<EehEvent> SpaprEeh::check() {
  const EehState before = seen_;
  const auto now = state();
  if (!now) return now.error();
  const EehEvent event{before, *now};
  if (event.before != event.now && listener_) listener_(event);
  return event;
}

}  // namespace iovane::backends
