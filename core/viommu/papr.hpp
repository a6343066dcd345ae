// PaprTce: PAPR's DMA translation (LoPAR, sections "TCE Hypervisor Calls" and "Dynamic DMA Windows"), shadowed on the
// host.
//
// A PCI host bridge (PHB) has one or two windows of bus addresses; each has a table of translation control entries
// (TCEs) that the guest changes by hypercalls and names by its LIOBN. Everything behind a PHB shares its windows, so a
// PHB is one guest domain: one ShadowDomain, which each host address space behind it mirrors. A host address space may
// be named by several devices; it leaves with the last of them.
//
// Where a table lives. In userspace, every hypercall comes here, changes the table and the shadow. In KVM, the kernel
// answers hypercalls alone and updates the hardware tables of the host groups that were coupled to it; then the table
// is a view of the kernel's pages and the shadow has nothing in that window. A table can be in KVM as long as every
// host address space behind its PHB can be coupled; it moves to userspace when the first one comes that cannot, and
// back when the last such one leaves. A device that is emulated needs no coupling, since it reads the table. During a
// move the VMM must keep the virtual processors out of the guest (it holds them still for a hot plug anyway): entries
// changed between copy and switch would be lost.
//
// While a table is in KVM, the kernel passes on what it cannot do: a list it cannot read, a page that is no guest RAM
// or not registered with a container. Such a call is done here and its entries are the kernel's again afterwards; a
// page that no host can reach is H_PARAMETER and changes nothing, or the hardware would keep the entry before it.
//
// Hypercalls complete when the host is done: call() says `pending` if that takes time; the processor may be answered
// later, or finish() waits. LoPAR's order of checks is QEMU's where it leaves it open: the I/O address is rounded down
// to its page, H_PUT_TCE_INDIRECT and H_STUFF_TCE keep what they did before the entry that failed. A real page number
// that is not aligned to the window's page size is H_PARAMETER, as KVM has it. A host that refuses a change is
// H_HARDWARE, and the entry reads as zero afterwards.
//
// Threads: one at a time; translate() from any thread while windows and devices stay as they are.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "viommu/guest_memory.hpp"
#include "viommu/kvm_tce.hpp"
#include "viommu/shadow_domain.hpp"

namespace iovane::viommu {

class StateReader;

/// Hypercall numbers and return codes (LoPAR).
namespace hcall {
inline constexpr std::uint64_t get_tce = 0x1c;
inline constexpr std::uint64_t put_tce = 0x20;
inline constexpr std::uint64_t stuff_tce = 0x138;
inline constexpr std::uint64_t put_tce_indirect = 0x13c;

inline constexpr std::int64_t success = 0;
inline constexpr std::int64_t hardware = -1;
inline constexpr std::int64_t function = -2;
inline constexpr std::int64_t parameter = -4;

inline constexpr std::uint64_t indirect_entries_max = 512;
}  // namespace hcall

/// RTAS status words.
namespace rtas {
inline constexpr std::int32_t success = 0;
inline constexpr std::int32_t hardware_error = -1;
inline constexpr std::int32_t parameter_error = -3;
}  // namespace rtas

struct PhbConfig {
  std::uint64_t buid = 0;
  std::uint32_t liobn = 0x8000'0000;  ///< of the first window; the second has the next number
  std::uint64_t dma32_address = 0;    ///< the default window
  std::uint64_t dma32_bytes = 0x4000'0000;
  std::uint64_t dma64_address = std::uint64_t{1} << 59;                          ///< where a second window goes
  std::uint64_t page_sizes = (1U << 12) | (1U << 16) | (1U << 21) | (1U << 24);  ///< bit n: 2^n bytes
  std::uint64_t window_entries_max = std::uint64_t{1} << 31;                     ///< as the query call reports it
  std::uint64_t table_bytes_max = std::uint64_t{1} << 32;  ///< larger tables are refused: hardware_error
  bool dynamic_windows = true;
  DomainConfig domain{};  ///< granule, address_bits are set here
};

struct PaprStats {
  std::uint64_t hypercalls = 0;
  std::uint64_t entries_changed = 0;
  std::uint64_t refused = 0;  ///< H_PARAMETER and the like
  std::uint64_t moves_to_kvm = 0;
  std::uint64_t moves_to_user = 0;
};

class PaprTce {
 public:
  /// `kvm` may be null: tables stay in userspace. Both outlive it.
  PaprTce(const GuestMemory& memory, KvmTceHost* kvm);
  PaprTce(const PaprTce&) = delete;
  PaprTce& operator=(const PaprTce&) = delete;
  ~PaprTce();

  /// A PHB with its default window. Errors: busy (buid or liobn is taken), invalid_argument.
  Result<void> add_phb(const PhbConfig& config);
  /// One more device behind a PHB, on this host address space; null: emulated, nothing to do. Waits.
  Result<void> add_device(std::uint64_t buid, ShadowTarget* target);
  /// One device less; the last one of its host address space takes the mappings along. Waits.
  Result<void> remove_device(std::uint64_t buid, ShadowTarget* target);

