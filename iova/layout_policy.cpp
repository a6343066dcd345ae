#include "iova/layout_policy.hpp"

#include <algorithm>

#include "base/error_text.hpp"

namespace iovane::iova {
namespace {

std::vector<IovaRange> all_reserved(std::span<const DeviceReservations> devices) {
  std::vector<IovaRange> all;
  for (const DeviceReservations& d : devices) all.insert(all.end(), d.reserved.begin(), d.reserved.end());
  return all;
}

std::optional<IovaRange> malformed_in(std::span<const IovaRange> ranges) {
  const auto bad = std::find_if(ranges.begin(), ranges.end(), [](const IovaRange& r) { return !r.well_formed(); });
  return bad == ranges.end() ? std::nullopt : std::optional{*bad};
}

// The first of the device's reserved ranges that meets `ground`, and the range of `ground` that it meets.
std::optional<LayoutRefusal> conflict(const DeviceReservations& device, std::span<const IovaRange> ground,
                                      LayoutRefusal::Against against) {
  for (const IovaRange& reserved : device.reserved)
    for (const IovaRange& other : ground)
      if (reserved.overlaps(other)) return LayoutRefusal{device.name, reserved, against, other};
  return std::nullopt;
}

Error refusal_error(const LayoutRefusal& refusal, Stage stage) {
  return base::fail(Errc::iova_reserved, stage, 0, "{}", refusal.text());
}

std::vector<ExportedHole> holes_of(const UsableRanges& layout, std::span<const DeviceReservations> devices) {
  std::vector<ExportedHole> holes;
  const UsableRanges unusable = layout.complement();
  for (const IovaRange& range : unusable.ranges()) {
    ExportedHole hole{range, {}};
    for (const DeviceReservations& d : devices)
      if (std::any_of(d.reserved.begin(), d.reserved.end(), [&](const IovaRange& r) { return r.overlaps(range); }))
        hole.devices.push_back(d.name);
    holes.push_back(std::move(hole));
  }
  return holes;
}

}  // namespace

std::string LayoutRefusal::text() const {
  const auto [r, o] = std::pair{reserved, other};
  switch (against) {
    case Against::live_mapping:
      return fmt::format(
          "device {} reserves [{:#x}, {:#x}], but [{:#x}, {:#x}] is mapped; unmap it or leave the device out", device,
          r.start.value, r.last.value, o.start.value, o.last.value);
    case Against::promise:
      return fmt::format(
          "device {} reserves [{:#x}, {:#x}], but the fixed layout promises [{:#x}, {:#x}]; use a layout without that "
          "range or leave the device out",
          device, r.start.value, r.last.value, o.start.value, o.last.value);
    case Against::layout:
      return fmt::format(
          "device {} reserves [{:#x}, {:#x}], but the guest was shown [{:#x}, {:#x}] as usable; restart the guest with "
          "the device present or leave it out",
          device, r.start.value, r.last.value, o.start.value, o.last.value);
    case Against::aperture: break;
  }
  return fmt::format("this host cannot translate [{:#x}, {:#x}] of [{:#x}, {:#x}]; choose a layout inside its aperture",
                     r.start.value, r.last.value, o.start.value, o.last.value);
}

Result<LayoutPolicy> LayoutPolicy::create(LayoutConfig config) {
  const bool fixed = config.layout == Layout::fixed;
  if (fixed == config.promised.empty())
    return base::fail(Errc::invalid_argument, Stage::validate, 0, "{}",
                      fixed ? "a fixed layout needs the ranges that it promises"
                            : "promised ranges make sense only with a fixed layout");
  for (const auto* list : {&config.aperture, &config.promised})
    if (const auto bad = malformed_in(*list))
      return base::fail(Errc::invalid_argument, Stage::validate, 0, "range [{:#x}, {:#x}] ends before it starts",
                        bad->start.value, bad->last.value);

  LayoutPolicy policy;
  policy.layout_ = config.layout;
  policy.aperture_ = UsableRanges{config.aperture};
  for (DeviceReservations& device : config.devices) {
    if (const auto bad = malformed_in(device.reserved))
      return base::fail(Errc::invalid_argument, Stage::validate, 0,
                        "device {}: reserved range [{:#x}, {:#x}] ends before it starts", device.name, bad->start.value,
                        bad->last.value);
    if (std::any_of(policy.devices_.begin(), policy.devices_.end(),
                    [&](const DeviceReservations& d) { return d.name == device.name; }))
      return base::fail(Errc::invalid_argument, Stage::validate, 0, "device {} is listed twice", device.name);
    policy.devices_.push_back(std::move(device));
  }
  if (fixed) {
    policy.base_ = UsableRanges{config.promised};
    for (const IovaRange& range : policy.base_.ranges())
      if (const auto missing = policy.aperture_.first_missing(range))
        return refusal_error({"", *missing, LayoutRefusal::Against::aperture, range}, Stage::validate);
    for (const DeviceReservations& device : policy.devices_)
      if (const auto refusal = conflict(device, policy.base_.ranges(), LayoutRefusal::Against::promise))
        return refusal_error(*refusal, Stage::validate);
  } else if (config.layout == Layout::host_constrained) {
    policy.base_ = policy.aperture_.without(all_reserved(policy.devices_));
    policy.holes_ = holes_of(policy.base_, policy.devices_);
  }
  policy.refresh();
  if (policy.usable_.empty())
    return base::fail(Errc::invalid_argument, Stage::validate, 0,
                      "no address is usable: the devices reserve everything that the host translates");
  return policy;
}

// engine_managed follows the devices; the two others keep to what they said, less what the host took away.
void LayoutPolicy::refresh() {
  usable_ = layout_ == Layout::engine_managed ? aperture_.without(all_reserved(devices_))
                                              : base_.common_with(aperture_).without(all_reserved(devices_));
}

std::optional<UsableRanges> LayoutPolicy::promise() const {
  if (layout_ == Layout::engine_managed) return std::nullopt;
  return base_;
}

std::vector<ExportedHole> LayoutPolicy::exported_holes() const {
  if (layout_ == Layout::host_constrained) return holes_;
  return holes_of(layout_ == Layout::fixed ? base_ : usable_, devices_);
}

std::optional<LayoutRefusal> LayoutPolicy::refuses(const DeviceReservations& device,
                                                   std::span<const IovaRange> live) const {
  // A live mapping is the nearer reason: it can be removed, the layout cannot.
  if (auto refusal = conflict(device, live, LayoutRefusal::Against::live_mapping)) return refusal;
  if (layout_ == Layout::fixed) return conflict(device, base_.ranges(), LayoutRefusal::Against::promise);
  if (layout_ == Layout::host_constrained) return conflict(device, base_.ranges(), LayoutRefusal::Against::layout);
  return std::nullopt;
}

Result<void> LayoutPolicy::attach(DeviceReservations device, std::span<const IovaRange> live) {
  if (const auto bad = malformed_in(device.reserved))
    return base::fail(Errc::invalid_argument, Stage::attach, 0,
                      "device {}: reserved range [{:#x}, {:#x}] ends before it starts", device.name, bad->start.value,
                      bad->last.value);
  if (std::any_of(devices_.begin(), devices_.end(), [&](const DeviceReservations& d) { return d.name == device.name; }))
    return base::fail(Errc::busy, Stage::attach, 0, "device {} is attached already", device.name);
  if (const auto refusal = refuses(device, live)) return refusal_error(*refusal, Stage::attach);
  devices_.push_back(std::move(device));
  refresh();
  return {};
}

Result<void> LayoutPolicy::detach(const std::string& name) {
  const auto found =
      std::find_if(devices_.begin(), devices_.end(), [&](const DeviceReservations& d) { return d.name == name; });
  if (found == devices_.end()) return base::fail(Errc::not_found, Stage::detach, 0, "device {} is not attached", name);
  devices_.erase(found);
  refresh();
  return {};
}

std::vector<LayoutRefusal> LayoutPolicy::host_says(std::span<const IovaRange> ranges, std::span<const IovaRange> live) {
  aperture_ = UsableRanges{ranges};
  refresh();
  std::vector<LayoutRefusal> broken;
  if (layout_ != Layout::engine_managed) {
    for (const IovaRange& range : base_.ranges())
      if (const auto missing = usable_.first_missing(range))
        broken.push_back({"", *missing, LayoutRefusal::Against::aperture, range});
  }
  // A mapping beside a fixed layout's promise needs only what the host offers.
  const UsableRanges reachable = layout_ == Layout::fixed ? aperture_.without(all_reserved(devices_)) : usable_;
  for (const IovaRange& mapping : live)
    if (const auto missing = reachable.first_missing(mapping))
      broken.push_back({"", *missing, LayoutRefusal::Against::aperture, mapping});
  return broken;
}

}  // namespace iovane::iova
