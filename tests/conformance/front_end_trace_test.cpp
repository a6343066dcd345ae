// What a real guest mapped and unmapped, as its own driver would have written it for each front end, down to a device's
// DMA: before and after each notification the witness reads what is mapped and cannot read what is not.
#include <array>
#include <string>
#include <vector>

#include "conformance/front_end.hpp"
#include "replay/front_end_guest.hpp"
#include "replay/plan.hpp"
#include "trace/format.hpp"

namespace iovane::test {
namespace {

constexpr std::uint64_t events = 2000;
constexpr std::size_t mappings = 4;  // a transfer of the lab's device takes a tenth of a second

// The first mappings that the guest both made and took away, in the order of its events. One unmap may take many.
std::vector<replay::Operation> short_lived(const replay::Plan& plan) {
  const auto& all = plan.operations;
  std::vector<bool> wanted(all.size());
  std::size_t found = 0;
  for (std::size_t u = 0; u < all.size() && found < mappings; ++u) {
    if (all[u].kind == trace::EventKind::map) continue;
    wanted[u] = true;
    for (std::size_t m = u; m-- > 0;) {
      if (!all[m].range.overlaps(all[u].range)) continue;
      if (all[m].kind != trace::EventKind::map) break;
      wanted[m] = true;
      ++found;
    }
  }
  std::vector<replay::Operation> out;
  for (std::size_t i = 0; i < all.size(); ++i)
    if (wanted[i]) out.push_back(all[i]);
  return out;
}

class FrontEndTraces : public FrontEndContract {
 protected:
  // The target of its own guest memory, laid out as the replayed guests expect it.
  void SetUp() override {
    FrontEndContract::SetUp();
    if (HasFatalFailure() || IsSkipped()) return;
    target_.reset();
    auto tables = replay::GuestTables::create();
    ASSERT_TRUE(tables) << tables.error().message();
    guest_tables_ = *std::move(tables);
    ASSERT_TRUE(guest_.add({replay::guest_ram_start, ram_.length(), ram_.data(), -1, 0, false}));
    auto target = viommu::EngineTarget::create(address_space_, guest_);
    ASSERT_TRUE(target) << target.error().message();
    target_ = *std::move(target);
    ASSERT_TRUE(guest_.add({0, Bytes{replay::GuestTables::bytes}, guest_tables_->data(), -1, 0, false}));
  }

  void replay_with(const std::string& trace_name, const std::string& front_end) {
    const auto trace = trace::read_file(std::string{IOVANE_TEST_TRACES} + "/" + trace_name + ".iovtrace");
    ASSERT_TRUE(trace) << trace.error().message();
    const auto plan = replay::make_plan(*trace, events, ram_.length());
    ASSERT_TRUE(plan) << plan.error().message();
    const auto operations = short_lived(*plan);
    ASSERT_GT(operations.size(), mappings);
    auto guest = front_end == "virtio-iommu" ? replay::make_virtio_iommu_guest(guest_, 1)
                 : front_end == "papr"       ? replay::make_papr_guest(guest_, *guest_tables_)
                                             : replay::make_vtd_guest(guest_, *guest_tables_, true);
    ASSERT_TRUE(guest->attach(*target_));
    const auto memory_of = [&](const replay::Operation& op) { return ram_.page(op.memory / os_page_bytes()); };
    std::vector<replay::Operation> live;
    std::size_t maps = 0;
    for (const replay::Operation& op : operations) {
      SCOPED_TRACE(testing::Message() << trace_name << " by " << front_end << ": " << std::hex << op.range.start.value);
      std::vector<replay::Operation> touched;  // what the device looks at: the first mappings; of an unmap two
      const bool map = op.kind == trace::EventKind::map;
      if (map) {
        if (++maps <= mappings) touched.push_back(op);
        for (const replay::Operation& t : touched)
          EXPECT_TRUE(cannot_read(*witness_, t.range.start, memory_of(t))) << "before";
      } else {
        for (const replay::Operation& l : live)
          if (op.range.contains(l.range)) touched.push_back(l);
        ASSERT_FALSE(touched.empty());
        if (touched.size() > 2) touched = {touched.front(), touched.back()};
        for (const replay::Operation& t : touched)
          EXPECT_TRUE(reads(*witness_, t.range.start, memory_of(t))) << "before";
      }
      guest->write({&op, 1});
      std::array<replay::Verdict, 1> verdict;
      guest->notify({&op, 1}, verdict);
      ASSERT_TRUE(verdict[0].error.ok()) << verdict[0].error.message();
      for (const replay::Operation& t : touched)
        EXPECT_TRUE(map ? reads(*witness_, t.range.start, memory_of(t))
                        : cannot_read(*witness_, t.range.start, memory_of(t)));
      if (map) {
        live.push_back(op);
      } else {
        std::erase_if(live, [&](const replay::Operation& l) { return op.range.contains(l.range); });
      }
      if (HasFailure()) return;
    }
    ASSERT_TRUE(guest->detach(*target_));
    EXPECT_EQ(address_space_.stats().live_mappings, 0U);
  }

  std::unique_ptr<replay::GuestTables> guest_tables_;
  viommu::GuestMemory guest_;
};

TEST_P(FrontEndTraces, through_vtd_reach_the_device) {
  for (const char* trace : {"rr4k", "mixed", "seq128k"}) replay_with(trace, "vtd");
}
TEST_P(FrontEndTraces, through_virtio_iommu_reach_the_device) {
  for (const char* trace : {"rr4k", "mixed", "seq128k"}) replay_with(trace, "virtio-iommu");
}
TEST_P(FrontEndTraces, through_papr_reach_the_device) {
  for (const char* trace : {"rr4k", "mixed", "seq128k"}) replay_with(trace, "papr");
}

INSTANTIATE_TEST_SUITE_P(Kernel, FrontEndTraces, testing::Values(Interface::iommufd, Interface::type1_v2),
                         [](const auto& test) { return parameter_name(test.param); });

}  // namespace
}  // namespace iovane::test
