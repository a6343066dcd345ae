// Smmuv3Direct: an emulated SMMUv3 whose first stage is the guest's own tables, walked by the host's SMMUv3.
//
// The VMM keeps the registers and tells about the writes that matter: stream table, command queue, event queue, enable,
// and the queue indices. The guest's stream table says what happens to each device: its entry goes to the host as it
// is, with the context descriptors and tables that it leads to, because guest memory lies in the host's second stage at
// its own addresses. Invalidations go to the host as arrays, one array between two CMD_SYNCs. What the hardware records
// about the guest's devices comes back into the guest's event queue. No table of the guest is ever read here.
//
// What the guest must see: S1P without S2P, AArch64 tables, a 4 KiB granule, and what else the host's SMMU has
// (GuestNesting::first_stage()); no stall model, no PRI. The doorbell for interrupts has to be in the guest's tables,
// as on any SMMUv3.
//
// Source: Arm IHI 0070: 4 (commands), 5.2 (stream table), 6.3 (registers), 7 (event queue).
// Threads: one at a time.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "backends/stage1/guest_nesting.hpp"
#include "viommu/guest_memory.hpp"

namespace iovane::viommu {

struct Smmuv3Stats {
  std::uint64_t commands = 0;
  std::uint64_t forwarded = 0;        ///< invalidations that went to the host
  std::uint64_t arrays = 0;           ///< calls they took
  std::uint64_t stream_entries = 0;   ///< entries of the stream table that were put into effect
  std::uint64_t refused_entries = 0;  ///< that say what this SMMU or the host's cannot; the device is blocked
  std::uint64_t events = 0;           ///< records written into the guest's queue
  std::uint64_t lost_events = 0;
};

class Smmuv3Direct {
 public:
  /// Both outlive it; the guest's RAM regions are in both.
  Smmuv3Direct(const GuestMemory& memory, backends::stage1::GuestNesting& host) : memory_{memory}, host_{host} {}

  /// A device that `host` has under that stream number. It follows the stream table from now on.
  Result<void> add_endpoint(std::uint32_t stream, backends::DeviceId device);
  void remove_endpoint(std::uint32_t stream) noexcept { endpoints_.erase(stream); }

  /// STRTAB_BASE and STRTAB_BASE_CFG.
  void set_stream_table(std::uint64_t base, std::uint32_t config) noexcept;
  /// CMDQ_BASE: the index is 0 afterwards.
  void set_command_queue(std::uint64_t base) noexcept;
  /// EVENTQ_BASE: both indices are 0 afterwards.
  void set_event_queue(std::uint64_t base) noexcept;
  /// CR0.SMMUEN. Off: all devices reach guest memory as it is (GBPA without ABORT).
  Result<void> set_enabled(bool enabled);

  /// CMDQ_PROD was written, the queue is on.
  enum class CommandError : std::uint8_t { none = 0, illegal = 1, abort = 2 };
  struct CommandsDone {
    std::uint32_t cons = 0;                   ///< CMDQ_CONS: index and wrap bit
    CommandError error = CommandError::none;  ///< CMDQ_CONS.ERR, and GERROR.CMDQ_ERR toggles
    std::uint32_t interrupts = 0;             ///< CMD_SYNCs that want one; messages to memory are written already
  };
  CommandsDone write_command_tail(std::uint32_t prod) noexcept;

  /// Moves what the host has recorded into the guest's event queue, as far as there is room before `cons`. The result
  /// is EVENTQ_PROD: index, wrap bit, and bit 31 (OVFLG), which toggles when records were lost.
  Result<std::uint32_t> deliver_events(std::uint32_t cons) noexcept;

  const Smmuv3Stats& stats() const noexcept { return stats_; }

 private:
  using Command = backends::stage1::smmuv3::Command;
  struct Ring {
    std::uint64_t base = 0;
    unsigned log2_entries = 0;
    std::uint32_t mask() const noexcept { return (1U << log2_entries) - 1; }
    std::uint32_t index(std::uint32_t pointer) const noexcept { return pointer & mask(); }
    /// With the wrap bit.
    std::uint32_t pointer(std::uint32_t value) const noexcept { return value & (2 * mask() + 1); }
    std::uint32_t next(std::uint32_t value) const noexcept { return pointer(value + 1); }
    bool full(std::uint32_t prod, std::uint32_t cons) const noexcept { return pointer(prod ^ cons) == mask() + 1; }
  };
  static Ring ring_of(std::uint64_t base) noexcept;

  CommandError execute(const GuestMemory::View& view, const Command& command, CommandsDone& done) noexcept;
  bool flush() noexcept;
  void apply(const GuestMemory::View& view, std::uint32_t stream, backends::DeviceId device) noexcept;
  void apply_all() noexcept;
  bool read_entry(const GuestMemory::View& view, std::uint32_t stream, std::uint64_t (&words)[2]) const noexcept;

  const GuestMemory& memory_;
  backends::stage1::GuestNesting& host_;
  std::map<std::uint32_t, backends::DeviceId> endpoints_;
  std::uint64_t table_base_ = 0;
  unsigned table_log2_ = 0, table_split_ = 0;
  bool two_level_ = false;
  bool enabled_ = false;
  Ring commands_, events_;
  std::uint32_t command_cons_ = 0, event_prod_ = 0;
  bool overflow_ = false;
  std::vector<Command> batch_;
  Smmuv3Stats stats_;
};

}  // namespace iovane::viommu
