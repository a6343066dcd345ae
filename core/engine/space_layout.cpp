#include "engine/space_layout.hpp"

#include <algorithm>
#include <utility>

#include "base/error_text.hpp"

namespace iovane::engine {
namespace {

std::vector<IovaRange> list_of(std::span<const IovaRange> ranges) { return {ranges.begin(), ranges.end()}; }

// The live mappings that touch any of `ranges`.
std::vector<IovaRange> live_in(const MappingIndex& live, std::span<const IovaRange> ranges) {
  std::vector<IovaRange> found;
  for (const IovaRange& range : ranges)
    if (range.well_formed())
      live.for_each(range, [&](MappingId, const MappingRecord& record) {
        if (found.empty() || found.back() != record.range) found.push_back(record.range);
      });
  return found;
}

}  // namespace

Result<SpaceLayout> SpaceLayout::create(LayoutPolicy kind, std::span<const IovaRange> promised,
                                        std::span<const IovaRange> host) {
  iova::LayoutConfig config;
  config.aperture = host.empty() ? std::vector{IovaRange::everything()} : list_of(host);
  if (kind == LayoutPolicy::fixed && !promised.empty()) {
    config.layout = iova::Layout::fixed;
    config.promised = list_of(promised);
  } else if (!promised.empty()) {
    return make_error(Errc::invalid_argument, Stage::open, "promised ranges make sense only with LayoutPolicy::fixed");
  }
  auto policy = iova::LayoutPolicy::create(std::move(config));
  if (!policy) return policy.error();
  SpaceLayout layout{kind, *std::move(policy)};
  layout.host_ = list_of(host);
  layout.host_known_ = !host.empty();
  return layout;
}

Result<void> SpaceLayout::expect(const std::string& device, std::vector<IovaRange> reserved, const MappingIndex& live) {
  const std::vector<IovaRange> in_the_way = live_in(live, reserved);
  iova::DeviceReservations reservations{device, std::move(reserved)};
  if (const auto counted = policy_.attach(reservations, in_the_way); !counted) return counted;
  devices_.push_back(std::move(reservations));
  return {};
}

void SpaceLayout::forget(const std::string& device) {
  (void)policy_.detach(device);
  std::erase_if(devices_, [&](const iova::DeviceReservations& d) { return d.name == device; });
}

std::vector<LayoutBreach> SpaceLayout::host_says(std::span<const IovaRange> ranges, const MappingIndex& live) {
  host_ = list_of(ranges);
  host_known_ = !ranges.empty();
  const std::vector<IovaRange> aperture = host_known_ ? host_ : std::vector{IovaRange::everything()};
  const iova::UsableRanges beyond = iova::UsableRanges{aperture}.complement();
  std::vector<LayoutBreach> breaches;
  // Mappings of a host that does not know are not judged: a container without devices has none.
  for (const iova::LayoutRefusal& broken :
       policy_.host_says(aperture, host_known_ ? live_in(live, beyond.ranges()) : std::vector<IovaRange>{})) {
    const auto mapped = live_in(live, {&broken.reserved, 1});
    breaches.push_back({broken.reserved, broken.other,
                        std::find(mapped.begin(), mapped.end(), broken.other) != mapped.end(), broken.text()});
  }
  return breaches;
}

std::vector<IovaRange> SpaceLayout::usable() const {
  if (!host_known_) return {};
  // A promise says what stays; what else the host offers may be used beside it.
  if (kind_ == LayoutPolicy::fixed) return host_;
  return list_of(policy_.usable().ranges());
}

Result<GuestLayout> SpaceLayout::show() {
  if (!host_known_)
    return make_error(Errc::unsupported, Stage::query,
                      "this host does not say what it can translate before a device is attached; attach the guest's "
                      "devices first");
  if (kind_ == LayoutPolicy::host_constrained && !shown_) {
    auto made = iova::LayoutPolicy::create(
        {.layout = iova::Layout::host_constrained, .aperture = host_, .devices = devices_, .promised = {}});
    if (!made) return made.error();
    policy_ = *std::move(made);
    shown_ = true;
  }
  GuestLayout layout;
  const auto promise = policy_.promise();
  layout.usable = list_of((promise ? *promise : policy_.usable()).ranges());
  for (iova::ExportedHole& hole : policy_.exported_holes())
    layout.holes.push_back({hole.range, std::move(hole.devices)});
  return layout;
}

}  // namespace iovane::engine
