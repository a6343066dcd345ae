// AddressSpace::error_handling(). A reset takes seconds, so its calls run beside batches; close() waits for them.
#include "iovane/error_handling.hpp"

#include "backends/spapr_tce/spapr_control.hpp"
#include "engine/space_core.hpp"

namespace iovane {

using backends::SpaprEeh;

namespace engine {

Result<void> SpaceCore::recover(const std::function<Result<void>(SpaprEeh&)>& call) {
  const std::lock_guard recovering{recovery_lock_};  // it stays open
  SpaprEeh* eeh = nullptr;
  {
    const LaneHold held{lane_};
    const auto control = spapr();
    if (!control) return control.error();
    eeh = (*control)->eeh();
  }
  if (eeh == nullptr)
    return make_error(Errc::unsupported, Stage::query,
                      "this kernel offers no error handling (EEH) for the container, or no device is attached");
  return call(*eeh);
}

}  // namespace engine

Result<ErrorHandling> AddressSpace::error_handling() const {
  if (const auto there = core_->recover([](SpaprEeh&) { return Result<void>{}; }); !there) return there.error();
  return ErrorHandling{core_};
}

Result<EehState> ErrorHandling::state() const {
  EehState now = EehState::unavailable;
  const auto asked = core_->recover([&](SpaprEeh& eeh) -> Result<void> {
    const auto answer = eeh.state();
    if (!answer) return answer.error();
    now = *answer;
    return {};
  });
  if (!asked) return asked.error();
  return now;
}

Result<EehEvent> ErrorHandling::check() {
  const auto now = state();
  if (!now) return now.error();
  const EehEvent event{std::exchange(seen_, *now), *now};
  if (event.before != event.now && listener_) listener_(event);
  return event;
}

Result<void> ErrorHandling::enable() const {
  return core_->recover([](SpaprEeh& eeh) { return eeh.enable(); });
}
Result<void> ErrorHandling::disable() const {
  return core_->recover([](SpaprEeh& eeh) { return eeh.disable(); });
}
Result<void> ErrorHandling::unfreeze_io() const {
  return core_->recover([](SpaprEeh& eeh) { return eeh.unfreeze_io(); });
}
Result<void> ErrorHandling::unfreeze_dma() const {
  return core_->recover([](SpaprEeh& eeh) { return eeh.unfreeze_dma(); });
}
Result<void> ErrorHandling::assert_reset(EehReset kind) const {
  return core_->recover([kind](SpaprEeh& eeh) { return eeh.assert_reset(kind); });
}
Result<void> ErrorHandling::deactivate_reset() const {
  return core_->recover([](SpaprEeh& eeh) { return eeh.deactivate_reset(); });
}
Result<void> ErrorHandling::configure() const {
  return core_->recover([](SpaprEeh& eeh) { return eeh.configure(); });
}
Result<void> ErrorHandling::reset(EehReset kind) const {
  return core_->recover([kind](SpaprEeh& eeh) { return eeh.reset(kind); });
}
Result<void> ErrorHandling::inject(const EehInjection& error) const {
  return core_->recover([&](SpaprEeh& eeh) { return eeh.inject(error); });
}

}  // namespace iovane
