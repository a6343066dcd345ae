#include "viommu/virtio_iommu.hpp"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

#include "recorded_data.hpp"
#include "viommu/recording_target.hpp"
#include "virtio_requests.hpp"

namespace iovane::viommu {
namespace {

using virtio::Status;

// What a driver sees of one request: the status, or nothing when the device did not write.
std::optional<Status> ask(VirtioIommu& device, const std::vector<std::byte>& request, std::size_t out_bytes = 4,
                          std::vector<std::byte>* properties = nullptr) {
  std::vector<std::byte> out(out_bytes, std::byte{0xee});
  const VirtioIommu::Request one{request, out, 42};
  EXPECT_EQ(device.handle({&one, 1}), 1U);
  device.finish();
  VirtioIommu::Answer answer;
  EXPECT_EQ(device.take_answers({&answer, 1}), 1U);
  EXPECT_EQ(answer.cookie, 42U);
  if (answer.written == 0) {
    for (const std::byte b : out) EXPECT_EQ(b, std::byte{0xee}) << "an unparsable request's buffer is not written";
    return std::nullopt;
  }
  EXPECT_EQ(answer.written, out_bytes);
  for (std::size_t i = out_bytes - 3; i < out_bytes; ++i) EXPECT_EQ(out[i], std::byte{0}) << "reserved";
  if (properties != nullptr) *properties = out;
  return static_cast<Status>(out[out_bytes - 4]);
}

VirtioIommuConfig strict_config() {
  VirtioIommuConfig config;
  config.bypass_at_boot = false;
  config.input_range = {Iova{0x1000}, Iova{0xffff'ffff'ffff}};
  config.domain_first = 1;
  config.domain_last = 1000;
  return config;
}

constexpr std::uint32_t rw = virtio::map_read | virtio::map_write;

struct VirtioIommuTest : ::testing::Test {
  GuestRam ram{1U << 30};
  GuestMemory memory;
  RecordingTarget host;
  VirtioIommu device{memory, strict_config()};
  void SetUp() override {
    ASSERT_TRUE(memory.add(ram.config()));
    device.set_features(device.features());
    host.usable = {{Iova{0}, Iova{0xfedf'ffff}}, {Iova{0xfef0'0000}, Iova{0xffff'ffff'ffff}}};
    ASSERT_TRUE(device.add_endpoint(8, &host, {}));
  }
  void TearDown() override { static_cast<void>(device.remove_endpoint(8)); }
};

TEST_F(VirtioIommuTest, MapsUnmapsAndDetaches) {
  EXPECT_EQ(ask(device, attach_request(1, 8)), Status::ok);
  EXPECT_EQ(ask(device, map_request(1, 0x10000, 0x1ffff, 0x200000, rw)), Status::ok);
  ASSERT_EQ(host.held().size(), 1U);
  EXPECT_EQ(host.held().begin()->second.range, (IovaRange{Iova{0x10000}, Iova{0x1ffff}}));
  EXPECT_EQ(device.translate(8, 0x10123)->first, 0x200123U);
  EXPECT_EQ(ask(device, unmap_request(1, 0x10000, 0x1ffff)), Status::ok);
  EXPECT_TRUE(host.held().empty());
  EXPECT_EQ(ask(device, map_request(1, 0x10000, 0x1ffff, 0x200000, virtio::map_read)), Status::ok);
  EXPECT_EQ(ask(device, detach_request(1, 8)), Status::ok);
  EXPECT_TRUE(host.held().empty());
  EXPECT_EQ(device.domain(1), nullptr) << "a domain without endpoints ceases to exist";
  EXPECT_EQ(ask(device, attach_request(1, 8)), Status::ok);
  EXPECT_TRUE(host.held().empty()) << "and a new one is empty";
}

// The specification's statuses, section by section of 5.13.6.
TEST_F(VirtioIommuTest, EveryBadRequestHasItsStatus) {
  EXPECT_EQ(ask(device, {}), std::nullopt);
  EXPECT_EQ(ask(device, RequestBytes{static_cast<virtio::RequestType>(9)}.add(~0ULL).add(~0ULL).done()), std::nullopt)
      << "an unknown type";
  auto request = attach_request(1, 8);
  EXPECT_EQ(ask(device, request, 3), std::nullopt) << "no room for the tail";
  request.pop_back();
  EXPECT_EQ(ask(device, request), std::nullopt) << "too short for its type";
  // ATTACH
  EXPECT_EQ(ask(device, attach_request(1, 8, 0, 1)), Status::invalid) << "reserved";
  EXPECT_EQ(ask(device, attach_request(1, 8, 2)), Status::invalid) << "unknown flag";
  EXPECT_EQ(ask(device, attach_request(1, 9)), Status::not_found) << "no such endpoint";
  EXPECT_EQ(ask(device, attach_request(0, 8)), Status::range) << "below domain_range";
  EXPECT_EQ(ask(device, attach_request(1001, 8)), Status::range);
  EXPECT_EQ(ask(device, attach_request(1, 8)), Status::ok);
  EXPECT_EQ(ask(device, attach_request(1, 8)), Status::ok) << "again is fine";
  EXPECT_EQ(ask(device, attach_request(1, 8, virtio::attach_bypass)), Status::invalid) << "inconsistent bypass flag";
  // DETACH
  EXPECT_EQ(ask(device, detach_request(1, 9)), Status::not_found);
  EXPECT_EQ(ask(device, detach_request(2, 8)), Status::invalid) << "not attached to that one";
  // MAP
  EXPECT_EQ(ask(device, map_request(7, 0x10000, 0x1ffff, 0, rw)), Status::not_found);
  EXPECT_EQ(ask(device, map_request(1, 0x10001, 0x1ffff, 0, rw)), Status::range) << "virt_start";
  EXPECT_EQ(ask(device, map_request(1, 0x10000, 0x1fffe, 0, rw)), Status::range) << "virt_end + 1";
  EXPECT_EQ(ask(device, map_request(1, 0x10000, 0x1ffff, 0x800, rw)), Status::range) << "phys_start";
  EXPECT_EQ(ask(device, map_request(1, 0, 0xfff, 0, rw)), Status::range) << "below input_range";
  EXPECT_EQ(ask(device, map_request(1, 0xffff'ffff'f000, 0x1'0000'0000'0fff, 0, rw)), Status::range) << "above it";
  EXPECT_EQ(ask(device, map_request(1, 0x20000, 0x1ffff, 0, rw)), Status::invalid) << "no range";
  EXPECT_EQ(ask(device, map_request(1, 0x10000, 0x1ffff, 0, 8)), Status::invalid) << "unknown flag";
  EXPECT_EQ(ask(device, map_request(1, 0x10000, 0x1ffff, 0, 0)), Status::invalid) << "no access";
  EXPECT_EQ(ask(device, map_request(1, 0x10000, 0x1ffff, 0xffff'ffff'ffff'0000, rw)), Status::range);
  EXPECT_EQ(ask(device, map_request(1, 0x10000, 0x2ffff, 0xffff'ffff'ffff'0000, rw)), Status::range) << "wraps";
  EXPECT_EQ(ask(device, map_request(1, 0xfee0'0000, 0xfee0'0fff, 0, rw)), Status::invalid) << "reserved memory";
  EXPECT_EQ(ask(device, map_request(1, 0x10000, 0x1ffff, 0, rw)), Status::ok);
  EXPECT_EQ(ask(device, map_request(1, 0x1f000, 0x20fff, 0, rw)), Status::invalid) << "something is mapped there";
  // UNMAP, with the specification's numbered examples in units of 4 KiB
  EXPECT_EQ(ask(device, unmap_request(7, 0, 0xfff)), Status::not_found);
  EXPECT_EQ(ask(device, unmap_request(1, 0x1000, 0xfff)), Status::invalid);
  EXPECT_EQ(ask(device, unmap_request(1, 0x10000, 0x1ffff, 1)), Status::invalid) << "reserved";
  EXPECT_EQ(ask(device, unmap_request(1, 0x10000, 0x14fff)), Status::range) << "(4) would split";
  EXPECT_EQ(ask(device, unmap_request(1, 0x14000, 0x1ffff)), Status::range);
  EXPECT_EQ(ask(device, unmap_request(1, 0x14000, 0x15fff)), Status::range);
  EXPECT_EQ(host.held().size(), 1U) << "nothing was removed";
  EXPECT_EQ(ask(device, unmap_request(1, 0x40000, 0x44fff)), Status::ok) << "(1) nothing there";
  EXPECT_EQ(ask(device, map_request(1, 0x20000, 0x24fff, 0, rw)), Status::ok);
  EXPECT_EQ(ask(device, unmap_request(1, 0x20000, 0x24fff)), Status::ok) << "(5) one of two neighbours";
  EXPECT_EQ(ask(device, map_request(1, 0x30000, 0x34fff, 0, rw)), Status::ok);
  EXPECT_EQ(ask(device, unmap_request(1, 0, 0xffff'ffff'ffff)), Status::ok) << "(7) several, with holes";
  EXPECT_TRUE(host.held().empty());
  // Without the MMIO feature, its flag is unknown.
  EXPECT_EQ(ask(device, map_request(1, 0x10000, 0x1ffff, 0, rw | virtio::map_mmio)), Status::ok);
  device.set_features(device.features() & ~virtio::feature_mmio);
  EXPECT_EQ(ask(device, map_request(1, 0x50000, 0x5ffff, 0, rw | virtio::map_mmio)), Status::invalid);
}

TEST_F(VirtioIommuTest, ProbeListsReservedMemory) {
  RecordingTarget other{"other"};
  other.usable = host.usable;
  const IovaRange msi{Iova{0x800'0000}, Iova{0x80f'ffff}};
  ASSERT_TRUE(device.add_endpoint(9, &other, {{msi, true}}));
  EXPECT_EQ(ask(device, probe_request(77), 516), Status::not_found);
  EXPECT_EQ(ask(device, probe_request(9), 515), Status::invalid) << "properties smaller than probe_size";
  std::vector<std::byte> out;
  EXPECT_EQ(ask(device, probe_request(9), 516, &out), Status::ok);
  const auto le = [&](std::size_t at, std::size_t n) {
    std::uint64_t v = 0;
    for (std::size_t i = 0; i < n; ++i) v |= std::uint64_t{static_cast<unsigned char>(out[at + i])} << (8 * i);
    return v;
  };
  EXPECT_EQ(le(0, 2), 1U);
  EXPECT_EQ(le(2, 2), 20U);
  EXPECT_EQ(le(4, 4), 1U) << "MSI";
  EXPECT_EQ(le(8, 8), msi.start.value);
  EXPECT_EQ(le(16, 8), msi.last.value);
  EXPECT_EQ(le(24 + 4, 4), 0U);
  EXPECT_EQ(le(24 + 8, 8), 0xfee0'0000U) << "the host's own hole";
  EXPECT_EQ(le(24 + 16, 8), 0xfeef'ffffU);
  EXPECT_EQ(le(48, 2), 0U) << "the list ends";
  for (std::size_t i = 48; i < 512; ++i) EXPECT_EQ(out[i], std::byte{0});
  std::vector<ReservedMemory> many;
  for (std::uint64_t i = 0; i < 30; ++i) many.push_back({{Iova{i << 20}, Iova{(i << 20) + 0xfff}}, false});
  EXPECT_EQ(device.add_endpoint(10, nullptr, many).error().code, Errc::limit_reached);
  EXPECT_EQ(device.add_endpoint(11, nullptr, {{msi, true}, {msi, true}}).error().code, Errc::invalid_argument);
  ASSERT_TRUE(device.remove_endpoint(9));
}

TEST_F(VirtioIommuTest, BypassIsTheIdentityAndOnlyWhereAllowed) {
  EXPECT_FALSE(device.translate(8, 0x1000));
  EXPECT_EQ(device.fault_of(8, 0x1000, false), virtio::FaultReason::domain);
  ASSERT_TRUE(device.set_bypass(true));
  EXPECT_EQ(host.held().size(), 1U);
  EXPECT_EQ(device.translate(8, 0x1000)->first, 0x1000U);
  EXPECT_EQ(ask(device, attach_request(3, 8)), Status::ok);
  EXPECT_TRUE(host.held().empty()) << "attached: no bypass";
  EXPECT_EQ(device.fault_of(8, 0x1000, false), virtio::FaultReason::mapping);
  EXPECT_EQ(ask(device, detach_request(3, 8)), Status::ok);
  EXPECT_EQ(host.held().size(), 1U) << "detached: bypass again";
  ASSERT_TRUE(device.set_bypass(false));
  EXPECT_TRUE(host.held().empty());
  EXPECT_EQ(ask(device, attach_request(4, 8, virtio::attach_bypass)), Status::ok);
  EXPECT_EQ(host.held().size(), 1U);
  EXPECT_EQ(ask(device, map_request(4, 0x10000, 0x1ffff, 0, rw)), Status::invalid) << "on a bypass domain";
  EXPECT_EQ(ask(device, unmap_request(4, 0x10000, 0x1ffff)), Status::invalid);
  EXPECT_EQ(static_cast<int>(device.config_space()[36]), 0);
  device.set_features(0);
  EXPECT_EQ(ask(device, attach_request(5, 8, virtio::attach_bypass)), Status::invalid) << "not negotiated";
  ASSERT_TRUE(device.reset());
  EXPECT_TRUE(host.held().empty());
}

TEST_F(VirtioIommuTest, EndpointsOfOneGroupShareADomainOrNone) {
  ASSERT_TRUE(device.add_endpoint(9, &host, {}));  // the same host address space
  EXPECT_EQ(ask(device, attach_request(1, 8)), Status::ok);
  EXPECT_EQ(ask(device, attach_request(2, 9)), Status::unsupported);
  EXPECT_EQ(ask(device, attach_request(1, 9)), Status::ok);
  EXPECT_EQ(ask(device, map_request(1, 0x10000, 0x1ffff, 0, rw)), Status::ok);
  EXPECT_EQ(ask(device, detach_request(1, 8)), Status::ok);
  EXPECT_EQ(host.held().size(), 1U) << "endpoint 9 is still there";
  RecordingTarget holed{"holed"};
  ASSERT_TRUE(device.add_endpoint(10, &holed, {{{Iova{0x18000}, Iova{0x18fff}}, false}}));
  EXPECT_EQ(ask(device, attach_request(1, 10)), Status::unsupported) << "its reserved memory is mapped";
  EXPECT_EQ(ask(device, unmap_request(1, 0x10000, 0x1ffff)), Status::ok);
  EXPECT_EQ(ask(device, attach_request(1, 10)), Status::ok);
  EXPECT_EQ(ask(device, map_request(1, 0x10000, 0x1ffff, 0, rw)), Status::invalid);
  ASSERT_TRUE(device.remove_endpoint(9));
  ASSERT_TRUE(device.remove_endpoint(10));
}

TEST_F(VirtioIommuTest, AHostThatFailsIsReportedAndLeavesNoMapping) {
  EXPECT_EQ(ask(device, attach_request(1, 8)), Status::ok);
  host.fault = [](const HostOp& op) {
    if (op.kind == HostOp::Kind::unmap) return Error{};
    return op.range.start.value == 0x10000 ? make_error(Errc::memlock_exceeded, Stage::pin, "limit")
                                           : make_error(Errc::io_error, Stage::map, "broken");
  };
  EXPECT_EQ(ask(device, map_request(1, 0x10000, 0x1ffff, 0, rw)), Status::no_memory);
  EXPECT_EQ(ask(device, map_request(1, 0x20000, 0x2ffff, 0, rw)), Status::device_error);
  EXPECT_FALSE(device.translate(8, 0x10000));
  host.fault = nullptr;
  EXPECT_EQ(ask(device, map_request(1, 0x10000, 0x1ffff, 0, rw)), Status::ok);
}

TEST_F(VirtioIommuTest, ANotificationIsOneBatchAnsweredInOrderWhenItIsDone) {
  EXPECT_EQ(ask(device, attach_request(1, 8)), Status::ok);
  host.asynchronous = true;
  std::vector<std::vector<std::byte>> bytes;
  for (std::uint64_t i = 0; i < 20; ++i)
    bytes.push_back(map_request(1, (0x100 + i) << 12, ((0x101 + i) << 12) - 1, i << 12, rw));
  bytes.push_back(map_request(1, 0x100000, 0x100fff, 0, rw));  // overlaps the first: INVAL, but in its turn
  bytes.push_back(detach_request(1, 8));                       // waits for all of them
  std::vector<std::array<std::byte, 4>> out(bytes.size());
  std::vector<VirtioIommu::Request> requests;
  for (std::size_t i = 0; i < bytes.size(); ++i) requests.push_back({bytes[i], out[i], i});
  const auto batches = host.batches();
  EXPECT_EQ(device.handle(requests), requests.size());
  std::array<VirtioIommu::Answer, 64> answers{};
  EXPECT_EQ(device.take_answers(answers), 0U) << "not before the host is done";
  EXPECT_EQ(device.advance(), Progress::pending);
  EXPECT_EQ(host.batches(), batches + 1);
  EXPECT_EQ(host.held().size(), 0U);
  host.finish();
  host.asynchronous = false;  // DETACH waits for its host
  EXPECT_EQ(device.advance(), Progress::done);
  ASSERT_EQ(device.take_answers(answers), requests.size());
  for (std::size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ(answers[i].cookie, i);
    EXPECT_EQ(answers[i].written, 4U);
    EXPECT_EQ(static_cast<Status>(out[i][0]), i == 20 ? Status::invalid : Status::ok) << i;
  }
  EXPECT_TRUE(host.held().empty());
}

TEST_F(VirtioIommuTest, TheDeviceGoesToAnotherHost) {
  RecordingTarget second{"second"};
  ASSERT_TRUE(device.add_endpoint(9, &second, {}));
  ASSERT_TRUE(device.add_endpoint(10, nullptr, {}));
  EXPECT_EQ(ask(device, attach_request(1, 8)), Status::ok);
  EXPECT_EQ(ask(device, attach_request(7, 9)), Status::ok);
  for (std::uint64_t i = 1; i < 40; ++i)
    EXPECT_EQ(ask(device, map_request(i % 2 == 0 ? 1 : 7, i << 16, (i << 16) + 0x2fff, i << 13, rw)), Status::ok);
  const auto bytes = device.save_state();
  ASSERT_TRUE(bytes);
  RecordingTarget host_there;
  RecordingTarget second_there;
  VirtioIommu there{memory, strict_config()};
  ASSERT_TRUE(there.add_endpoint(8, &host_there, {}));
  ASSERT_TRUE(there.add_endpoint(9, &second_there, {}));
  EXPECT_EQ(there.restore_state(*bytes).error().code, Errc::bad_format) << "endpoint 10 is missing";
  ASSERT_TRUE(there.add_endpoint(10, nullptr, {}));
  for (std::size_t i = 0; i < bytes->size(); i += 5) {
    auto damaged = *bytes;
    damaged[i] ^= std::byte{2};
    ASSERT_EQ(there.restore_state(damaged).error().code, Errc::bad_format) << i;
  }
  ASSERT_TRUE(there.restore_state(*bytes));
  EXPECT_EQ(*there.save_state(), *bytes);
  EXPECT_EQ(host_there.held(), host.held());
  EXPECT_EQ(second_there.held(), second.held());
  // It goes on as one device.
  EXPECT_EQ(ask(there, unmap_request(1, 2 << 16, (2 << 16) + 0x2fff)), Status::ok);
  EXPECT_EQ(host_there.held().size(), host.held().size() - 1);
  host_there.fault = [](const HostOp& op) {
    return op.kind == HostOp::Kind::map ? make_error(Errc::entry_limit, Stage::map, "full") : Error{};
  };
  EXPECT_EQ(there.restore_state(*bytes).error().code, Errc::entry_limit);
  EXPECT_TRUE(host_there.held().empty());
  EXPECT_TRUE(second_there.held().empty());
  EXPECT_EQ(there.domain(1), nullptr);
  for (const std::uint32_t id : {8U, 9U, 10U}) ASSERT_TRUE(there.remove_endpoint(id));
  ASSERT_TRUE(device.remove_endpoint(9));
}

TEST_F(VirtioIommuTest, ASlowHostDelaysItsOwnDomainOnly) {
  RecordingTarget slow{"slow"};
  ASSERT_TRUE(device.add_endpoint(9, &slow, {}));
  EXPECT_EQ(ask(device, attach_request(1, 8)), Status::ok);
  EXPECT_EQ(ask(device, attach_request(2, 9)), Status::ok);
  slow.asynchronous = true;
  const auto map = [](std::uint32_t domain, std::uint64_t page) {
    return map_request(domain, page << 12, (page << 12) + 0xfff, page << 12, rw);
  };
  // Domains by turns, twice; then what must wait for all of it, and what must wait for that.
  const std::vector bytes{map(2, 1), map(1, 1), map(2, 2), map(1, 2), map(2, 1)};
  std::vector<std::array<std::byte, 4>> out(12, std::array<std::byte, 4>{std::byte{0xee}});
  std::uint64_t cookie = 0;
  const auto send = [&](const std::vector<std::byte>& request) {
    const VirtioIommu::Request one{request, out[cookie], cookie};
    ++cookie;
    EXPECT_EQ(device.handle({&one, 1}), 1U);
  };
  const auto answered = [&] {
    std::array<VirtioIommu::Answer, 16> answers{};
    std::vector<std::uint64_t> cookies;
    for (const auto& answer : std::span{answers}.first(device.take_answers(answers))) cookies.push_back(answer.cookie);
    return cookies;
  };
  for (const auto& request : bytes) send(request);
  EXPECT_EQ(device.advance(), Progress::pending);
  EXPECT_EQ(answered(), (std::vector<std::uint64_t>{1, 3}));
  EXPECT_EQ(host.held().size(), 2U);
  const auto detach = detach_request(1, 8);
  const auto late = map(1, 3);
  send(detach);
  send(late);
  EXPECT_TRUE(answered().empty());
  EXPECT_EQ(host.held().size(), 2U) << "DETACH waits for everything before it";
  slow.finish();  // the first batch: one request
  EXPECT_EQ(device.advance(), Progress::pending);
  EXPECT_EQ(answered(), (std::vector<std::uint64_t>{0}));
  slow.finish();  // the second: what came meanwhile
  EXPECT_EQ(device.advance(), Progress::done);
  EXPECT_EQ(answered(), (std::vector<std::uint64_t>{2, 4, 5, 6}));
  EXPECT_EQ(slow.batches(), 2U);
  for (std::size_t i = 0; i < cookie; ++i)
    EXPECT_EQ(static_cast<Status>(out[i][0]), i == 4 ? Status::invalid : i == 6 ? Status::not_found : Status::ok) << i;
  EXPECT_TRUE(host.held().empty());
  slow.asynchronous = false;
  ASSERT_TRUE(device.remove_endpoint(9));
}

TEST_F(VirtioIommuTest, NoDeviceWriteIsLostWhileTheGuestKeepsMapping) {
  ASSERT_EQ(ask(device, attach_request(5, 8)), Status::ok);
  ASSERT_TRUE(host.track_dirty(true));
  std::mt19937_64 random{test_seed()};
  std::set<std::uint64_t> expected;
  std::set<std::uint64_t> taken;
  std::map<std::uint64_t, std::uint64_t> live;  // IOVA page to guest page
  for (int step = 0; step < 4000; ++step) {
    const std::uint64_t at = 1 + random() % 64;
    if (const auto place = live.find(at); place == live.end()) {
      const std::uint64_t page = random() % 512;
      ASSERT_EQ(ask(device, map_request(5, at << 12, (at << 12) + 0xfff, page << 12, rw)), Status::ok);
      live.emplace(at, page);
    } else if (random() % 3 == 0) {
      ASSERT_EQ(ask(device, unmap_request(5, at << 12, (at << 12) + 0xfff)), Status::ok);
      live.erase(place);
      EXPECT_FALSE(host.device_writes(at << 12));
    } else {
      ASSERT_TRUE(host.device_writes((at << 12) + random() % 4096));
      expected.insert(place->second);
    }
    if (step % 500 == 499) {
      ASSERT_TRUE(host.take_dirty([&](const DirtyMemory& d) { taken.insert(d.offset >> 12); }));
      ASSERT_EQ(taken, expected);
      taken.clear();
      expected.clear();
    }
    if (step == 2000) {  // a device that changes its domain keeps its record
      ASSERT_EQ(ask(device, attach_request(6, 8)), Status::ok);
      ASSERT_EQ(ask(device, attach_request(5, 8)), Status::ok);
      live.clear();
    }
  }
  ASSERT_TRUE(host.track_dirty(false));
  EXPECT_FALSE(host.take_dirty([](const DirtyMemory&) {}));
}

// RAM is plugged under a mapping that the guest made before, and pulled again; so it is under those who bypass.
TEST_F(VirtioIommuTest, MemoryComesAndGoesUnderAMappedGuest) {
  constexpr std::uint64_t plugged = std::uint64_t{4} << 30;
  ASSERT_EQ(ask(device, attach_request(1, 8)), Status::ok);
  ASSERT_EQ(ask(device, map_request(1, 0x10000, 0x10fff, plugged, rw)), Status::ok) << "no RAM is no error";
  ASSERT_EQ(ask(device, map_request(1, 0x20000, 0x20fff, 0x5000, rw)), Status::ok);
  RecordingTarget bypassing{"bypass"};
  ASSERT_TRUE(device.add_endpoint(9, &bypassing, {}));
  ASSERT_TRUE(device.set_bypass(true));
  const std::size_t before = bypassing.held().size();
  EXPECT_EQ(host.held().size(), 1U);
  const GuestRam more{1U << 20, plugged};
  const auto id = memory.add(more.config());
  ASSERT_TRUE(id);
  ASSERT_TRUE(device.memory_added());
  ASSERT_EQ(host.held().size(), 2U);
  EXPECT_EQ(host.held().at(0x10000).region, *id);
  EXPECT_EQ(bypassing.held().size(), before + 1);
  // A host that cannot let go says so, and the memory must stay.
  host.fault = [](const HostOp&) { return make_error(Errc::io_error, Stage::unmap, "stuck"); };
  const Region region = *memory.view().find(plugged);
  EXPECT_EQ(device.memory_removing(region).error().code, Errc::io_error);
  EXPECT_EQ(device.domain(1)->stats().failed_unmaps, 1U);
  host.fault = nullptr;
  EXPECT_EQ(bypassing.held().size(), before);
  EXPECT_EQ(device.memory_added().error().code, Errc::iova_busy) << "what is stuck is in the way";
  ASSERT_TRUE(device.set_bypass(false));
  ASSERT_TRUE(device.remove_endpoint(9));
}

TEST_F(VirtioIommuTest, AFaultRecordIsAsTheSpecificationLaysItOut) {
  const auto record = VirtioIommu::fault_record(virtio::FaultReason::mapping, 0x1234, 0xabc'def0'1234, true);
  std::array<unsigned char, virtio::fault_bytes> expected{};
  expected[0] = 2;        // VIRTIO_IOMMU_FAULT_R_MAPPING
  expected[4] = 1U << 1;  // WRITE
  expected[5] = 1;        // ADDRESS: bit 8
  expected[8] = 0x34, expected[9] = 0x12;
  expected[16] = 0x34, expected[17] = 0x12, expected[18] = 0xf0, expected[19] = 0xde, expected[20] = 0xbc;
  expected[21] = 0x0a;
  for (std::size_t i = 0; i < expected.size(); ++i) EXPECT_EQ(static_cast<unsigned>(record[i]), expected[i]) << i;
}

// A driver may rewrite its buffers as soon as it has notified: what counts is what was copied.
TEST_F(VirtioIommuTest, ARequestIsJudgedByItsCopy) {
  host.asynchronous = true;
  std::vector<std::byte> request = attach_request(1, 8);
  std::array<std::byte, 4> out{};
  const VirtioIommu::Request attach{request, out, 1};
  EXPECT_EQ(device.handle({&attach, 1}), 1U);
  std::vector<std::byte> map = map_request(1, 0x10000, 0x10fff, 0x5000, virtio::map_read);
  std::array<std::byte, 4> map_out{};
  const VirtioIommu::Request one{map, map_out, 2};
  EXPECT_EQ(device.handle({&one, 1}), 1U);
  map = map_request(1, 0x20000, 0x2ffff, 0x9000, rw);
  host.finish();
  device.finish();
  ASSERT_EQ(host.held().size(), 1U);
  EXPECT_EQ(host.held().begin()->second.access, Access::read);
  EXPECT_EQ(host.held().begin()->second.region_offset, 0x5000U);
  host.asynchronous = false;
}

// Buffers that lie as most do are read in place, others by a copy: the answers, and what the host holds, are the same.
TEST_F(VirtioIommuTest, WhereABufferLiesChangesNoAnswer) {
  RecordingTarget other_host;
  other_host.usable = host.usable;
  VirtioIommu other{memory, strict_config()};
  other.set_features(other.features());
  ASSERT_TRUE(other.add_endpoint(8, &other_host, {}));
  std::mt19937_64 random{test_seed()};
  constexpr std::size_t misplaced = 4;  // bytes
  const auto random_request = [&] {
    const std::uint64_t start = (16 + random() % 40) << 12;
    const std::uint64_t last = start + ((1 + random() % 3) << 12) - 1;
    const auto domain = static_cast<std::uint32_t>(random() % 10 == 0 ? 2 : 1);
    std::vector<std::byte> out;
    switch (random() % 24) {
      case 0: return attach_request(domain, 8);
      case 1: return random() % 4 == 0 ? detach_request(1, 8) : probe_request(8);
      case 2: return map_request(1, start, last, random() << 12, rw);  // beyond the guest's addresses, or its RAM
      case 3: return map_request(1, start + 1, last, 0x5000, rw);      // crooked
      case 4: return map_request(1, start, last, 0x5000, static_cast<std::uint32_t>(random() % 16));
      case 5: return unmap_request(1, start, last, static_cast<std::uint32_t>(random() % 2));
      case 6: return unmap_request(1, last, start);
      case 7:
        out = map_request(1, start, last, 0x5000, rw);
        out.resize(random() % out.size());  // cut short
        return out;
      case 8: return RequestBytes{static_cast<virtio::RequestType>(random() % 9)}.add(1U).add(start).add(last).done();
      default: break;
    }
    return random() % 2 == 0 ? map_request(domain, start, last, (random() % 1000) << 12, rw)
                             : unmap_request(domain, start, last);
  };
  for (int round = 0; round < 400; ++round) {
    SCOPED_TRACE(::testing::Message() << "round " << round);
    const std::size_t count = 1 + random() % 12;
    std::vector<std::vector<std::byte>> placed;
    std::vector<std::vector<std::byte>> crooked;
    std::vector<std::array<std::byte, 600>> out(count);
    std::vector<std::array<std::byte, 600>> other_out(count);
    for (std::size_t i = 0; i < count; ++i) {
      placed.push_back(random_request());
      crooked.emplace_back(misplaced);
      crooked.back().insert(crooked.back().end(), placed.back().begin(), placed.back().end());
    }
    std::vector<VirtioIommu::Request> requests;
    std::vector<VirtioIommu::Request> other_requests;
    for (std::size_t i = 0; i < count; ++i) {
      requests.push_back({placed[i], out[i], i});
      other_requests.push_back({std::span{crooked[i]}.subspan(misplaced), other_out[i], i});
    }
    ASSERT_EQ(device.handle(requests), count);
    ASSERT_EQ(other.handle(other_requests), count);
    device.finish();
    other.finish();
    std::vector<VirtioIommu::Answer> answers(count);
    std::vector<VirtioIommu::Answer> other_answers(count);
    ASSERT_EQ(device.take_answers(answers), count);
    ASSERT_EQ(other.take_answers(other_answers), count);
    for (std::size_t i = 0; i < count; ++i) {
      ASSERT_EQ(answers[i].cookie, other_answers[i].cookie);
      ASSERT_EQ(answers[i].written, other_answers[i].written) << i;
      ASSERT_EQ(out[i], other_out[i]) << i;
    }
    ASSERT_EQ(device.stats().refused, other.stats().refused);
    ASSERT_EQ(host.held().size(), other_host.held().size());
  }
  EXPECT_GT(device.stats().refused, 100U);
  ASSERT_TRUE(other.remove_endpoint(8));
}

TEST_F(VirtioIommuTest, RequestsBeyondTheBoundAreAShortCount) {
  VirtioIommuConfig config = strict_config();
  config.requests_max = 4;
  VirtioIommu small{memory, config};
  const auto bytes = unmap_request(1, 0, 0xfff);
  std::array<std::array<std::byte, 4>, 6> out{};
  std::vector<VirtioIommu::Request> requests;
  for (std::size_t i = 0; i < 6; ++i) requests.push_back({bytes, out[i], i});
  EXPECT_EQ(small.handle(requests), 4U);
  EXPECT_EQ(small.handle(std::span{requests}.subspan(4)), 0U);
  std::array<VirtioIommu::Answer, 8> answers{};
  EXPECT_EQ(small.take_answers(answers), 4U);
  EXPECT_EQ(small.handle(std::span{requests}.subspan(4)), 2U);
}

// A real guest's map and unmap stream as requests; each answer is checked, and at every step the host holds exactly the
// guest's mappings. A driver may send one MAP for what the trace unmaps in one piece (the trace has one event per
// call).
class VirtioTraceTest : public ::testing::TestWithParam<const char*> {};

TEST_P(VirtioTraceTest, ARealGuestsStreamIsAnsweredAndMirrored) {
  const GuestRam ram{2ULL << 30};
  GuestMemory memory;
  ASSERT_TRUE(memory.add(ram.config()));
  RecordingTarget host;
  VirtioIommuConfig config;
  config.bypass_at_boot = false;
  VirtioIommu device{memory, config};
  device.set_features(device.features());
  ASSERT_TRUE(device.add_endpoint(1, &host, {}));
  ASSERT_EQ(ask(device, attach_request(5, 1)), Status::ok);
  std::map<std::uint64_t, std::pair<std::uint64_t, std::uint64_t>> live;  // start to last, gpa
  std::vector<std::vector<std::byte>> bytes;
  std::vector<Status> expected;
  std::size_t events = 0;
  const auto flush = [&] {
    std::vector<std::array<std::byte, 4>> out(bytes.size());
    std::vector<VirtioIommu::Request> requests;
    for (std::size_t i = 0; i < bytes.size(); ++i) requests.push_back({bytes[i], out[i], i});
    ASSERT_EQ(device.handle(requests), requests.size());
    std::vector<VirtioIommu::Answer> answers(bytes.size());
    ASSERT_EQ(device.take_answers(answers), bytes.size());
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      ASSERT_EQ(answers[i].written, 4U);
      ASSERT_EQ(static_cast<Status>(out[i][0]), expected[i]) << "event " << events - bytes.size() + i;
    }
    bytes.clear();
    expected.clear();
    ASSERT_EQ(host.held().size(), live.size());
  };
  for_each_line(read_recorded(GetParam()), [&](std::string_view line) {
    if (line.empty() || events >= 20000 || ::testing::Test::HasFatalFailure()) return;
    std::istringstream fields{std::string{line}};
    char kind = 0;
    std::uint64_t iova = 0, length = 0, gpa = 0;
    fields >> kind >> std::hex >> iova >> std::dec >> length >> std::hex >> gpa;
    ASSERT_GT(length, 0U);
    const std::uint64_t last = iova + length - 1;
    ++events;
    auto after = live.upper_bound(last);
    const bool overlaps = after != live.begin() && std::prev(after)->second.first >= iova;
    if (kind == 'm') {
      bytes.push_back(map_request(5, iova, last, gpa, rw));
      expected.push_back(overlaps ? Status::invalid : Status::ok);
      if (!overlaps) live[iova] = {last, gpa};
    } else {
      bytes.push_back(unmap_request(5, iova, last));
      auto first = live.lower_bound(iova);
      if (first != live.begin() && std::prev(first)->second.first >= iova) --first;
      const bool cuts = overlaps && (first->first < iova || std::prev(after)->second.first > last);
      expected.push_back(cuts ? Status::range : Status::ok);
      if (overlaps && !cuts) live.erase(first, after);
    }
    if (bytes.size() == 32) flush();
  });
  flush();
  EXPECT_EQ(events, 20000U);
  for (const auto& [start, mapping] : live) {
    const auto* held = host.find(start);
    ASSERT_NE(held, nullptr);
    EXPECT_EQ(held->range.last.value, mapping.first);
    EXPECT_EQ(held->region_offset, mapping.second);
  }
  ASSERT_TRUE(device.remove_endpoint(1));
}

INSTANTIATE_TEST_SUITE_P(Recorded, VirtioTraceTest,
                         ::testing::Values("trace-rr4k.events", "trace-seq128k.events", "trace-mixed.events"),
                         [](const auto& p) {
                           const std::string name{p.param};
                           return name.substr(6, name.find('.') - 6);
                         });

}  // namespace
}  // namespace iovane::viommu
