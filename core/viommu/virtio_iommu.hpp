// VirtioIommu: the device side of virtio-iommu (virtio 1.3, section 5.13), shadowed on the host.
//
// The VMM owns the virtqueues. For each notification it hands over the requests it found; those of one notification
// that touch the same domain form one batch, and each is answered when its batch is in effect on every host. A domain's
// requests are answered in order; they do not wait for those of other domains, so a slow host delays its own guest
// domain only (do not offer VIRTIO_F_IN_ORDER). ATTACH and DETACH order themselves against everything before and after
// them, and wait for their host.
//
// The guest may rewrite its buffers at any time, so every word of a request is loaded once and judged as loaded; what
// must wait for its turn is copied when it is taken.
//
// What the specification leaves open, decided here: a MAP outside input_range, or to guest physical addresses beyond
// `physical_bits`, is RANGE; one that no endpoint may use, or without READ and WRITE, is INVAL; an ATTACH of an
// endpoint that shares its host address space with one in another domain is UNSUPP. Memory and entry limits of the host
// are NOMEM, other host failures DEVERR. A mapping to guest physical addresses without RAM succeeds, as on hardware:
// a device that uses it faults on the host.
//
// Threads: one at a time; translate() and fault_of() from any thread while endpoints and domains stay as they are.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "viommu/guest_memory.hpp"
#include "viommu/shadow_domain.hpp"
#include "viommu/virtio_iommu_layout.hpp"

namespace iovane::viommu {

class StateReader;

struct VirtioIommuConfig {
  std::uint64_t page_size_mask = ~std::uint64_t{0xfff};  ///< lowest bit: granularity, 4 KiB to 256 MiB
  IovaRange input_range = IovaRange::everything();
  std::uint32_t domain_first = 0;
  std::uint32_t domain_last = 0xffff'ffff;
  std::uint32_t probe_size = 512;
  unsigned physical_bits = 52;  ///< guest physical addresses
  bool mmio = true;             ///< offer VIRTIO_IOMMU_F_MMIO
  bool bypass_at_boot = true;   ///< config field `bypass` after reset
  std::uint32_t domains_max = 4096;
  std::uint32_t requests_max = 1024;  ///< taken since the oldest one that is not yet answered
  DomainConfig domain{};              ///< of every domain; granule and address_bits are set here
};

/// IOVAs that an endpoint cannot use.
struct ReservedMemory {
  IovaRange range{};
  bool msi = false;  ///< a doorbell region; at most one per endpoint
};

struct VirtioIommuStats {
  std::uint64_t requests = 0;
  std::uint64_t refused = 0;     ///< answered with a status other than OK
  std::uint64_t unparsable = 0;  ///< returned without an answer
  std::uint64_t batches = 0;     ///< a domain's requests that were committed together
  std::uint64_t domains = 0;     ///< gauge
};

class VirtioIommu {
 public:
  VirtioIommu(const GuestMemory& memory, VirtioIommuConfig config);
  VirtioIommu(const VirtioIommu&) = delete;
  VirtioIommu& operator=(const VirtioIommu&) = delete;
  ~VirtioIommu();

  /// One buffer of the request queue. Both spans may lie in guest memory, and stay valid until its answer was taken.
  struct Request {
    std::span<const std::byte> readable;
    std::span<std::byte> writable;
    std::uint64_t cookie = 0;  ///< the VMM's own, for instance the descriptor's index
  };
  struct Answer {
    std::uint64_t cookie = 0;
    std::uint32_t written = 0;  ///< the used length; 0: the request could not be parsed
  };

  /// An endpoint and where its DMA happens (null: emulated). Endpoints of one IOMMU group share a target. Waits.
  /// Errors: busy, limit_reached (its properties do not fit into probe_size), invalid_argument (two MSI regions),
  /// attach's.
  Result<void> add_endpoint(std::uint32_t endpoint, ShadowTarget* target, std::vector<ReservedMemory> reserved);
  Result<void> remove_endpoint(std::uint32_t endpoint);

  std::uint64_t features() const noexcept;
  /// What driver and device agreed on. Waits.
  void set_features(std::uint64_t negotiated);
  /// Config field `bypass` as the driver writes it. Waits. Errors are those of attaching: such an endpoint has no
  /// access.
  Result<void> set_bypass(bool bypass);
  std::array<std::byte, virtio::config_bytes> config_space() const noexcept;
  /// Device reset: every endpoint leaves its domain, every domain goes. Requests not yet answered are dropped.
  Result<void> reset();

  /// What a migrating guest's device is: features, domains with their mappings, which endpoint is where; versioned and
  /// checksummed. Waits. Requests not yet answered stay in the queue's memory: the VMM hands them over there again.
  Result<std::vector<std::byte>> save_state();
  /// Makes this device that one, whose endpoints were added here already. Waits. Errors: bad_format (damaged, another
  /// version, other endpoints), and the hosts' own; the device is as after reset() then.
  Result<void> restore_state(std::span<const std::byte> bytes);

