#include "viommu/virtio_iommu.hpp"

#include <algorithm>
#include <bit>
#include <new>

#include "base/error_text.hpp"
#include "viommu/virtio_iommu_domain.hpp"

namespace iovane::viommu {
namespace {

using namespace std::chrono_literals;
using virtio::RequestType;
using virtio::Status;
constexpr auto wait_slice = 1ms;

template <typename T, std::size_t N>
T get(const std::array<std::byte, N>& bytes, std::size_t at) noexcept {
  T value{};
  __builtin_memcpy(&value, bytes.data() + at, sizeof value);
  if constexpr (std::endian::native == std::endian::big)
    value = sizeof value == 8 ? static_cast<T>(__builtin_bswap64(value)) : static_cast<T>(__builtin_bswap32(value));
  return value;
}

template <typename T>
void put(std::byte* at, T value) noexcept {
  for (std::size_t i = 0; i < sizeof value; ++i) at[i] = static_cast<std::byte>(value >> (8 * i));
}

// What a driver is told about a failure of ours or of the host.
Status status_of(const Error& error) noexcept {
  switch (error.code) {
    case Errc::ok: return Status::ok;
    case Errc::invalid_argument:
    case Errc::overflow:
    case Errc::would_bisect: return Status::range;
    case Errc::iova_busy:
    case Errc::iova_reserved: return Status::invalid;
    case Errc::memlock_exceeded:
    case Errc::out_of_memory:
    case Errc::entry_limit:
    case Errc::limit_reached:
    case Errc::iova_exhausted: return Status::no_memory;
    case Errc::bad_memory: return Status::fault;
    case Errc::unsupported: return Status::unsupported;
    default: return Status::device_error;
  }
}

}  // namespace

VirtioIommu::VirtioIommu(const GuestMemory& memory, VirtioIommuConfig config)
    : memory_{memory},
      config_{std::move(config)},
      granule_{config_.page_size_mask & -config_.page_size_mask},
      bypass_config_{config_.bypass_at_boot} {
  granule_ = std::clamp<std::uint64_t>(granule_, 4096, 1U << 28);
  config_.page_size_mask = (config_.page_size_mask & -granule_) | granule_;
  config_.domain.granule_shift = static_cast<unsigned>(std::countr_zero(granule_));
  config_.domain.address_bits =
      std::max(config_.domain.granule_shift + 1, static_cast<unsigned>(std::bit_width(config_.input_range.last.value)));
  slots_.reserve(config_.requests_max);
  dirty_.reserve(config_.domains_max + std::size_t{1});
}

VirtioIommu::~VirtioIommu() { finish(); }

VirtioIommu::Endpoint* VirtioIommu::find_endpoint(std::uint32_t id) noexcept {
  const auto place = std::lower_bound(endpoints_.begin(), endpoints_.end(), id,
                                      [](const auto& e, std::uint32_t n) { return e->id < n; });
  return place != endpoints_.end() && (*place)->id == id ? place->get() : nullptr;
}

const VirtioIommu::Endpoint* VirtioIommu::find_endpoint(std::uint32_t id) const noexcept {
  return const_cast<VirtioIommu*>(this)->find_endpoint(id);
}

VirtioIommu::Domain* VirtioIommu::find_domain(std::uint32_t id) noexcept {
  if (last_domain_ != nullptr && last_domain_->id == id) return last_domain_;
  const auto place =
      std::lower_bound(domains_.begin(), domains_.end(), id, [](const auto& d, std::uint32_t n) { return d->id < n; });
  if (place == domains_.end() || (*place)->id != id) return nullptr;
  return last_domain_ = place->get();
}

const ShadowDomain* VirtioIommu::domain(std::uint32_t id) const noexcept {
  const Domain* found = const_cast<VirtioIommu*>(this)->find_domain(id);
  return found == nullptr ? nullptr : &found->shadow;
}

std::uint64_t VirtioIommu::features() const noexcept {
  using namespace virtio;
  return feature_input_range | feature_domain_range | feature_map_unmap | feature_probe | feature_bypass_config |
         (config_.mmio ? feature_mmio : 0);
}

std::array<std::byte, virtio::config_bytes> VirtioIommu::config_space() const noexcept {
  std::array<std::byte, virtio::config_bytes> out{};
  put(out.data(), config_.page_size_mask);
  put(out.data() + 8, config_.input_range.start.value);
  put(out.data() + 16, config_.input_range.last.value);
  put(out.data() + 24, config_.domain_first);
  put(out.data() + 28, config_.domain_last);
  put(out.data() + 32, config_.probe_size);
  out[36] = static_cast<std::byte>(bypass_config_ ? 1 : 0);
  return out;
}

bool VirtioIommu::bypasses_unattached() const noexcept {
  return bypass_config_ || (features_ & virtio::feature_bypass) != 0;
}

void VirtioIommu::fill_identity(Domain& domain) {
  const auto view = memory_.view();
  for (const Region& region : view.regions()) {
    const IovaRange range{Iova{region.gpa}, Iova{region.last}};
    if (domain.shadow.index().is_free(range))
      static_cast<void>(
          domain.shadow.map(view, range, region.gpa, region.read_only ? Access::read : Access::read_write));
  }
  domain.shadow.commit_and_wait();
}

VirtioIommu::Domain& VirtioIommu::bypass_domain() {
  if (bypass_ == nullptr) {
    DomainConfig config = config_.domain;
    config.name = "virtio-iommu bypass";
    config.granule_shift = 12;
    config.address_bits = 64;
    bypass_ = std::make_unique<Domain>(0, config, true);
    fill_identity(*bypass_);
  }
  return *bypass_;
}

void VirtioIommu::update_reserved(Domain& domain) {
  domain.reserved.clear();
  for (const auto& e : endpoints_)
    if (e->domain == &domain)
      for (const ReservedMemory& r : e->reserved) domain.reserved.push_back(r.range);
}

// Attaches the endpoint's target to the domain, unless another endpoint on the same target did.
Result<void> VirtioIommu::join(Endpoint& endpoint, Domain& domain) {
  if (endpoint.target != nullptr) {
    for (const auto& other : endpoints_)
      if (other.get() != &endpoint && other->target == endpoint.target && other->domain != nullptr &&
          other->domain != &domain)
        return base::fail(Errc::unsupported, Stage::attach, 0,
                          "virtio-iommu: endpoint {} shares its host address space with endpoint {} in another domain",
                          endpoint.id, other->id);
    if (!domain.bypass)
      for (const ReservedMemory& r : endpoint.reserved)
        if (!domain.shadow.index().is_free(r.range))
          return base::fail(Errc::unsupported, Stage::attach, 0,
                            "virtio-iommu: domain {} has mappings in {:#x}..{:#x}, which endpoint {} reserves",
                            domain.id, r.range.start.value, r.range.last.value, endpoint.id);
    if (!domain.shadow.attached(*endpoint.target)) {
      const auto view = memory_.view();
      if (auto joined = domain.shadow.attach(view, *endpoint.target); !joined) return joined;
    }
  }
  endpoint.domain = &domain;
  ++domain.users;
  update_reserved(domain);
  return {};
}

Result<void> VirtioIommu::leave(Endpoint& endpoint) {
  Domain* domain = std::exchange(endpoint.domain, nullptr);
  if (domain == nullptr) return {};
  --domain->users;
  update_reserved(*domain);
  const bool shared = std::any_of(endpoints_.begin(), endpoints_.end(),
                                  [&](const auto& e) { return e->domain == domain && e->target == endpoint.target; });
  Result<void> outcome;
  if (endpoint.target != nullptr && !shared) outcome = domain->shadow.detach(*endpoint.target);
  return outcome;
}

void VirtioIommu::drop_domain_if_unused(Domain* domain) {
  if (domain == nullptr || domain == bypass_.get() || domain->users != 0) return;
  if (last_domain_ == domain) last_domain_ = nullptr;
  std::erase(dirty_, domain);
  std::erase_if(domains_, [&](const auto& d) { return d.get() == domain; });
}

// Where an endpoint is when no domain has it.
Result<void> VirtioIommu::settle(Endpoint& endpoint) {
  const bool bypass = bypasses_unattached();
  if (endpoint.domain != nullptr && endpoint.domain != bypass_.get()) return {};
  if (bypass == (endpoint.domain != nullptr)) return {};
  return bypass ? join(endpoint, bypass_domain()) : leave(endpoint);
}

Result<void> VirtioIommu::add_endpoint(std::uint32_t id, ShadowTarget* target, std::vector<ReservedMemory> reserved) {
  if (find_endpoint(id) != nullptr)
    return base::fail(Errc::busy, Stage::attach, 0, "virtio-iommu: endpoint {} is there already", id);
  if (std::count_if(reserved.begin(), reserved.end(), [](const ReservedMemory& r) { return r.msi; }) > 1)
    return base::fail(Errc::invalid_argument, Stage::attach, 0, "virtio-iommu: endpoint {} has two MSI regions", id);
  finish();
  if (target != nullptr) {  // what the host cannot map is reserved too
    const auto usable = target->usable_ranges();
    if (!usable) return usable.error();
    std::uint64_t at = config_.input_range.start.value;
    bool more = true;
    const auto hole = [&](std::uint64_t first, std::uint64_t last) {
      const IovaRange range{Iova{first}, Iova{last}};
      const bool known = std::any_of(reserved.begin(), reserved.end(),
                                     [&](const ReservedMemory& r) { return r.range.overlaps(range); });
      if (!known) reserved.push_back({range, false});
    };
    for (const IovaRange& range : *usable) {
      if (!more || range.last.value < at) continue;
      if (range.start > config_.input_range.last) break;
      if (range.start.value > at) hole(at, range.start.value - 1);
      more = range.last < config_.input_range.last;
      if (more) at = range.last.value + 1;
    }
    if (more) hole(at, config_.input_range.last.value);
  }
  std::sort(reserved.begin(), reserved.end(),
            [](const ReservedMemory& a, const ReservedMemory& b) { return a.range.start < b.range.start; });
  if (reserved.size() * virtio::property_reserved_memory_bytes > config_.probe_size)
    return base::fail(Errc::limit_reached, Stage::attach, 0,
                      "virtio-iommu: endpoint {} has {} reserved regions, probe_size {} has room for {}", id,
                      reserved.size(), config_.probe_size, config_.probe_size / virtio::property_reserved_memory_bytes);
  auto made = std::make_unique<Endpoint>(Endpoint{id, target, std::move(reserved), nullptr});
  Endpoint& endpoint = *made;
  endpoints_.insert(std::lower_bound(endpoints_.begin(), endpoints_.end(), id,
                                     [](const auto& e, std::uint32_t n) { return e->id < n; }),
                    std::move(made));
  auto settled = settle(endpoint);
  if (!settled) std::erase_if(endpoints_, [&](const auto& e) { return e.get() == &endpoint; });
  return settled;
}

Result<void> VirtioIommu::remove_endpoint(std::uint32_t id) {
  finish();
  Endpoint* endpoint = find_endpoint(id);
  if (endpoint == nullptr)
    return base::fail(Errc::not_found, Stage::detach, 0, "virtio-iommu: endpoint {} is not there", id);
  Domain* domain = endpoint->domain;
  auto outcome = leave(*endpoint);
  std::erase_if(endpoints_, [&](const auto& e) { return e.get() == endpoint; });
  drop_domain_if_unused(domain);
  return outcome;
}

void VirtioIommu::set_features(std::uint64_t negotiated) {
  finish();
  features_ = negotiated & features();
  for (const auto& endpoint : endpoints_) static_cast<void>(settle(*endpoint));
}

Result<void> VirtioIommu::set_bypass(bool bypass) {
  finish();
  bypass_config_ = bypass;
  Result<void> outcome;
  for (const auto& endpoint : endpoints_)
    if (auto settled = settle(*endpoint); !settled) outcome = settled;
  return outcome;
}

Result<void> VirtioIommu::reset() {
  finish();
  slots_.clear();
  next_ = open_ = taken_ = 0;
  features_ = 0;
  bypass_config_ = config_.bypass_at_boot;
  Result<void> outcome;
  for (const auto& endpoint : endpoints_) {
    if (endpoint->domain != bypass_.get())
      if (auto left = leave(*endpoint); !left) outcome = left;
    if (auto settled = settle(*endpoint); !settled) outcome = settled;
  }
  last_domain_ = nullptr;
  domains_.clear();
  return outcome;
}

std::size_t VirtioIommu::handle(std::span<const Request> requests) noexcept {
  if (taken_ == slots_.size()) {
    slots_.clear();
    next_ = open_ = taken_ = 0;
  }
  const std::size_t room = config_.requests_max - slots_.size();
  const std::size_t n = std::min(room, requests.size());
  for (const Request& request : requests.first(n)) slots_.emplace_back().request = request;
  static_cast<void>(advance());
  return n;
}

void VirtioIommu::mark_dirty(Domain& domain) noexcept {
  if (std::exchange(domain.dirty, true)) return;
  dirty_.push_back(&domain);
}

void VirtioIommu::answer(Slot& slot, Status status) noexcept {
  std::array<std::byte, virtio::tail_bytes> tail{};
  tail[0] = static_cast<std::byte>(status);
  const auto at = slot.request.writable.size() - tail.size();
  copy_to_guest(slot.request.writable.data() + at, tail.data(), tail.size());
  slot.written = static_cast<std::uint32_t>(slot.request.writable.size());
  slot.state = Slot::State::answered;
  if (status != Status::ok) ++stats_.refused;
}

// Every domain with staged edits gets its batch; where one has ended, its requests are answered. False: none has.
bool VirtioIommu::commit_domains() noexcept {
  const auto ended = std::erase_if(dirty_, [&](Domain* domain) {
    if (domain->shadow.commit() == Progress::pending) return false;
    domain->dirty = false;
    ++stats_.batches;
    for (const EditFailure& failure : domain->shadow.failures())
      if (failure.tag < slots_.size() && slots_[failure.tag].status == Status::ok)
        slots_[failure.tag].status = status_of(failure.error);
    return true;
  });
  if (ended == 0) return false;
  for (std::size_t i = open_; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    if (slot.state == Slot::State::staged && !slot.domain->dirty) answer(slot, slot.status);
    if (i == open_ && slot.state >= Slot::State::answered) ++open_;
  }
  return true;
}

Progress VirtioIommu::advance() noexcept {
  for (;;) {
    const bool ended = !dirty_.empty() && commit_domains();
    const bool began = next_ < slots_.size() && start_requests();
    if (dirty_.empty() && open_ == slots_.size()) return Progress::done;
    if (!ended && !began) return Progress::pending;
  }
}

// Starts what need not wait for what is before it. False: nothing could.
bool VirtioIommu::start_requests() noexcept {
  const auto view = memory_.view();
  bool any = false;
  bool passed_held = false;
  for (std::size_t i = next_; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    if (slot.state <= Slot::State::held) {
      if (slot.state == Slot::State::fresh) copy_request(slot);
      if (!start(view, static_cast<std::uint32_t>(i))) break;
      any = any || slot.state != Slot::State::held;
    }
    passed_held = passed_held || slot.state == Slot::State::held;
    if (!passed_held) next_ = i + 1;
    if (i == open_ && slot.state >= Slot::State::answered) ++open_;
  }
  return any;
}

void VirtioIommu::copy_request(Slot& slot) noexcept {
  ++stats_.requests;
  slot.bytes.fill(std::byte{0});
  copy_from_guest(slot.bytes.data(), slot.request.readable.data(),
                  std::min(slot.request.readable.size(), slot.bytes.size()));
  slot.state = Slot::State::held;
}

// False: it must wait until everything before it was answered, and so must all behind it. It stays held when only its
// domain's batch is in the way.
bool VirtioIommu::start(const GuestMemory::View& view, std::uint32_t index) noexcept {
  Slot& slot = slots_[index];
  const Bytes72& bytes = slot.bytes;
  const auto type = static_cast<RequestType>(bytes[0]);
  std::size_t need = 0;
  switch (type) {
    case RequestType::attach: need = virtio::attach_bytes; break;
    case RequestType::detach: need = virtio::detach_bytes; break;
    case RequestType::map: need = virtio::map_bytes; break;
    case RequestType::unmap: need = virtio::unmap_bytes; break;
    case RequestType::probe: need = virtio::probe_bytes; break;
  }
  if (need == 0 || slot.request.readable.size() < need || slot.request.writable.size() < virtio::tail_bytes) {
    ++stats_.unparsable;  // the device does not write to it
    slot.state = Slot::State::answered;
    return true;
  }
  switch (type) {
    case RequestType::attach:
    case RequestType::detach:
      if (index != open_ || !dirty_.empty()) return false;
      answer(slot, type == RequestType::attach ? do_attach(bytes) : do_detach(bytes));
      return true;
    case RequestType::probe: do_probe(bytes, slot); return true;
    case RequestType::map:
    case RequestType::unmap: break;
  }
  Domain* domain = find_domain(get<std::uint32_t>(bytes, 4));
  if (domain != nullptr && domain->shadow.in_flight()) return true;
  slot.status = type == RequestType::map ? do_map(view, bytes, index, domain) : do_unmap(view, bytes, index, domain);
  if (domain != nullptr && domain->shadow.staged() != 0) mark_dirty(*domain);
  if (domain != nullptr && domain->dirty) {  // in its turn, even when it is refused
    slot.domain = domain;
    slot.state = Slot::State::staged;
  } else {
    answer(slot, slot.status);
  }
  return true;
}

VirtioIommu::Domain& VirtioIommu::make_domain(std::uint32_t id, bool bypass) {
  DomainConfig config = config_.domain;
  config.name = fmt::format("virtio-iommu domain {}", id);
  if (bypass) config.granule_shift = 12, config.address_bits = 64;
  auto made = std::make_unique<Domain>(id, config, bypass);
  Domain& domain = *made;
  domains_.insert(
      std::lower_bound(domains_.begin(), domains_.end(), id, [](const auto& d, std::uint32_t n) { return d->id < n; }),
      std::move(made));
  if (bypass) fill_identity(domain);
  return domain;
}

Status VirtioIommu::do_attach(const Bytes72& bytes) noexcept {
  const auto id = get<std::uint32_t>(bytes, 4);
  const auto flags = get<std::uint32_t>(bytes, 12);
  const std::uint32_t known = (features_ & virtio::feature_bypass_config) != 0 ? virtio::attach_bypass : 0;
  if (get<std::uint32_t>(bytes, 16) != 0 || (flags & ~known) != 0) return Status::invalid;
  Endpoint* endpoint = find_endpoint(get<std::uint32_t>(bytes, 8));
  if (endpoint == nullptr) return Status::not_found;
  if (id < config_.domain_first || id > config_.domain_last) return Status::range;
  const bool bypass = (flags & virtio::attach_bypass) != 0;
  Domain* domain = find_domain(id);
  if (domain != nullptr && domain->bypass != bypass) return Status::invalid;
  if (domain != nullptr && endpoint->domain == domain) return Status::ok;
  try {
    Domain* old = endpoint->domain;
    if (auto left = leave(*endpoint); !left) return status_of(left.error());
    if (old != domain) drop_domain_if_unused(old);
    if (domain == nullptr) {
      if (domains_.size() >= config_.domains_max) {
        static_cast<void>(settle(*endpoint));
        return Status::no_memory;
      }
      domain = &make_domain(id, bypass);
    }
    const auto joined = join(*endpoint, *domain);
    if (!joined) {
      drop_domain_if_unused(domain);
      static_cast<void>(settle(*endpoint));
      return joined.error().code == Errc::iova_reserved ? Status::unsupported : status_of(joined.error());
    }
  } catch (const std::bad_alloc&) {
    return Status::no_memory;
  }
  stats_.domains = domains_.size();
  return Status::ok;
}

Status VirtioIommu::do_detach(const Bytes72& bytes) noexcept {
  Endpoint* endpoint = find_endpoint(get<std::uint32_t>(bytes, 8));
  if (endpoint == nullptr) return Status::not_found;
  Domain* domain = find_domain(get<std::uint32_t>(bytes, 4));
  if (domain == nullptr || endpoint->domain != domain) return Status::invalid;
  auto outcome = leave(*endpoint);
  drop_domain_if_unused(domain);
  stats_.domains = domains_.size();
  if (outcome) outcome = settle(*endpoint);
  return status_of(outcome.error());
}

Status VirtioIommu::do_map(const GuestMemory::View& view, const Bytes72& bytes, std::uint32_t tag,
                           Domain* domain) noexcept {
  const IovaRange range{Iova{get<std::uint64_t>(bytes, 8)}, Iova{get<std::uint64_t>(bytes, 16)}};
  const auto gpa = get<std::uint64_t>(bytes, 24);
  const auto flags = get<std::uint32_t>(bytes, 32);
  const bool mmio = (features_ & virtio::feature_mmio) != 0;
  if ((flags & ~(virtio::map_read | virtio::map_write | (mmio ? virtio::map_mmio : 0))) != 0) return Status::invalid;
  if (domain == nullptr) return Status::not_found;
  const auto access = static_cast<Access>(flags & 3U);
  if (domain->bypass || access == Access::none || !range.well_formed()) return Status::invalid;
  if (((range.start.value | gpa | (range.last.value + 1)) & (granule_ - 1)) != 0) return Status::range;
  if (!config_.input_range.contains(range)) return Status::range;
  const std::uint64_t gpa_last = gpa + range.span();
  if (gpa_last < gpa || (config_.physical_bits < 64 && gpa_last >> config_.physical_bits != 0)) return Status::range;
  for (const IovaRange& reserved : domain->reserved)
    if (reserved.overlaps(range)) return Status::invalid;
  const auto mapped = domain->shadow.map(view, range, gpa, access, tag);
  return mapped ? Status::ok : status_of(mapped.error());
}

Status VirtioIommu::do_unmap(const GuestMemory::View& view, const Bytes72& bytes, std::uint32_t tag,
                             Domain* domain) noexcept {
  const IovaRange range{Iova{get<std::uint64_t>(bytes, 8)}, Iova{get<std::uint64_t>(bytes, 16)}};
  if (get<std::uint32_t>(bytes, 24) != 0) return Status::invalid;
  if (domain == nullptr) return Status::not_found;
  if (domain->bypass || !range.well_formed()) return Status::invalid;
  const auto gone = domain->shadow.unmap(view, range, CutRule::refuse, tag);
  return gone ? Status::ok : status_of(gone.error());
}

void VirtioIommu::do_probe(const Bytes72& bytes, Slot& slot) noexcept {
  const std::span<std::byte> out = slot.request.writable;
  if (out.size() - virtio::tail_bytes < config_.probe_size) return answer(slot, Status::invalid);
  const Endpoint* endpoint = find_endpoint(get<std::uint32_t>(bytes, 4));
  if (endpoint == nullptr) return answer(slot, Status::not_found);
  std::size_t at = 0;
  std::array<std::byte, virtio::property_reserved_memory_bytes> property{};
  for (const ReservedMemory& reserved : endpoint->reserved) {
    put(property.data(), virtio::property_reserved_memory);
    put(property.data() + 2, static_cast<std::uint16_t>(property.size() - 4));
    property[4] = static_cast<std::byte>(reserved.msi ? 1 : 0);
    put(property.data() + 8, reserved.range.start.value);
    put(property.data() + 16, reserved.range.last.value);
    copy_to_guest(out.data() + at, property.data(), property.size());
    at += property.size();
  }
  property = {};
  while (at < out.size() - virtio::tail_bytes) {
    const std::size_t n = std::min(property.size(), out.size() - virtio::tail_bytes - at);
    copy_to_guest(out.data() + at, property.data(), n);
    at += n;
  }
  answer(slot, Status::ok);
}

std::size_t VirtioIommu::take_answers(std::span<Answer> out) noexcept {
  std::size_t n = 0;
  for (std::size_t i = taken_; n < out.size() && i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    if (slot.state == Slot::State::answered) {
      out[n++] = {slot.request.cookie, slot.written};
      slot.state = Slot::State::taken;
    }
    if (i == taken_ && slot.state == Slot::State::taken) ++taken_;
  }
  return n;
}

void VirtioIommu::wait(std::chrono::nanoseconds timeout) noexcept {
  for (Domain* domain : dirty_)
    if (domain->shadow.in_flight()) return domain->shadow.wait(timeout);
}

void VirtioIommu::finish() noexcept {
  while (advance() == Progress::pending) wait(wait_slice);
}

Progress VirtioIommu::memory_added() noexcept {
  finish();
  const auto view = memory_.view();
  const auto refresh = [&](Domain& domain) {
    if (domain.bypass) fill_identity(domain);
    static_cast<void>(domain.shadow.refresh_backing(view));
    domain.shadow.commit_and_wait();
  };
  for (const auto& domain : domains_) refresh(*domain);
  if (bypass_ != nullptr) refresh(*bypass_);
  return Progress::done;
}

Progress VirtioIommu::memory_removing(const Region& region) noexcept {
  finish();
  const auto view = memory_.view();
  const auto withdraw = [&](Domain& domain) {
    if (domain.bypass) {
      static_cast<void>(domain.shadow.unmap(view, {Iova{region.gpa}, Iova{region.last}}, CutRule::cut));
    } else {
      static_cast<void>(domain.shadow.withdraw_region(region));
    }
    domain.shadow.commit_and_wait();
  };
  for (const auto& domain : domains_) withdraw(*domain);
  if (bypass_ != nullptr) withdraw(*bypass_);
  return Progress::done;
}

std::optional<std::pair<std::uint64_t, Access>> VirtioIommu::translate(std::uint32_t id,
                                                                       std::uint64_t iova) const noexcept {
  const Endpoint* endpoint = find_endpoint(id);
  if (endpoint == nullptr || endpoint->domain == nullptr) return std::nullopt;
  return endpoint->domain->shadow.translate(iova);
}

std::optional<virtio::FaultReason> VirtioIommu::fault_of(std::uint32_t id, std::uint64_t iova,
                                                         bool write) const noexcept {
  const Endpoint* endpoint = find_endpoint(id);
  if (endpoint == nullptr) return virtio::FaultReason::unknown;
  if (endpoint->domain == nullptr) return virtio::FaultReason::domain;
  const auto found = endpoint->domain->shadow.translate(iova);
  if (found && (write ? may_write(found->second) : may_read(found->second))) return std::nullopt;
  return virtio::FaultReason::mapping;
}

std::array<std::byte, virtio::fault_bytes> VirtioIommu::fault_record(virtio::FaultReason reason, std::uint32_t endpoint,
                                                                     std::uint64_t iova, bool write) noexcept {
  std::array<std::byte, virtio::fault_bytes> out{};
  out[0] = static_cast<std::byte>(reason);
  put(out.data() + 4, virtio::fault_address | (write ? virtio::fault_write : virtio::fault_read));
  put(out.data() + 8, endpoint);
  put(out.data() + 16, iova);
  return out;
}

}  // namespace iovane::viommu
