// What a device does wrong, told by the IOMMU: only where the interface delivers it.
#include <gtest/gtest.h>
#include <poll.h>

#include <array>
#include <vector>

#include "conformance/conformance.hpp"
#include "conformance/memory.hpp"

namespace iovane::test {
namespace {

class FaultRecordContract : public Conformance {
 protected:
  /// Waits for records, and takes all there are. A transfer may be several accesses, and each is told.
  std::vector<FaultRecord> told() {
    std::vector<FaultRecord> all;
    for (int attempt = 0; attempt < 10 && all.empty(); ++attempt) {
      pollfd wait{.fd = space_->fault_record_fd(), .events = POLLIN, .revents = 0};
      ::poll(&wait, 1, 1000);
      std::array<FaultRecord, 16> some;
      while (true) {
        const auto got = space_->read_fault_records(some);
        EXPECT_TRUE(got) << got.error().message();
        if (!got || *got == 0) break;
        all.insert(all.end(), some.begin(), some.begin() + static_cast<std::ptrdiff_t>(*got));
      }
    }
    return all;
  }
  void expect_all(const std::vector<FaultRecord>& records, FaultRecord::Reason reason, std::uint64_t page,
                  Access access) {
    EXPECT_FALSE(records.empty());
    for (const FaultRecord& record : records) {
      EXPECT_EQ(record.reason, reason);
      EXPECT_EQ(record.device_id, device_.id.value);
      EXPECT_EQ(record.address.value & ~std::uint64_t{4095}, page);
      EXPECT_EQ(record.access, access);
      EXPECT_FALSE(record.pasid.has_value());
      EXPECT_FALSE(record.execute);
    }
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
  expect_all(told(), FaultRecord::Reason::not_mapped, nowhere, Access::read);

  const IovaRange range = *IovaRange::from_length(Iova{nowhere}, Bytes{4096});
  ASSERT_TRUE(run(*space_, map_op(range, memory.address(), Access::read)).error.ok());
  EXPECT_TRUE(reads(*witness_, range.start, memory.page(0)));
  const std::byte byte{};
  witness_->write(Iova{nowhere + 64}, {&byte, 1});
  expect_all(told(), FaultRecord::Reason::no_permission, nowhere, Access::write);
  EXPECT_EQ(run(*space_, unmap_op(range)).bytes, Bytes{4096});

  std::array<FaultRecord, 8> more;
  const auto rest = space_->read_fault_records(more);
  ASSERT_TRUE(rest) << rest.error().message();
  EXPECT_EQ(*rest, 0U) << "what was allowed is not a fault";
}

IOVANE_CONFORMANCE(FaultRecordContract);

}  // namespace
}  // namespace iovane::test
