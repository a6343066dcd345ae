#include "replay/front_end_target.hpp"

#include <algorithm>
#include <utility>
#include <vector>

#include "base/error_text.hpp"
#include "engine/engine_core.hpp"

namespace iovane::replay {
namespace {

constexpr std::size_t operations_at_once = 64;

}  // namespace

Result<std::unique_ptr<FrontEndTarget>> FrontEndTarget::open(std::string_view name, Host& host,
                                                             const GuestMemory& memory, std::size_t batch_max) {
  std::unique_ptr<FrontEndTarget> target{new FrontEndTarget};
  if (auto opened = target->open_host(host, memory); !opened) return opened.error();
  if (name == "virtio-iommu") {
    target->guest_ = make_virtio_iommu_guest(target->memory_, batch_max);
  } else if (name == "vtd" || name == "vtd-each") {
    target->guest_ = make_vtd_guest(target->memory_, *target->tables_, name == "vtd-each");
  } else if (name == "papr") {
    target->guest_ = make_papr_guest(target->memory_, *target->tables_);
  } else {
    return base::fail(Errc::invalid_argument, Stage::open, 0,
                      "there is no front end '{}'; there are: virtio-iommu, "
                      "vtd, vtd-each, papr",
                      name);
  }
  if (auto attached = target->guest_->attach(*target->target_); !attached) return attached.error();
  return target;
}

FrontEndTarget::~FrontEndTarget() {
  if (guest_ != nullptr && target_ != nullptr) static_cast<void>(guest_->detach(*target_));
}

Result<void> FrontEndTarget::open_host(Host& host, const GuestMemory& memory) {
  auto backend = host.open_backend(host.kernel());
  if (!backend) return backend.error();
  engine_ = EngineAccess::open(*std::move(backend), host.backend());
  AddressSpaceConfig config;
  config.name = "replay";
  config.layout = LayoutPolicy::fixed;  // a guest chooses its IOVAs
  auto space = engine_.create_address_space(config);
  if (!space) return space.error();
  space_ = *std::move(space);
  if (const auto attached = space_.attach({.pci_address = host.device()}); !attached) return attached.error();
  // The target hears of the memory for I/O only: devices have no business in the guest's tables, so nothing pins them.
  viommu::RegionConfig ram;
  ram.gpa = guest_ram_start;
  ram.length = memory.size();
  ram.address = memory.data();
  if (const auto added = memory_.add(ram); !added) return added.error();
  auto target = viommu::EngineTarget::create(space_, memory_);
  if (!target) return target.error();
  target_ = *std::move(target);
  auto tables = GuestTables::create();
  if (!tables) return tables.error();
  tables_ = *std::move(tables);
  viommu::RegionConfig built;
  built.length = Bytes{GuestTables::bytes};
  built.address = tables_->data();
  if (const auto added = memory_.add(built); !added) return added.error();
  return {};
}

void FrontEndTarget::prepare(std::span<const Operation> batch) noexcept {
  guest_->write(batch.first(std::min(operations_at_once, batch.size())));
  prepared_ = true;
}

void FrontEndTarget::run(std::span<const Operation> batch, std::span<Verdict> verdicts) noexcept {
  for (std::size_t first = 0; first < batch.size(); first += operations_at_once) {
    const auto part = batch.subspan(first, std::min(operations_at_once, batch.size() - first));
    if (!std::exchange(prepared_, false)) guest_->write(part);
    guest_->notify(part, verdicts.subspan(first, part.size()));
  }
}

Result<Bytes> FrontEndTarget::unmap_all() noexcept {
  Bytes live{};
  space_.for_each(IovaRange::everything(), [&](const MappingInfo& mapping) {
    live.value += mapping.range.length().value;
    return true;
  });
  if (const auto gone = guest_->detach(*target_); !gone) return gone.error();
  return live;
}

bool FrontEndTarget::visit_index(const Visit& visit) const {
  space_.for_each(IovaRange::everything(), [&](const MappingInfo& mapping) {
    visit(mapping.range, mapping.memory.offset);
    return true;
  });
  return true;
}

}  // namespace iovane::replay
