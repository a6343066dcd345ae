// VirtioIommu's requests: what each asks for, and the status that the specification prescribes.
#include <algorithm>
#include <bit>
#include <new>

#include "viommu/virtio_iommu.hpp"
#include "viommu/virtio_iommu_domain.hpp"

namespace iovane::viommu {
namespace {

using virtio::get;
using virtio::put;
using virtio::RequestType;
using virtio::Status;

/// A little-endian word of guest memory, loaded once.
template <typename Word>
Word load_le(const Word* at) noexcept {
  // relaxed: the driver's release of the buffer, which the VMM took, orders what is in it.
  Word word = __atomic_load_n(at, __ATOMIC_RELAXED);
  if constexpr (std::endian::native == std::endian::big)
    word = sizeof word == 8 ? static_cast<Word>(__builtin_bswap64(word))
                            : static_cast<Word>(__builtin_bswap32(static_cast<std::uint32_t>(word)));
  return word;
}

}  // namespace

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

// False: it must wait until everything before it was answered, and so must all behind it. It stays held when only its
// domain's batch is in the way.
bool VirtioIommu::start(const GuestMemory::View& view, Slot& slot, std::uint32_t index) noexcept {
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
  const IovaRange range{Iova{get<std::uint64_t>(bytes, 8)}, Iova{get<std::uint64_t>(bytes, 16)}};
  const Status status =
      type == RequestType::map
          ? do_map(view, {range, get<std::uint64_t>(bytes, 24), get<std::uint32_t>(bytes, 32)}, index, domain)
          : do_unmap(view, {range, get<std::uint32_t>(bytes, 24)}, index, domain);
  finish_start(slot, domain, status);
  return true;
}

// A map or unmap that was judged and, if its status is ok, staged.
inline void VirtioIommu::finish_start(Slot& slot, Domain* domain, Status status) noexcept {
  if (domain != nullptr && domain->shadow.staged() != 0) mark_dirty(*domain);
  if (domain != nullptr && domain->dirty) [[likely]] {  // in its turn, even when it is refused
    slot.domain = domain;
    slot.status = status;
    slot.state = Slot::State::staged;
  } else {
    answer(slot, status);
  }
}

// Starts maps and unmaps of the domain that was named last, which are nearly all there is, straight from the driver's
// buffers: each word is loaded once, and nothing is kept of them. Stops at the first other one, of which nothing has
// been done. How many. Nothing that was taken before waits to be started.
std::size_t VirtioIommu::start_common(std::span<const Request> requests) noexcept {
  Domain* const domain = last_domain_;
  if (domain == nullptr || domain->shadow.in_flight()) return 0;
  const auto view = reader_.view();
  const std::size_t first = count_;
  for (const Request& request : requests) {
    const auto* const words = reinterpret_cast<const std::uint64_t*>(request.readable.data());
    if (request.readable.size() < virtio::unmap_bytes || (reinterpret_cast<std::uintptr_t>(words) & 7U) != 0 ||
        request.writable.size() < virtio::tail_bytes)
      break;
    const std::uint64_t head = load_le(words);
    const auto type = static_cast<RequestType>(head & 0xff);
    if (head >> 32 != domain->id) break;
    const auto tag = static_cast<std::uint32_t>(count_);
    Status status = Status::ok;
    if (type == RequestType::map && request.readable.size() >= virtio::map_bytes) {
      const IovaRange range{Iova{load_le(words + 1)}, Iova{load_le(words + 2)}};
      status = do_map(view, {range, load_le(words + 3), load_le(reinterpret_cast<const std::uint32_t*>(words + 4))},
                      tag, domain);
    } else if (type == RequestType::unmap) {
      const IovaRange range{Iova{load_le(words + 1)}, Iova{load_le(words + 2)}};
      status = do_unmap(view, {range, load_le(reinterpret_cast<const std::uint32_t*>(words + 3))}, tag, domain);
    } else {
      break;
    }
    Slot& slot = slots_[count_++];
    slot.request.writable = request.writable;
    slot.request.cookie = request.cookie;
    finish_start(slot, domain, status);
  }
  while (open_ < count_ && slots_[open_].state >= Slot::State::answered) ++open_;
  next_ = count_;
  stats_.requests += count_ - first;
  return count_ - first;
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

inline Status VirtioIommu::do_map(const GuestMemory::View& view, const MapWords& words, std::uint32_t tag,
                                  Domain* domain) noexcept {
  const auto& [range, gpa, flags] = words;
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
  if (domain->shadow.map_granule(view, range, gpa, access, tag)) return Status::ok;
  const auto mapped = domain->shadow.map(view, range, gpa, access, tag);
  return mapped ? Status::ok : status_of(mapped.error());
}

inline Status VirtioIommu::do_unmap(const GuestMemory::View& view, const UnmapWords& words, std::uint32_t tag,
                                    Domain* domain) noexcept {
  const IovaRange& range = words.range;
  if (words.reserved != 0) return Status::invalid;
  if (domain == nullptr) return Status::not_found;
  if (domain->bypass || !range.well_formed()) return Status::invalid;
  if (domain->shadow.unmap_granule(range, CutRule::refuse, tag)) return Status::ok;
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

}  // namespace iovane::viommu
