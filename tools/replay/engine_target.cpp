#include "replay/engine_target.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <utility>

#include "base/error_text.hpp"
#include "engine/engine_core.hpp"

namespace iovane::replay {
namespace {

Verdict unfinished() noexcept {
  return {make_error(Errc::limit_reached, Stage::validate, "the queue was full, or did not finish in ten seconds"), {}};
}

}  // namespace

Result<std::unique_ptr<EngineTarget>> EngineTarget::open(Host& host, const GuestMemory& memory, std::size_t batch_max,
                                                         const EngineOptions& options) {
  std::unique_ptr<EngineTarget> target{new EngineTarget};
  auto backend = host.open_backend(host.kernel());
  if (!backend) return backend.error();
  std::unique_ptr<engine::StatsPage> stats_page;
  if (options.publish_stats) {
    auto made = engine::StatsPage::create("auto");
    if (!made) return made.error();
    stats_page = *std::move(made);
  }
  target->engine_ = EngineAccess::open(*std::move(backend), host.backend(), {}, std::move(stats_page));
  AddressSpaceConfig config;
  config.name = "replay";
  config.layout = LayoutPolicy::fixed;  // a guest chooses its IOVAs
  config.unmap = options.unmap;
  auto space = target->engine_.create_address_space(config);
  if (!space) return space.error();
  target->space_ = *std::move(space);
  const auto attached = target->space_.attach({.pci_address = host.device()});
  if (!attached) return attached.error();
  auto registered = target->space_.register_memory({.address = memory.data(), .length = memory.size()});
  if (!registered) return registered.error();
  target->memory_ = *std::move(registered);
  auto queue = target->space_.open_queue({.depth = static_cast<std::uint32_t>(batch_max)});
  if (!queue) return queue.error();
  target->queue_ = *std::move(queue);
  return target;
}

void EngineTarget::run(std::span<const Operation> batch, std::span<Verdict> verdicts) noexcept {
  MapRequest map;
  map.access = Access::read_write;
  map.placement.kind = Placement::Kind::fixed;
  map.memory.memory = memory_.id();
  UnmapRequest unmap;
  std::size_t staged = 0;
  for (; staged < batch.size(); ++staged) {
    const Operation& op = batch[staged];
    if (op.kind == trace::EventKind::map) {
      map.memory.offset = op.memory;
      map.memory.length = op.range.length();
      map.placement.at = op.range.start;
      map.user_data = staged;
      if (!queue_.stage(map)) break;
    } else {
      unmap.range = op.range;
      unmap.user_data = staged;
      if (!queue_.stage(unmap)) break;
    }
  }
  queue_.submit();
  // What has no completion by the end keeps this error.
  if (queue_.outstanding() != batch.size()) std::fill(verdicts.begin(), verdicts.end(), unfinished());
  std::array<Completion, 64> completions;
  while (queue_.outstanding() != 0) {
    const std::size_t count = queue_.wait(completions, 1, std::chrono::seconds{10});
    if (count == 0) {
      std::fill(verdicts.begin(), verdicts.end(), unfinished());
      return;
    }
    for (std::size_t i = 0; i < count; ++i)
      verdicts[completions[i].user_data] = {completions[i].error, completions[i].bytes};
  }
}

// A failure shows in the verification: what is quarantined is still reachable.
void EngineTarget::settle() noexcept { (void)space_.flush(); }

bool EngineTarget::visit_index(const Visit& visit) const {
  space_.for_each(IovaRange::everything(), [&](const MappingInfo& mapping) {
    visit(mapping.range, mapping.memory.offset);
    return true;
  });
  return true;
}

}  // namespace iovane::replay
