#include "viommu/vtd_direct.hpp"

#include <limits>

namespace iovane::viommu {
namespace {

constexpr std::uint64_t page_shift = 12;
constexpr std::size_t ranges_max = 256;  // of one array
constexpr std::uint64_t everything = std::numeric_limits<std::uint64_t>::max();

}  // namespace

void VtdDirect::add_endpoint(std::uint16_t source, backends::DeviceId device) {
  Endpoint& endpoint = endpoints_[source];
  endpoint = {.device = device};
  const auto view = memory_.view();
  bind(view, source, endpoint);
}

bool VtdDirect::needs_shadow(std::uint16_t source) const noexcept {
  const auto at = endpoints_.find(source);
  return at != endpoints_.end() && at->second.needs_shadow;
}

void VtdDirect::set_root_table(std::uint64_t rtaddr) noexcept {
  rtaddr_ = rtaddr;
  if (enabled_) bind_all();
}

void VtdDirect::set_translation(bool enabled) noexcept {
  enabled_ = enabled;
  bind_all();
}

void VtdDirect::bind_all() noexcept {
  const auto view = memory_.view();
  for (auto& [source, endpoint] : endpoints_) bind(view, source, endpoint);
}

// What the guest's context and PASID entries say, put into effect. A device whose entries nobody can put into effect is
// blocked: it must not go on with what it had.
void VtdDirect::bind(const GuestMemory::View& view, std::uint16_t source, Endpoint& endpoint) noexcept {
  VtdBinding binding;
  binding.kind = VtdBinding::Kind::pass_through;
  if (enabled_) binding = resolve_binding(view, capabilities_, rtaddr_, source, std::nullopt);
  if (endpoint.known && endpoint.binding == binding) return;
  endpoint.binding = binding;
  endpoint.needs_shadow = binding.kind == VtdBinding::Kind::paging && binding.table.stage != VtdPageTable::Stage::first;
  endpoint.known = false;
  ++stats_.rebound;
  try {
    Result<void> done;
    if (binding.kind == VtdBinding::Kind::pass_through)
      done = host_.pass_through(endpoint.device);
    else if (binding.kind == VtdBinding::Kind::paging && !endpoint.needs_shadow)
      done = host_.use_first_level(endpoint.device, binding.table.root, binding.table.levels);
    else
      done = host_.block(endpoint.device);
    if (done) {
      endpoint.known = true;
      return;
    }
    ++stats_.failed;
    events_.shadow_failed(binding.domain, done.error());
    (void)host_.block(endpoint.device);
  } catch (...) {  // no memory for a table's record
    ++stats_.failed;
  }
}

// Adds what the descriptor names to the arrays of the tables that it concerns.
void VtdDirect::collect(const VtdDescriptor& descriptor) noexcept {
  const bool paged = descriptor.kind == VtdDescriptor::Kind::pasid_iotlb;
  const bool pages = paged && descriptor.scope == VtdDescriptor::Scope::page;
  Range range{.addr = 0, .npages = everything, .flags = 0, .reserved = 0};
  if (pages) {
    range.addr = descriptor.first_address();
    const std::uint64_t span = descriptor.last_address() - descriptor.first_address();
    if (span != everything) range.npages = (span >> page_shift) + 1;
    if (span == everything) range.addr = 0;
    range.flags = descriptor.leaf_only ? backends::uapi::iommufd::vtd_inv_flags_leaf : 0;
  }
  for (auto& [source, endpoint] : endpoints_) {
    if (descriptor.scope != VtdDescriptor::Scope::global && endpoint.binding.domain != descriptor.domain) continue;
    if (paged && endpoint.binding.pasid != descriptor.pasid) continue;
    const std::uint32_t table = host_.table_of(endpoint.device);
    if (table == 0) continue;
    try {
      Pending& pending = pending_[table];
      pending.device = endpoint.device;
      std::vector<Range>& ranges = pending.ranges;
      const auto same = [](const Range& a, const Range& b) {
        return a.addr == b.addr && a.npages == b.npages && a.flags == b.flags;
      };
      // Devices with one table give one range; all of it is more than any.
      if (!ranges.empty() && (same(ranges.back(), range) || ranges.front().npages == everything)) continue;
      if (range.npages == everything || ranges.size() == ranges_max)
        ranges.assign(1, {.addr = 0, .npages = everything});
      else
        ranges.push_back(range);
    } catch (...) {  // no memory to collect: this one at once
      const Range all{.addr = 0, .npages = everything, .flags = 0, .reserved = 0};
      (void)host_.invalidate(endpoint.device, {&all, 1});
    }
  }
}

bool VtdDirect::flush() noexcept {
  bool all = true;
  for (auto& [table, pending] : pending_) {
    if (pending.ranges.empty()) continue;
    const std::size_t taken = host_.invalidate(pending.device, pending.ranges);
    stats_.forwarded += taken;
    ++stats_.arrays;
    all = all && taken == pending.ranges.size();
  }
  pending_.clear();
  return all;
}

void VtdDirect::write_tail(std::uint64_t iqt) noexcept {
  if (!queue_.on() || !queue_.set_tail(iqt)) return;
  const auto view = memory_.view();
  for (std::uint32_t left = queue_.entries(); !queue_.all_read() && left != 0; --left) {
    const VtdQueue::Run run = queue_.unread(view);
    const auto descriptor = run.count != 0 ? decode_descriptor(run.first(), rules_) : std::optional<VtdDescriptor>{};
    if (!descriptor) {
      ++stats_.queue_errors;
      events_.queue_error(queue_.head());
      break;
    }
    ++stats_.descriptors;
    switch (descriptor->kind) {
      case VtdDescriptor::Kind::context_cache:
      case VtdDescriptor::Kind::pasid_cache:
        (void)flush();  // of the table that was
        bind_all();
        break;
      case VtdDescriptor::Kind::iotlb:
      case VtdDescriptor::Kind::pasid_iotlb: collect(*descriptor); break;
      case VtdDescriptor::Kind::interrupt_cache: events_.interrupt_cache_invalidated(*descriptor); break;
      case VtdDescriptor::Kind::wait:
        if (!flush()) {
          // The host did not invalidate: the guest may not believe that it did. It sees a queue that stands still.
          ++stats_.queue_errors;
          events_.queue_error(queue_.head());
          return;
        }
        ++stats_.waits;
        if (descriptor->write_status)
          view.write_le32(descriptor->status_address & ~std::uint64_t{3}, descriptor->status_data);
        if (descriptor->interrupt) events_.wait_completed();
        break;
      // The host's driver invalidates the device's own cache with each range.
      case VtdDescriptor::Kind::device_iotlb:
      case VtdDescriptor::Kind::pasid_device_iotlb: break;
    }
    queue_.skip(1);
    queue_.complete();
  }
  (void)flush();
}

}  // namespace iovane::viommu
