// What a device does wrong, told by the IOMMU: only where the interface delivers it.
#include <gtest/gtest.h>
#include <poll.h>

#include "conformance/conformance.hpp"
#include "conformance/memory.hpp"

namespace iovane::test {
namespace {

class FaultRecordContract : public Conformance {
 protected:
  /// The next record that is not about a loss; reason `lost` when none comes in time.
  FaultRecord next() {
    FaultRecord record;
    record.reason = FaultRecord::Reason::lost;
    for (int attempt = 0; attempt < 10; ++attempt) {
      pollfd wait{.fd = space_->fault_record_fd(), .events = POLLIN, .revents = 0};
      ::poll(&wait, 1, 1000);
      const auto got = space_->read_fault_records({&record, 1});
      EXPECT_TRUE(got) << got.error().message();
      if (got && *got == 1 && record.reason != FaultRecord::Reason::lost) return record;
    }
    record.reason = FaultRecord::Reason::lost;
    return record;
  }
};

TEST_P(FaultRecordContract, a_device_that_strays_is_named_with_address_and_access) {
  make_default();
  if (space_->fault_record_fd() < 0) {
    std::array<FaultRecord, 1> none;
    const auto refused = space_->read_fault_records(none);
    EXPECT_EQ(refused.error().code, Errc::unsupported) << refused.error().message();
    EXPECT_NE(GetParam(), Interface::stage1);
    return;
  }
  constexpr std::uint64_t nowhere = 0x4'5678'9000;
  const Memory memory{1};
  (void)witness_->read(Iova{nowhere}, 16);
  FaultRecord record = next();
  EXPECT_EQ(record.reason, FaultRecord::Reason::not_mapped);
  EXPECT_EQ(record.device_id, device_.id.value);
  EXPECT_EQ(record.address.value & ~std::uint64_t{4095}, nowhere);
  EXPECT_EQ(record.access, Access::read);
  EXPECT_FALSE(record.pasid.has_value());

  const IovaRange range = *IovaRange::from_length(Iova{nowhere}, Bytes{4096});
  ASSERT_TRUE(run(*space_, map_op(range, memory.address(), Access::read)).error.ok());
  EXPECT_TRUE(reads(*witness_, range.start, memory.page(0)));
  const std::byte byte{};
  witness_->write(Iova{nowhere + 64}, {&byte, 1});
  record = next();
  EXPECT_EQ(record.reason, FaultRecord::Reason::no_permission);
  EXPECT_EQ(record.device_id, device_.id.value);
  EXPECT_EQ(record.address.value & ~std::uint64_t{4095}, nowhere);
  EXPECT_EQ(record.access, Access::write);
  EXPECT_EQ(run(*space_, unmap_op(range)).bytes, Bytes{4096});

  std::array<FaultRecord, 8> more;
  const auto rest = space_->read_fault_records(more);
  ASSERT_TRUE(rest) << rest.error().message();
  EXPECT_EQ(*rest, 0U) << "what was allowed is not a fault";
}

IOVANE_CONFORMANCE(FaultRecordContract);

}  // namespace
}  // namespace iovane::test