  struct Answer {
    std::int64_t status = hcall::success;  ///< r3
    std::uint64_t value = 0;               ///< r4, of H_GET_TCE
  };
  /// A hypercall with its arguments r4 to r7. `done`: answer() has it. Precondition: the one before is done.
  Progress call(std::uint64_t number, std::span<const std::uint64_t, 4> arguments) noexcept;
  Progress advance() noexcept;
  const Answer& answer() const noexcept { return answer_; }
  void wait(std::chrono::nanoseconds timeout) noexcept;
  /// call() and wait for its end.
  Answer call_and_wait(std::uint64_t number, std::span<const std::uint64_t, 4> arguments) noexcept;

  /// ibm,query-pe-dma-window.
  struct WindowQuery {
    std::int32_t status = rtas::parameter_error;
    std::uint32_t windows_available = 0;
    std::uint32_t largest_entries = 0;
    std::uint32_t page_sizes =
        0;  ///< LoPAR's mask: 1 4K, 2 64K, 4 16M, 8 32M, 16 64M, 32 128M, 64 256M, 128 16G, 256 2M
  };
  WindowQuery query_window(std::uint64_t buid) const noexcept;
  /// ibm,create-pe-dma-window.
  struct WindowMade {
    std::int32_t status = rtas::parameter_error;
    std::uint32_t liobn = 0;
    std::uint64_t address = 0;
  };
  WindowMade create_window(std::uint64_t buid, std::uint32_t page_shift, std::uint32_t window_shift) noexcept;
  /// ibm,remove-pe-dma-window. Waits.
  std::int32_t remove_window(std::uint32_t liobn) noexcept;
  /// ibm,reset-pe-dma-window: back to the default window, empty. Waits.
  std::int32_t reset_windows(std::uint64_t buid) noexcept;

  /// What a migrating guest's windows and tables are, wherever they live; versioned and checksummed. Waits.
  std::vector<std::byte> save_state();
  /// Makes the windows of the host bridges, which were added here already, those. Waits. Errors: bad_format (damaged,
  /// another version, other host bridges), and the hosts' own; each has its default window, empty, then.
  Result<void> restore_state(std::span<const std::byte> bytes);

  /// What a bus address means: guest physical address, rights, and the page it lies in.
  struct Translation {
    std::uint64_t gpa = 0;
    Access access = Access::none;
    std::uint64_t page_mask = 0;  ///< page size - 1
  };
  Translation translate(std::uint32_t liobn, std::uint64_t bus_address) const noexcept;

  /// RAM was added (the targets have it already), or is about to go. Waits. Errors: the hosts' own; after one of
  /// memory_removing() what a target could not unmap is quarantined there, and the memory must stay.
  Result<void> memory_added() noexcept;
  Result<void> memory_removing(const Region& region) noexcept;

  bool in_kvm(std::uint32_t liobn) const noexcept;
  const ShadowDomain* domain(std::uint64_t buid) const noexcept;
  PaprStats stats() const noexcept { return stats_; }

 private:
  struct Window;
  struct Phb;

  Phb* find_phb(std::uint64_t buid) noexcept;
  const Phb* find_phb(std::uint64_t buid) const noexcept;
  Window* find_window(std::uint32_t liobn) noexcept;
  bool enable(Phb& phb, Window& window, std::uint32_t page_shift, std::uint64_t address, std::uint64_t entries);
  void disable(Phb& phb, Window& window) noexcept;
  Result<void> clear_windows(Phb& phb);
  Result<void> to_default(Phb& phb);
  Result<void> restore_window(StateReader& in, Phb& phb, Window& window);
  void finish() noexcept;
  Result<void> place(Phb& phb, Window& window);
  Result<void> to_kvm(Phb& phb, Window& window);
  Result<void> to_user(Phb& phb, Window& window);
  std::int64_t put(const GuestMemory::View& view, Window& window, std::uint64_t bus_address,
                   std::uint64_t tce) noexcept;
  std::int64_t put_list(const GuestMemory::View& view, Window& window, std::uint64_t bus_address, std::uint64_t list,
                        std::uint64_t count) noexcept;
  std::int64_t stuff(const GuestMemory::View& view, Window& window, std::uint64_t bus_address, std::uint64_t tce,
                     std::uint64_t count) noexcept;
  std::int64_t shadow(const GuestMemory::View& view, Window& window, std::uint64_t first, std::uint64_t count,
                      std::uint64_t tce) noexcept;
  static bool acceptable(const GuestMemory::View& view, const Window& window, std::uint64_t tce) noexcept;
  void give_to_kernel(Window& window, std::uint64_t first, std::uint64_t count) noexcept;
  Progress settle(Progress progress) noexcept;

  const GuestMemory& memory_;
  GuestMemory::Reader reader_;  // of the data path: one thread at a time
  KvmTceHost* kvm_;
  std::vector<std::unique_ptr<Phb>> phbs_;
  Window* last_window_ = nullptr;  // hypercalls come in runs for one
  Phb* pending_ = nullptr;         // its batch belongs to the hypercall in progress
  Window* pending_window_ = nullptr;
  std::uint64_t pending_first_ = 0;  // entries of that window which the hypercall touched
  std::uint64_t pending_count_ = 0;
  Answer answer_{};
  PaprStats stats_;
};

}  // namespace iovane::viommu
