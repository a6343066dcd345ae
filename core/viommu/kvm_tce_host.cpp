#include "viommu/kvm_tce_host.hpp"

#include "base/error_text.hpp"
#include "viommu/backend_target.hpp"

namespace iovane::viommu {
namespace {

class Table final : public KvmTceTable {
 public:
  explicit Table(std::unique_ptr<backends::KvmTable> table) noexcept : table_{std::move(table)} {}
  std::span<std::uint64_t> entries() noexcept override { return table_->entries(); }
  Result<void> couple(ShadowTarget& target) noexcept override {
    auto* const behind = dynamic_cast<BackendTarget*>(&target);
    if (behind == nullptr)
      return base::fail(Errc::unsupported, Stage::attach, 0, "{} is not on a container that KVM knows", target.name());
    try {
      return table_->couple(behind->space());
    } catch (...) {
      return make_error(Errc::out_of_memory, Stage::attach, "no memory to remember the table's groups");
    }
  }

 private:
  std::unique_ptr<backends::KvmTable> table_;
};

}  // namespace

Result<std::unique_ptr<KvmTceTable>> KvmSpaprHost::create(const TceWindow& window) {
  auto made = kvm_.create_table(
      {.liobn = window.liobn, .page_shift = window.page_shift, .address = window.address, .entries = window.entries});
  if (!made) return made.error();
  return std::unique_ptr<KvmTceTable>{std::make_unique<Table>(*std::move(made))};
}

bool KvmSpaprHost::can_couple(const ShadowTarget& target) const noexcept {
  const auto* const behind = dynamic_cast<const BackendTarget*>(&target);
  return kvm_.can_couple() && behind != nullptr && behind->space().facts().interface == backends::Interface::spapr_v2;
}

void KvmSpaprHost::hand_to_kernel(ShadowTarget& target, const IovaRange& range) noexcept {
  if (auto* const behind = dynamic_cast<BackendTarget*>(&target); behind != nullptr)
    behind->space().spapr()->hand_to_kernel(range);
}

Result<void> KvmSpaprHost::clear(ShadowTarget& target, const IovaRange& range) noexcept {
  auto* const behind = dynamic_cast<BackendTarget*>(&target);
  return behind != nullptr ? behind->space().spapr()->clear_handed(range) : Result<void>{};
}

}  // namespace iovane::viommu