  /// Takes a prefix of the requests and returns its length, short when there are requests_max already.
  std::size_t handle(std::span<const Request> requests) noexcept;
  /// Goes on with what is pending; `done` when every request taken has its answer ready.
  Progress advance() noexcept;
  std::size_t take_answers(std::span<Answer> out) noexcept;
  void wait(std::chrono::nanoseconds timeout) noexcept;
  void finish() noexcept;

  /// RAM was added (the targets have it already), or is about to go. Waits. Errors: the hosts' own; after one of
  /// memory_removing() what a target could not unmap is quarantined there, and the memory must stay.
  Result<void> memory_added() noexcept;
  Result<void> memory_removing(const Region& region) noexcept;

  std::optional<std::pair<std::uint64_t, Access>> translate(std::uint32_t endpoint, std::uint64_t iova) const noexcept;
  /// Why a request of an endpoint is refused; nothing when it is not.
  std::optional<virtio::FaultReason> fault_of(std::uint32_t endpoint, std::uint64_t iova, bool write) const noexcept;
  /// The event queue's record of it.
  static std::array<std::byte, virtio::fault_bytes> fault_record(virtio::FaultReason reason, std::uint32_t endpoint,
                                                                 std::uint64_t iova, bool write) noexcept;

  VirtioIommuStats stats() const noexcept { return stats_; }
  const ShadowDomain* domain(std::uint32_t id) const noexcept;
  const VirtioIommuConfig& config() const noexcept { return config_; }

 private:
  struct Domain;
  struct Endpoint {
    std::uint32_t id = 0;
    ShadowTarget* target = nullptr;
    std::vector<ReservedMemory> reserved;
    Domain* domain = nullptr;  // the one it was attached to; bypass_ or null otherwise
  };
  using Bytes72 = std::array<std::byte, virtio::probe_bytes>;
  struct Slot {
    enum class State : std::uint8_t {
      fresh,
      held,    // copied, and waits for what is before it
      staged,  // waits for its domain's batch
      answered,
      taken,
    };
    Slot() noexcept {}  // NOLINT(modernize-use-equals-default): leaves `bytes` as they are
    Request request;
    std::uint32_t written = 0;
    virtio::Status status = virtio::Status::ok;
    State state = State::fresh;
    Domain* domain = nullptr;  // of a staged one
    Bytes72 bytes;             // the request, once it was looked at the long way, as far as the driver gave any
  };

  Endpoint* find_endpoint(std::uint32_t id) noexcept;
  const Endpoint* find_endpoint(std::uint32_t id) const noexcept;
  Domain* find_domain(std::uint32_t id) noexcept;
  bool bypasses_unattached() const noexcept;
  Result<void> join(Endpoint& endpoint, Domain& domain);
  Result<void> leave(Endpoint& endpoint);
  Result<void> settle(Endpoint& endpoint);
  void drop_domain_if_unused(Domain* domain);
  Domain& make_domain(std::uint32_t id, bool bypass);
  Domain& bypass_domain();
  Result<void> restore_from(StateReader& in);
  void fill_identity(Domain& domain);
  void update_reserved(Domain& domain);
  std::size_t start_common(std::span<const Request> requests) noexcept;
  void finish_start(Slot& slot, Domain* domain, virtio::Status status) noexcept;
  void copy_request(Slot& slot) noexcept;
  bool start_requests() noexcept;
  bool start(const GuestMemory::View& view, Slot& slot, std::uint32_t index) noexcept;
  void answer(Slot& slot, virtio::Status status) noexcept;
  virtio::Status do_attach(const Bytes72& bytes) noexcept;
  virtio::Status do_detach(const Bytes72& bytes) noexcept;
  struct MapWords {
    IovaRange range{};
    std::uint64_t gpa = 0;
    std::uint32_t flags = 0;
  };
  struct UnmapWords {
    IovaRange range{};
    std::uint32_t reserved = 0;
  };
  virtio::Status do_map(const GuestMemory::View& view, const MapWords& words, std::uint32_t tag,
                        Domain* domain) noexcept;
  virtio::Status do_unmap(const GuestMemory::View& view, const UnmapWords& words, std::uint32_t tag,
                          Domain* domain) noexcept;
  void do_probe(const Bytes72& bytes, Slot& slot) noexcept;
  bool commit_domains() noexcept;
  void mark_dirty(Domain& domain) noexcept;

  const GuestMemory& memory_;
  GuestMemory::Reader reader_;  // of the data path: one thread at a time
  VirtioIommuConfig config_;
  std::uint64_t granule_;
  std::uint64_t features_ = 0;
  bool bypass_config_;
  std::vector<std::unique_ptr<Endpoint>> endpoints_;  // by id
  std::vector<std::unique_ptr<Domain>> domains_;      // by id
  std::unique_ptr<Domain> bypass_;                    // RAM as it is, for those who bypass
  Domain* last_domain_ = nullptr;                     // requests come in runs for one domain
  std::vector<Domain*> dirty_;
  std::vector<Slot> slots_;  // room for requests_max
  std::size_t count_ = 0;    // how many are in use
  std::size_t next_ = 0;     // before it none is fresh or held
  std::size_t open_ = 0;     // before it all are answered
  std::size_t taken_ = 0;    // before it all are taken
  VirtioIommuStats stats_;
};

}  // namespace iovane::viommu
