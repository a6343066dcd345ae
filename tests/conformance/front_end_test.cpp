// The vIOMMU front ends on every interface, from guest bytes to a device's DMA: before and after each kind of
// invalidation, request and hypercall, the witness reads and writes where the guest says it may, and nowhere else.
#include <array>
#include <memory>
#include <optional>
#include <vector>

#include "conformance/front_end.hpp"
#include "viommu/papr.hpp"
#include "viommu/virtio_requests.hpp"
#include "viommu/vtd_guest.hpp"

namespace iovane::test {
namespace {

using namespace viommu;

struct CountFailures final : VtdEvents {
  int failures = 0;
  void shadow_failed(std::uint16_t, const Error& error) noexcept override {
    ++failures;
    ADD_FAILURE() << error.message();
  }
};

VtdConfig vtd_config(bool scalable) {
  VtdConfig config;
  config.capabilities.second_levels_mask = 7U << 3;
  config.capabilities.guest_address_width = 48;
  config.capabilities.scalable = scalable;
  config.capabilities.first_level = scalable;
  return config;
}

TEST_P(FrontEndContract, vtd_invalidations_of_every_kind_reach_the_device) {
  CountFailures events;
  Vtd unit{guest_memory_, vtd_config(false), events};
  VtdGuest guest{tables_, unit};
  const std::uint64_t first = guest.new_table();
  const std::uint64_t second = guest.new_table();
  guest.set_context(device_function, first, 4, 1);
  guest.start();
  ASSERT_TRUE(unit.add_endpoint(device_function, std::nullopt, target_.get()));
  std::uint32_t waits = 0;
  const auto flush = [&] {
    guest.wait(++waits);
    guest.ring();
    unit.finish();
    EXPECT_EQ(guest.waited(), waits);
  };
  const auto put = [&](std::uint64_t slot, std::size_t page, std::uint64_t access = 3) {
    guest.put(first, 4, iova(slot), access == 0 ? 0 : gpa(page) | access);
  };

  // Page-selective, with an address mask.
  for (std::uint64_t slot = 0; slot < 4; ++slot) put(slot, slot * 2);
  EXPECT_TRUE(cannot_reach(1, 2)) << "nothing was invalidated yet";
  guest.page(1, iova(0), 2);
  flush();
  for (std::uint64_t slot = 0; slot < 4; ++slot) EXPECT_TRUE(reaches(slot, slot * 2));
  put(1, 0, 0);
  EXPECT_TRUE(reaches(1, 2)) << "not invalidated: the IOTLB may have it";
  guest.page(1, iova(1));
  flush();
  EXPECT_TRUE(cannot_reach(1, 2));
  EXPECT_TRUE(reaches(0, 0));
  EXPECT_TRUE(reaches(2, 4));
  // Other memory at the same address, and fewer rights.
  put(2, 9);
  put(3, 6, 1);
  guest.page(1, iova(2), 1);
  flush();
  EXPECT_TRUE(reaches(2, 9));
  EXPECT_TRUE(reads(*witness_, Iova{iova(3)}, guest_page(6)));
  EXPECT_TRUE(cannot_write(*witness_, Iova{iova(3)}, guest_page(6)));
  // Domain-selective.
  put(0, 0, 0);
  put(16, 20);
  guest.domain(1);
  flush();
  EXPECT_TRUE(cannot_reach(0, 0));
  EXPECT_TRUE(reaches(16, 20));
  // Global: a superpage comes, and is broken up.
  const std::uint64_t big = 0x1020'0000;
  guest.put(first, 4, big, ram_start | 3 | 0x80, 2);
  guest.global();
  flush();
  EXPECT_TRUE(reads(*witness_, Iova{big + 300 * 4096}, guest_page(300)));
  const std::uint64_t broken = guest.new_table();
  for (std::uint64_t i = 0; i < 512; ++i) tables_.store(broken + i * 8, i == 300 ? 0 : gpa(i) | 3);
  guest.put(first, 4, big, broken | 3, 2);
  guest.page(1, big, 9);
  flush();
  EXPECT_TRUE(cannot_read(*witness_, Iova{big + 300 * 4096}, guest_page(300)));
  EXPECT_TRUE(reads(*witness_, Iova{big + 299 * 4096}, guest_page(299)));
  EXPECT_TRUE(reads(*witness_, Iova{big + 301 * 4096}, guest_page(301)));
  // Context cache: the device gets another table.
  guest.put(second, 4, iova(5), gpa(50) | 3);
  guest.set_context(device_function, second, 4, 2);
  EXPECT_TRUE(reaches(16, 20)) << "the old table is still cached";
  guest.context_device(device_function, 1);
  flush();
  EXPECT_TRUE(reaches(5, 50));
  EXPECT_TRUE(cannot_reach(16, 20));
  // The same for all devices of a domain, and for all there are.
  guest.set_context(device_function, first, 4, 1);
  EXPECT_TRUE(reaches(5, 50));
  guest.enqueue(0x21 | 2U << 16, 0);
  flush();
  EXPECT_TRUE(reaches(16, 20));
  EXPECT_TRUE(cannot_reach(5, 50));
  guest.set_context(device_function, second, 4, 2);
  guest.enqueue(0x11, 0);
  flush();
  EXPECT_TRUE(reaches(5, 50));
  EXPECT_TRUE(cannot_reach(16, 20));
  // A device's own cache holds what the host's does: invalidating it alone changes nothing.
  guest.put(second, 4, iova(5), 0);
  guest.enqueue(0x03 | std::uint64_t{device_function} << 32, ~std::uint64_t{0xfff} | 1);
  flush();
  EXPECT_TRUE(reaches(5, 50));
  guest.put(second, 4, iova(5), gpa(50) | 3);
  // Translation off: the device sees memory as it is.
  unit.set_translation(false);
  unit.finish();
  EXPECT_TRUE(reads(*witness_, Iova{gpa(7)}, guest_page(7)));
  EXPECT_TRUE(cannot_reach(5, 50));
  unit.set_translation(true);
  unit.finish();
  EXPECT_TRUE(reaches(5, 50));
  EXPECT_TRUE(cannot_read(*witness_, Iova{gpa(7)}, guest_page(7)));
  ASSERT_TRUE(unit.remove_endpoint(device_function, std::nullopt));
  EXPECT_TRUE(cannot_reach(5, 50));
  EXPECT_EQ(address_space_.stats().live_mappings, 0U);
}

TEST_P(FrontEndContract, vtd_scalable_mode_invalidations_reach_the_device) {
  CountFailures events;
  Vtd unit{guest_memory_, vtd_config(true), events};
  VtdGuest guest{tables_, unit};
  // Root 0x10000, context 0x11000, PASID directory 0x12000, PASID table 0x13000, first-level tables.
  const std::uint64_t table = guest.new_table();
  const std::uint64_t other = guest.new_table();
  tables_.store(VtdGuest::root, 0x1'1001);
  tables_.store(0x1'1000 + device_function * 32, 0x1'2001);
  tables_.store(0x1'2000, 0x1'3001);
  const auto use = [&](std::uint64_t top, std::uint64_t domain) {
    tables_.store(0x1'3008, domain);
    tables_.store(0x1'3010, top);
    tables_.store(0x1'3000, 1 | 1 << 6);
  };
  const auto put = [&](std::uint64_t top, std::uint64_t slot, std::uint64_t entry) {
    std::uint64_t at = top;
    for (unsigned level = 4; level > 1; --level) {
      const std::uint64_t slot_at = at + (iova(slot) >> (12 + 9 * (level - 1)) & 511) * 8;
      if (tables_.load(slot_at) == 0) tables_.store(slot_at, guest.new_table() | 7);
      at = tables_.load(slot_at) & ~0xfffULL;
    }
    tables_.store(at + (iova(slot) >> 12 & 511) * 8, entry);
  };
  use(table, 1);
  unit.set_queue(VtdGuest::queue);
  unit.set_root_table(VtdGuest::root | 0x400);
  unit.set_translation(true);
  ASSERT_TRUE(unit.add_endpoint(device_function, std::nullopt, target_.get()));
  std::uint32_t waits = 0;
  const auto flush = [&](std::uint64_t low, std::uint64_t high) {
    guest.enqueue(low, high);
    guest.wait(++waits);
    guest.ring();
    unit.finish();
    EXPECT_EQ(guest.waited(), waits);
  };
  // PASID-selective, then page-selective within the PASID.
  put(table, 0, gpa(3) | 7);
  put(table, 1, gpa(8) | 7);
  flush(0x26 | 1 << 16, 0);
  EXPECT_TRUE(reaches(0, 3));
  EXPECT_TRUE(reaches(1, 8));
  put(table, 0, 0);
  put(table, 1, gpa(8) | 5);
  EXPECT_TRUE(reaches(0, 3));
  flush(0x36 | 1 << 16, iova(0) | 1);
  EXPECT_TRUE(cannot_reach(0, 3));
  EXPECT_TRUE(reads(*witness_, Iova{iova(1)}, guest_page(8)));
  EXPECT_TRUE(cannot_write(*witness_, Iova{iova(1)}, guest_page(8)));
  // PASID cache: another table, and none.
  put(other, 2, gpa(30) | 7);
  use(other, 2);
  flush(0x17 | 1 << 16, 0);
  EXPECT_TRUE(reaches(2, 30));
  EXPECT_TRUE(cannot_read(*witness_, Iova{iova(1)}, guest_page(8)));
  tables_.store(0x1'3000, 0);
  flush(0x37, 0);
  EXPECT_TRUE(cannot_reach(2, 30));
  // Second-level tables: the PASID cache of a domain, then the IOTLB's pages, domain and all.
  const std::uint64_t second = guest.new_table();
  guest.put(second, 4, iova(3), gpa(33) | 3);
  tables_.store(0x1'3008, 3);
  tables_.store(0x1'3010, 0);
  tables_.store(0x1'3000, second | 1 | 2 << 6 | 2 << 2);
  flush(0x07 | 3U << 16, 0);
  EXPECT_TRUE(reaches(3, 33));
  EXPECT_TRUE(cannot_reach(2, 30));
  guest.put(second, 4, iova(3), 0);
  guest.put(second, 4, iova(4), gpa(34) | 3);
  guest.put(second, 4, iova(9), gpa(39) | 3);
  guest.put(second, 4, iova(40), gpa(40) | 3);
  EXPECT_TRUE(reaches(3, 33));
  flush(0x32 | 3U << 16, iova(0) | 3);  // eight pages
  EXPECT_TRUE(cannot_reach(3, 33));
  EXPECT_TRUE(reaches(4, 34));
  EXPECT_TRUE(cannot_reach(9, 39));
  flush(0x22 | 3U << 16, 0);
  EXPECT_TRUE(reaches(9, 39));
  guest.put(second, 4, iova(9), 0);
  flush(0x12, 0);
  EXPECT_TRUE(cannot_reach(9, 39));
  EXPECT_TRUE(reaches(40, 40));
  tables_.store(0x1'3000, 0);
  flush(0x17 | 3U << 16, 0);
  EXPECT_TRUE(cannot_reach(40, 40));
  EXPECT_EQ(address_space_.stats().live_mappings, 0U);
  ASSERT_TRUE(unit.remove_endpoint(device_function, std::nullopt));
}

TEST_P(FrontEndContract, virtio_iommu_requests_reach_the_device) {
  VirtioIommuConfig config;
  config.bypass_at_boot = false;
  VirtioIommu unit{guest_memory_, config};
  unit.set_features(unit.features());
  ASSERT_TRUE(unit.add_endpoint(8, target_.get(), {}));
  // One notification of them all; their statuses.
  const auto send = [&](const std::vector<std::vector<std::byte>>& requests) {
    std::vector<std::array<std::byte, 4>> tails(requests.size());
    std::vector<VirtioIommu::Request> buffers;
    for (std::size_t i = 0; i < requests.size(); ++i) buffers.push_back({requests[i], tails[i], i});
    EXPECT_EQ(unit.handle(buffers), buffers.size());
    unit.finish();
    std::vector<VirtioIommu::Answer> answers(requests.size());
    EXPECT_EQ(unit.take_answers(answers), answers.size());
    std::vector<virtio::Status> statuses;
    for (const auto& tail : tails) statuses.push_back(static_cast<virtio::Status>(tail[0]));
    return statuses;
  };
  const auto map = [&](std::uint32_t domain, std::uint64_t slot, std::size_t page, std::uint64_t pages,
                       std::uint32_t flags = 3) {
    return map_request(domain, iova(slot), iova(slot + pages) - 1, gpa(page), flags);
  };
  const auto unmap = [&](std::uint32_t domain, std::uint64_t slot, std::uint64_t pages) {
    return unmap_request(domain, iova(slot), iova(slot + pages) - 1);
  };
  using virtio::Status;
  const std::vector<Status> three_ok(3, Status::ok);
  EXPECT_TRUE(cannot_reach(0, 4));
  EXPECT_EQ(send({attach_request(1, 8), map(1, 0, 4, 3), map(1, 8, 20, 1, 1)}), three_ok);
  EXPECT_TRUE(reaches(0, 4));
  EXPECT_TRUE(reaches(2, 6));
  EXPECT_TRUE(reads(*witness_, Iova{iova(8)}, guest_page(20)));
  EXPECT_TRUE(cannot_write(*witness_, Iova{iova(8)}, guest_page(20)));
  EXPECT_EQ(send({unmap(1, 0, 2)}).front(), Status::range) << "it would cut a mapping";
  EXPECT_TRUE(reaches(1, 5));
  EXPECT_EQ(send({unmap(1, 0, 3), map(1, 1, 40, 1), map(1, 8, 41, 1)}),
            (std::vector{Status::ok, Status::ok, Status::invalid}));
  EXPECT_TRUE(cannot_reach(0, 4));
  EXPECT_TRUE(reaches(1, 40));
  EXPECT_TRUE(cannot_reach(2, 6));
  // Another domain, and back; then none.
  EXPECT_EQ(send({attach_request(2, 8), map(2, 3, 60, 1), map(2, 4, 61, 1)}), three_ok);
  EXPECT_TRUE(cannot_reach(1, 40));
  EXPECT_TRUE(reaches(3, 60));
  EXPECT_EQ(send({detach_request(2, 8)}).front(), Status::ok);
  EXPECT_TRUE(cannot_reach(3, 60));
  // Bypass: memory as it is.
  EXPECT_TRUE(unit.set_bypass(true));
  EXPECT_TRUE(reads(*witness_, Iova{gpa(70)}, guest_page(70)));
  EXPECT_TRUE(unit.set_bypass(false));
  EXPECT_TRUE(cannot_read(*witness_, Iova{gpa(70)}, guest_page(70)));
  ASSERT_TRUE(unit.remove_endpoint(8));
  EXPECT_EQ(address_space_.stats().live_mappings, 0U);
}

TEST_P(FrontEndContract, papr_hypercalls_reach_the_device) {
  if (GetParam() == Interface::spapr_v1 || GetParam() == Interface::spapr_v2)
    GTEST_SKIP() << "the guest's second window lies where this container has none; spapr_test.cpp makes windows";
  PaprTce unit{guest_memory_, nullptr};
  PhbConfig phb;
  phb.dma64_address = std::uint64_t{1} << 33;
  ASSERT_TRUE(unit.add_phb(phb));
  ASSERT_TRUE(unit.add_device(0, target_.get()));
  const std::uint32_t liobn = phb.liobn;
  const auto call = [&](std::uint64_t number, std::uint64_t b, std::uint64_t c, std::uint64_t d) {
    return unit.call_and_wait(number, std::array<std::uint64_t, 4>{liobn, b, c, d}).status;
  };
  EXPECT_EQ(call(hcall::put_tce, iova(0), gpa(5) | 3, 0), hcall::success);
  EXPECT_TRUE(reaches(0, 5));
  EXPECT_EQ(call(hcall::put_tce, iova(0), gpa(6) | 1, 0), hcall::success);
  EXPECT_TRUE(reads(*witness_, Iova{iova(0)}, guest_page(6)));
  EXPECT_TRUE(cannot_write(*witness_, Iova{iova(0)}, guest_page(6)));
  EXPECT_EQ(call(hcall::put_tce, iova(0), 0, 0), hcall::success);
  EXPECT_TRUE(cannot_reach(0, 6));
  const std::uint64_t list = 0x2'0000;
  for (std::uint64_t i = 0; i < 8; ++i)
    tables_.store(list + i * 8, __builtin_bswap64(gpa(i < 4 ? 100 + i : 200 + 3 * i) | 3));
  EXPECT_EQ(call(hcall::put_tce_indirect, iova(16), list, 8), hcall::success);
  for (std::uint64_t i = 0; i < 8; ++i) EXPECT_TRUE(reaches(16 + i, i < 4 ? 100 + i : 200 + 3 * i));
  EXPECT_EQ(call(hcall::stuff_tce, iova(18), 0, 4), hcall::success) << "the first four were one mapping: a cut";
  EXPECT_TRUE(reaches(17, 101));
  EXPECT_TRUE(cannot_reach(18, 102));
  EXPECT_TRUE(cannot_reach(20, 212));
  EXPECT_TRUE(reaches(23, 221));
  // A second window of 64 KiB pages, and its removal.
  const auto made = unit.create_window(0, 16, 30);
  ASSERT_EQ(made.status, rtas::success);
  EXPECT_EQ(unit.call_and_wait(hcall::put_tce,
                               std::array<std::uint64_t, 4>{made.liobn, made.address + 0x2'0000, gpa(320) | 3, 0})
                .status,
            hcall::success);
  EXPECT_TRUE(reads(*witness_, Iova{made.address + 0x2'3000}, guest_page(323)));
  EXPECT_EQ(unit.remove_window(made.liobn), rtas::success);
  EXPECT_TRUE(cannot_read(*witness_, Iova{made.address + 0x2'3000}, guest_page(323)));
  EXPECT_TRUE(reaches(17, 101));
  EXPECT_EQ(unit.reset_windows(0), rtas::success);
  EXPECT_TRUE(cannot_reach(17, 101));
  ASSERT_TRUE(unit.remove_device(0, target_.get()));
  EXPECT_EQ(address_space_.stats().live_mappings, 0U);
}

IOVANE_CONFORMANCE(FrontEndContract);

}  // namespace
}  // namespace iovane::test
