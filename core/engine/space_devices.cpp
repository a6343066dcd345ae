// Devices at work: a device moves from one address space to another, and a device waits for a page.
#include <functional>
#include <utility>

#include "base/error_text.hpp"
#include "engine/engine_core.hpp"
#include "engine/out_of_memory.hpp"
#include "engine/space_core.hpp"

namespace iovane::engine {

using base::fail;

namespace {

/// Holds two lanes, always in the same order, so that opposite moves cannot wait for each other.
class TwoLanes {
 public:
  TwoLanes(Lane& a, Lane& b) noexcept
      : first_{std::less<Lane*>{}(&a, &b) ? a : b}, second_{std::less<Lane*>{}(&a, &b) ? b : a} {
    first_.hold();
    second_.hold();
  }
  ~TwoLanes() {
    second_.leave();
    first_.leave();
  }
  TwoLanes(const TwoLanes&) = delete;
  TwoLanes& operator=(const TwoLanes&) = delete;

 private:
  Lane& first_;
  Lane& second_;
};

}  // namespace

Result<DeviceInfo> SpaceCore::move_device(std::uint32_t device_id, SpaceCore& to, AddressSpace::Gap gap) {
  auto moved = move_device_now(device_id, to, gap);
  if (moved) to.devices_came();
  return moved;
}

Result<DeviceInfo> SpaceCore::move_device_now(std::uint32_t device_id, SpaceCore& to, AddressSpace::Gap gap) {
  if (&to == this || engine_ != to.engine_)
    return make_error(Errc::invalid_argument, Stage::attach,
                      "a device moves between two different address spaces of one engine");
  const TwoLanes held{lane_, to.lane_};
  if (state_.closed || to.state_.closed) return closed_error();
  backends::Backend& backend = engine_->backend();
  const auto known = device_names_.find(device_id);
  if (known == device_names_.end())
    return fail(Errc::not_found, Stage::detach, 0, "device {} is not attached to this address space", device_id);
  const backends::DeviceSource source = known->second;
  DeviceNames::node_type named = named_device(source);
  if (const auto expected = to.expect_device(source); !expected) return expected.error();
  auto moved = or_out_of_memory(Stage::attach, [&] {
    return backend.move_device(*state_.backend, backends::DeviceId{device_id}, *to.state_.backend);
  });
  if (!moved) to.layout_->forget(name_of(source));
  if (moved) {
    if (const auto fits = to.refresh_usable(); !fits) {
      to.layout_->forget(name_of(source));
      const auto back = or_out_of_memory(
          Stage::attach, [&] { return backend.move_device(*to.state_.backend, moved->id, *state_.backend); });
      (void)to.refresh_usable();
      device_names_.erase(device_id);
      if (back) {
        name_device(std::move(named), back->id);
        return fits.error();
      }
      to.name_device(std::move(named), moved->id);
      return fail(fits.error().code, Stage::attach, fits.error().os_errno,
                  "{}; and the device could not go back ({}), so it stays in the address space it was moved to",
                  fits.error().detail(), back.error().detail());
    }
    layout_->forget(name_of(source));
    to.name_device(std::move(named), moved->id);
    device_names_.erase(device_id);
    return to.moved_in(*std::move(moved), *this);
  }
  if (moved.error().code != Errc::unsupported || gap == AddressSpace::Gap::refuse) return moved.error();
  return move_with_gap(device_id, to);
}

// Both lanes are held. The target's ranges are known to fit.
Result<DeviceInfo> SpaceCore::moved_in(backends::AttachedDevice device, SpaceCore& from) {
  refresh_facts();
  from.refresh_facts();
  (void)from.refresh_usable();  // a device less takes nothing away
  return DeviceInfo{device.id.value, std::move(device.name), device.device_fd, std::move(device.reserved)};
}

// Out and in again, by the device's name.
Result<DeviceInfo> SpaceCore::move_with_gap(std::uint32_t device_id, SpaceCore& to) {
  const auto name = device_names_.find(device_id);
  if (name == device_names_.end())
    return fail(Errc::not_found, Stage::detach, 0, "device {} is not attached to this address space", device_id);
  const backends::DeviceSource source = name->second;
  DeviceNames::node_type named = named_device(source);
  if (const auto expected = to.expect_device(source); !expected) return expected.error();
  if (const auto detached = release_device(backends::DeviceId{device_id}); !detached) {
    to.layout_->forget(name_of(source));
    return detached.error();
  }
  device_names_.erase(name);
  auto attached = or_out_of_memory(Stage::attach, [&] { return to.state_.backend->attach(source); });
  Error refused = attached.error();
  if (attached) {
    if (const auto fits = to.refresh_usable(); !fits) {
      refused = fits.error();
      (void)to.state_.backend->detach(attached->id);
      (void)to.refresh_usable();
    }
  }
  if (!refused) {
    layout_->forget(name_of(source));
    to.name_device(std::move(named), attached->id);
    return to.moved_in(*std::move(attached), *this);
  }
  to.layout_->forget(name_of(source));
  const auto back = or_out_of_memory(Stage::attach, [&] { return state_.backend->attach(source); });
  if (!back) layout_->forget(name_of(source));
  if (back) name_device(std::move(named), back->id);
  refresh_facts();
  (void)refresh_usable();
  if (back)
    return fail(refused.code, Stage::attach, refused.os_errno, "{}; the device is back where it was, as device {}",
                refused.detail(), back->id.value);
  return fail(refused.code, Stage::attach, refused.os_errno,
              "{}; going back failed too ({}), so the device is attached nowhere", refused.detail(),
              back.error().detail());
}

std::string name_of(const backends::DeviceSource& source) {
  if (!source.pci_address.empty()) return source.pci_address;
  return source.cdev_fd >= 0 ? fmt::format("cdev fd {}", source.cdev_fd) : fmt::format("group fd {}", source.group_fd);
}

Result<void> SpaceCore::expect_device(const backends::DeviceSource& source) {
  return layout_->expect(name_of(source), engine_->backend().reserved_by(source), state_.index);
}

Result<GuestLayout> SpaceCore::guest_layout() {
  const LaneHold held{lane_};
  if (state_.closed) return closed_error();
  if (const auto fresh = read_usable(); !fresh) return fresh.error();
  auto layout = layout_->show();
  if (layout) state_.usable = layout_->usable();
  return layout;
}

Result<std::vector<LayoutBreach>> SpaceCore::check_layout() {
  const LaneHold held{lane_};
  if (state_.closed) return closed_error();
  return read_usable();
}

int SpaceCore::page_fault_fd() noexcept {
  const LaneHold held{lane_};
  return state_.closed ? -1 : state_.backend->page_fault_fd();
}

Result<std::size_t> SpaceCore::read_page_faults(std::span<PageFaultEvent> out) noexcept {
  const LaneHold held{lane_};
  if (state_.closed) return closed_error();
  for (std::size_t filled = 0; filled < out.size();) {
    backends::PageFault fault;
    const auto got = state_.backend->read_page_faults({&fault, 1});
    if (!got && filled == 0) return got.error();
    if (!got || *got == 0) return filled;
    out[filled++] = {fault.device,     fault.address, fault.length, fault.access, fault.execute,
                     fault.privileged, fault.pasid,   fault.group,  fault.last,   fault.cookie};
  }
  return out.size();
}

Result<void> SpaceCore::answer_page_fault(const PageFaultEvent& event, PageFaultAnswer answer) noexcept {
  const LaneHold held{lane_};
  if (state_.closed) return closed_error();
  return state_.backend->answer_page_fault(event.cookie, answer == PageFaultAnswer::retry);
}

int SpaceCore::fault_record_fd() noexcept {
  const LaneHold held{lane_};
  return state_.closed ? -1 : state_.backend->fault_record_fd();
}

Result<std::size_t> SpaceCore::read_fault_records(std::span<FaultRecord> out) noexcept {
  const LaneHold held{lane_};
  if (state_.closed) return closed_error();
  return state_.backend->read_fault_records(out);
}

}  // namespace iovane::engine
