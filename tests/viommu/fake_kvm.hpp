// KVM's TCE tables and the hardware tables of VFIO's sPAPR containers, as exact as hypercalls and ioctls were seen to
// be on Linux 6.12 and 7.2 under emulation.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "viommu/guest_memory.hpp"
#include "viommu/kvm_tce.hpp"
#include "viommu/papr.hpp"

namespace iovane::viommu {

/// A container: its hardware table by 4 KiB page. MAP over a live entry replaces silently, UNMAP takes any subset.
class FakeSpaprContainer final : public ShadowTarget {
 public:
  struct Entry {
    RegionId region{};
    std::uint64_t offset = 0;
    Access access = Access::none;
    bool operator==(const Entry&) const = default;
  };
  explicit FakeSpaprContainer(std::string name, bool can_couple = true) : couples{can_couple}, name_{std::move(name)} {}

  bool couples;
  std::vector<TceWindow> windows;  ///< hardware windows; liobn unused
  std::map<std::uint64_t, Entry> hardware;
  std::map<std::uint64_t, bool> known;  ///< pages that userspace believes to have mapped

  const std::string& name() const noexcept override { return name_; }
  Result<std::vector<IovaRange>> usable_ranges() const override { return std::vector{IovaRange::everything()}; }
  Bytes granule() const noexcept override { return {4096}; }
  bool replace_is_atomic() const noexcept override { return true; }
  bool unmap_may_cut() const noexcept override { return true; }
  Result<void> add_region(const Region&) override { return {}; }
  void remove_region(RegionId) noexcept override {}
  Progress submit(std::span<const HostOp> ops, std::vector<OpFailure>&) noexcept override {
    for (const HostOp& op : ops) {
      for (std::uint64_t i = 0; i <= op.range.span(); i += 4096) {
        const std::uint64_t page = op.range.start.value + i;
        if (op.kind == HostOp::Kind::unmap) {
          hardware.erase(page);
          known.erase(page);
        } else {
          hardware[page] = {op.region, op.region_offset + i, op.access};
          known[page] = true;
        }
      }
    }
    return Progress::done;
  }
  Progress poll(std::vector<OpFailure>&) noexcept override { return Progress::done; }
  void wait(std::chrono::nanoseconds) noexcept override {}
  int event_fd() noexcept override { return -1; }

 private:
  std::string name_;
};

class FakeKvm final : public KvmTceHost {
 public:
  explicit FakeKvm(const GuestMemory& memory) : memory_{memory} {}

  bool too_hard = false;  ///< the kernel passes everything on (H_TOO_HARD)

  /// A hypercall by the guest: the kernel's answer, or nothing when it exits to userspace.
  std::optional<std::int64_t> put_tce(std::uint32_t liobn, std::uint64_t bus_address, std::uint64_t tce) {
    const auto found = tables_.find(liobn);
    if (found == tables_.end() || too_hard) return std::nullopt;
    Table& table = *found->second;
    const TceWindow& w = table.window;
    if (bus_address < w.address || (bus_address - w.address) >> w.page_shift >= w.entries) return hcall::parameter;
    if ((bus_address & w.page_mask()) != 0 || (tce & w.page_mask() & ~std::uint64_t{0xfff}) != 0)
      return hcall::parameter;
    const auto view = memory_.view();
    const Region* region = view.find(tce & ~w.page_mask());
    if ((tce & 3) != 0 && region == nullptr) return std::nullopt;  // no memslot
    table.entries_[(bus_address - w.address) >> w.page_shift] = tce;
    for (FakeSpaprContainer* container : table.coupled)
      for (std::uint64_t i = 0; i <= w.page_mask(); i += 4096) {
        if ((tce & 3) == 0) {
          container->hardware.erase(bus_address + i);
        } else {
          container->hardware[bus_address + i] = {region->id, (tce & ~w.page_mask()) - region->gpa + i,
                                                  static_cast<Access>(tce & 3)};
        }
      }
    return hcall::success;
  }

  Result<std::unique_ptr<KvmTceTable>> create(const TceWindow& window) override {
    if (tables_.count(window.liobn) != 0) return make_error(Errc::busy, Stage::open, "the LIOBN has a table");
    auto table = std::make_unique<Table>(*this, window);
    tables_[window.liobn] = table.get();
    return std::unique_ptr<KvmTceTable>{std::move(table)};
  }
  bool can_couple(const ShadowTarget& target) const noexcept override {
    const auto* container = dynamic_cast<const FakeSpaprContainer*>(&target);
    return container != nullptr && container->couples;
  }
  void hand_to_kernel(ShadowTarget& target, const IovaRange& range) noexcept override {
    auto& known = dynamic_cast<FakeSpaprContainer&>(target).known;
    known.erase(known.lower_bound(range.start.value), known.upper_bound(range.last.value));
  }
  Result<void> clear(ShadowTarget& target, const IovaRange& range) noexcept override {
    auto& hardware = dynamic_cast<FakeSpaprContainer&>(target).hardware;
    hardware.erase(hardware.lower_bound(range.start.value), hardware.upper_bound(range.last.value));
    return {};
  }

 private:
  struct Table final : KvmTceTable {
    Table(FakeKvm& kvm, const TceWindow& of) : owner{kvm}, window{of}, entries_(of.entries) {}
    ~Table() override { owner.tables_.erase(window.liobn); }  // hardware entries stay
    std::span<std::uint64_t> entries() noexcept override { return entries_; }
    Result<void> couple(ShadowTarget& target) noexcept override {
      auto* container = dynamic_cast<FakeSpaprContainer*>(&target);
      if (container == nullptr) return make_error(Errc::no_device, Stage::attach, "not a sPAPR group");
      for (const TceWindow& hw : container->windows)
        if (hw.page_shift <= window.page_shift && hw.address == window.address &&
            hw.entries << hw.page_shift == window.entries << window.page_shift) {
          coupled.push_back(container);
          return {};
        }
      return make_error(Errc::invalid_argument, Stage::attach, "no hardware window of that place and size");
    }
    FakeKvm& owner;
    TceWindow window;
    std::vector<std::uint64_t> entries_;
    std::vector<FakeSpaprContainer*> coupled;
  };

  const GuestMemory& memory_;
  std::map<std::uint32_t, Table*> tables_;
};

}  // namespace iovane::viommu
