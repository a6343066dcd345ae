// Stage-1 mode on the software IOMMU: what the conformance suite cannot see.
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/mman.h>

#include <bit>
#include <cstring>
#include <fstream>

#include "backends/kernel_decorators.hpp"
#include "backends/model/model_kernel.hpp"
#include "backends/open.hpp"
#include "backends/uapi/iommufd.hpp"
#include "base/topology.hpp"
#include "conformance/memory.hpp"
#include "support/seed.hpp"

namespace iovane::test {
namespace {

using namespace backends;
using model::Nesting;

constexpr std::uint64_t k4 = 4096, m2 = 2U << 20;
constexpr std::uint64_t base = 0x1000'0000;

IovaRange at(std::uint64_t iova, std::uint64_t pages) { return *IovaRange::from_length(Iova{iova}, Bytes{pages * k4}); }

/// Says that an invalidation was done and does nothing, as long as it is told to.
class DeafKernel final : public KernelDecorator {
 public:
  using KernelDecorator::KernelDecorator;
  long ioctl(int fd, unsigned long request, void* argument) noexcept override {
    if (deaf && request == uapi::iommufd::HwptInvalidate::request) return 0;
    if (sick_iova != 0 && request == uapi::iommufd::HwptInvalidate::request) {
      // Handles what comes before the command for that address, and never that one.
      auto& call = *static_cast<uapi::iommufd::HwptInvalidate*>(argument);
      const auto* const entries = std::bit_cast<const std::byte*>(call.data_uptr);
      const bool smmu = call.data_type == uapi::iommufd::viommu_invalidate_data_arm_smmuv3;
      for (std::uint32_t i = 0; i < call.entry_num; ++i) {
        std::uint64_t address = 0;  // word 1 of a command, word 0 of a VT-d entry
        std::memcpy(&address, entries + std::size_t{i} * call.entry_len + (smmu ? 8 : 0), sizeof address);
        if ((address & ~std::uint64_t{0xfff}) != sick_iova) continue;
        call.entry_num = i;
        if (i != 0) inner().ioctl(fd, request, argument);
        return -EIO;
      }
    }
    if (untouched != 0 && request == uapi::iommufd::HwptInvalidate::request) return --untouched, -EIO;
    if (stop_after >= 0 && request == uapi::iommufd::HwptInvalidate::request) {
      // Handles that many entries, then fails.
      auto& call = *static_cast<uapi::iommufd::HwptInvalidate*>(argument);
      const std::uint32_t wanted = call.entry_num;
      if (wanted > static_cast<std::uint32_t>(stop_after)) {
        call.entry_num = static_cast<std::uint32_t>(stop_after);
        stop_after = -1;
        if (call.entry_num != 0) inner().ioctl(fd, request, argument);
        return -EIO;
      }
    }
    return inner().ioctl(fd, request, argument);
  }
  bool deaf = false;
  std::uint64_t sick_iova = 0;
  int untouched = 0;  // so many calls fail and leave the number of entries as it was
  int stop_after = -1;
};

class Stage1Test : public testing::TestWithParam<Nesting> {
 protected:
  void SetUp() override { start({}); }
  void start(model::ModelOptions options, unsigned address_bits = 0) {
    space_.reset();
    backend_.reset();
    options.iommus.front().nesting = GetParam();
    auto model = model::ModelKernel::create(options);
    ASSERT_TRUE(model);
    model_ = *std::move(model);
    deaf_ = std::make_unique<DeafKernel>(*model_);
    kernel_ = std::make_unique<CountingKernel>(*deaf_);
    auto backend = open_backend(*kernel_, {.name = "stage1"});
    ASSERT_TRUE(backend) << backend.error().message();
    backend_ = *std::move(backend);
    SpaceOptions wanted;
    wanted.address_bits = address_bits;
    auto space = backend_->create_space(wanted);
    ASSERT_TRUE(space) << space.error().message();
    space_ = *std::move(space);
    const auto device = space_->attach({.pci_address = model_->device(0).address()});
    ASSERT_TRUE(device) << device.error().message();
  }
  void TearDown() override {
    space_.reset();
    backend_.reset();
    EXPECT_EQ(model_->usage(), model::ModelUsage{});
  }

  RegionId registered(const Memory& memory) {
    return space_->register_memory({.address = memory.data(), .length = memory.length()}).value_or(RegionId{});
  }
  BackendOpResult run(const BackendOp& op) {
    BackendOpResult result;
    space_->execute({&op, 1}, {&result, 1});
    return result;
  }
  BackendOpResult map(RegionId region, IovaRange range, std::uint64_t offset, Access access = Access::read_write) {
    return run({.kind = OpKind::copy, .access = access, .region = region, .range = range, .memory = offset});
  }
  BackendOpResult unmap(IovaRange range) { return run({.kind = OpKind::unmap, .range = range}); }
  bool reads(std::uint64_t iova, std::span<const std::byte> memory, std::size_t device = 0) {
    std::array<std::byte, 64> bytes{};
    return model_->device(device).dma_read(Iova{iova}, bytes).ok() &&
           std::equal(bytes.begin(), bytes.end(), memory.begin());
  }
  /// Maps 40 pages with a hole behind each, and leaves their unmaps in `unmaps`.
  void map_apart(RegionId region, const Memory& memory, std::vector<BackendOp>& unmaps) {
    for (std::uint64_t i = 0; i < 40; ++i) {
      const IovaRange where = at(base + 2 * i * k4, 1);
      ASSERT_TRUE(map(region, where, i * k4).error.ok());
      ASSERT_TRUE(reads(where.start.value, memory.page(i)));
      unmaps.push_back({.kind = OpKind::unmap, .range = where});
    }
  }
  std::uint64_t invalidations() const { return kernel_->calls(uapi::iommufd::HwptInvalidate::request); }

  std::unique_ptr<model::ModelKernel> model_;
  std::unique_ptr<DeafKernel> deaf_;
  std::unique_ptr<CountingKernel> kernel_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<BackendSpace> space_;
};

TEST_P(Stage1Test, a_map_of_registered_memory_makes_no_system_call) {
  const Memory memory{64};
  const RegionId region = registered(memory);
  ASSERT_TRUE(map(region, at(base, 1), 0).error.ok());  // the tables are there now
  const std::uint64_t before = kernel_->calls();
  for (std::uint64_t i = 1; i < 64; ++i) ASSERT_TRUE(map(region, at(base + i * k4, 1), i * k4).error.ok());
  EXPECT_EQ(kernel_->calls(), before);
  EXPECT_TRUE(reads(base + 63 * k4, memory.page(63)));
  EXPECT_EQ(unmap(at(base, 64)).bytes, memory.length());
  EXPECT_EQ(kernel_->calls(), before + 1) << "one invalidation";
}

TEST_P(Stage1Test, a_batch_of_unmaps_shares_one_invalidation) {
  const Memory memory{200};
  const RegionId region = registered(memory);
  for (const std::uint64_t count : {1, 16, 63, 64, 200}) {
    std::vector<BackendOp> ops;
    for (std::uint64_t i = 0; i < count; ++i) {
      ASSERT_TRUE(map(region, at(base + 2 * i * k4, 1), i * k4).error.ok());
      ASSERT_TRUE(reads(base + 2 * i * k4, memory.page(i)));
      ops.push_back({.kind = OpKind::unmap, .range = at(base + 2 * i * k4, 1)});
    }
    std::vector<BackendOpResult> results(ops.size());
    const std::uint64_t before = invalidations();
    space_->execute(ops, results);
    EXPECT_EQ(invalidations(), before + 1);
    for (std::uint64_t i = 0; i < count; ++i) {
      EXPECT_EQ(results[i].bytes, Bytes{k4});
      EXPECT_FALSE(reads(base + 2 * i * k4, memory.page(i)));
    }
  }
}

// The canary of everything above: the device keeps what it knows until it is told.
TEST_P(Stage1Test, without_the_invalidation_the_device_still_reaches_the_page) {
  const Memory memory{1};
  const RegionId region = registered(memory);
  ASSERT_TRUE(map(region, at(base, 1), 0).error.ok());
  ASSERT_TRUE(reads(base, memory.page(0)));
  deaf_->deaf = true;
  ASSERT_EQ(unmap(at(base, 1)).bytes, Bytes{k4});
  EXPECT_TRUE(reads(base, memory.page(0)));
  deaf_->deaf = false;
}

TEST_P(Stage1Test, an_invalidation_that_stops_half_way_goes_on_from_there) {
  const Memory memory{40};
  const RegionId region = registered(memory);
  for (const int stop_after : {0, 1, 17, 99}) {
    if (stop_after == 99) deaf_->untouched = 3;
    std::vector<BackendOp> ops;
    ASSERT_NO_FATAL_FAILURE(map_apart(region, memory, ops));
    std::vector<BackendOpResult> results(ops.size());
    deaf_->stop_after = stop_after;
    space_->execute(ops, results);
    for (std::uint64_t i = 0; i < 40; ++i) {
      EXPECT_TRUE(results[i].error.ok()) << results[i].error.message();
      EXPECT_FALSE(reads(base + 2 * i * k4, memory.page(i))) << i;
    }
  }
}

TEST_P(Stage1Test, an_unmap_whose_invalidation_is_refused_does_not_spoil_the_others) {
  const Memory memory{40};
  const RegionId region = registered(memory);
  std::vector<BackendOp> ops;
  ASSERT_NO_FATAL_FAILURE(map_apart(region, memory, ops));
  std::vector<BackendOpResult> results(ops.size());
  deaf_->sick_iova = base + 2 * 17 * k4;
  space_->execute(ops, results);
  for (std::uint64_t i = 0; i < 40; ++i) {
    EXPECT_EQ(results[i].error.code, i == 17 ? Errc::io_error : Errc::ok) << i << ": " << results[i].error.message();
    EXPECT_EQ(reads(base + 2 * i * k4, memory.page(i)), i == 17) << i;
  }
  deaf_->sick_iova = 0;
  ASSERT_TRUE(map(region, at(base + m2, 1), 0).error.ok()) << "the debt is paid by one for everything";
  EXPECT_FALSE(reads(base + 2 * 17 * k4, memory.page(17)));
}

TEST_P(Stage1Test, a_failed_invalidation_is_a_debt_that_is_paid_before_anything_else) {
  const Memory memory{2};
  const RegionId region = registered(memory);
  FailingKernel failing{*kernel_};
  auto backend = open_backend(failing, {.name = "stage1"});
  ASSERT_TRUE(backend);
  space_ = *(*backend)->create_space({});
  ASSERT_TRUE(space_->attach({.pci_address = model_->device(1).address()}));
  const RegionId here = registered(memory);
  ASSERT_TRUE(map(here, at(base, 1), 0).error.ok());
  ASSERT_TRUE(reads(base, memory.page(0), 1));
  failing.add({.request = uapi::iommufd::HwptInvalidate::request,
               .nth = 1,
               .times = 100,
               .os_errno = EIO,
               .after_call = false});
  EXPECT_EQ(unmap(at(base, 1)).error.code, Errc::io_error);
  EXPECT_EQ(map(here, at(base + m2, 1), k4).error.code, Errc::io_error) << "nothing before the debt is paid";
  failing.clear();
  EXPECT_TRUE(map(here, at(base + m2, 1), k4).error.ok());
  EXPECT_FALSE(reads(base, memory.page(0), 1));
  EXPECT_TRUE(reads(base + m2, memory.page(1), 1));
  space_.reset();
  (void)region;
}

// What neighbours in a batch share is looked up once (MapRun): a batch must do what its operations do one by one.
TEST_P(Stage1Test, a_batch_does_what_its_operations_do_one_by_one) {
  model::ModelOptions options;
  // Too large to be passed through, and its border within a table.
  const std::uint64_t hole = base + m2 + 32 * k4;
  for (model::DeviceOptions& device : options.devices)
    device.reserved.push_back({{Iova{hole}, Iova{hole + (32U << 20) - 1}}, model::ReservedKind::reserved});
  start(options);
  const Memory first{80}, second{3, 2}, fixed{8, 3};
  ASSERT_EQ(::mprotect(fixed.data(), fixed.length().value, PROT_READ), 0);
  auto other = *backend_->create_space({});
  ASSERT_TRUE(other->attach({.pci_address = model_->device(1).address()}));
  std::vector<RegionId> here, there;
  for (const Memory* memory : {&first, &second, &fixed}) {
    here.push_back(registered(*memory));
    there.push_back(*other->register_memory({.address = memory->data(), .length = memory->length()}));
    ASSERT_EQ(here.back(), there.back());
  }
  const auto pinned_beside_tables = [&] {
    return model_->usage().pinned.value - space_->table_memory().value - other->table_memory().value;
  };
  const std::uint64_t pinned = pinned_beside_tables();
  Random random{seed()};
  std::size_t done = 0, refused = 0;
  for (int round = 0; round < 300; ++round) {
    std::vector<BackendOp> ops;
    RegionId region = here[0];
    Access access = Access::read_write;
    std::uint64_t at_iova = base, memory = 0;
    for (int i = 0; i < 40; ++i) {
      // Mostly the next page of the same memory; now and then another of everything.
      if (random.one_in(8)) region = RegionId{static_cast<std::uint32_t>(random.below(5))};
      if (random.one_in(8)) access = static_cast<Access>(random.below(4));
      if (random.one_in(8)) at_iova = base + random.below(2) * m2 + random.below(64) * k4;
      if (random.one_in(12)) at_iova = 0xfee0'0000 - 2 * k4;  // up to a reserved window
      if (random.one_in(12)) at_iova = (std::uint64_t{1} << (random.one_in(2) ? 48 : 63)) - 2 * k4;  // out of reach
      if (random.one_in(8)) memory = random.below(48) * k4;
      std::uint64_t bytes = random.one_in(8) ? 1 + random.below(3 * k4) : k4;
      if (random.one_in(10)) {  // as aligned as the memory, so that a group in it gets the hint
        region = here[0];
        bytes = 32 * k4;
        at_iova = base + random.below(2) * m2 + ((first.address() + memory) & 0xffff);
      }
      const std::uint64_t skew = random.one_in(20) ? 8 : 0, iova_skew = random.one_in(20) ? 16 : 0;
      const IovaRange range{Iova{at_iova + iova_skew}, Iova{at_iova + iova_skew + (bytes - 1)}};
      BackendOp op{.kind = random.one_in(6) ? OpKind::map : OpKind::copy,
                   .access = access,
                   .region = region,
                   .range = range,
                   .memory = memory + skew};
      if (region.value == 0) op.memory += first.address();  // unregistered
      if (region.value == 0 && !random.one_in(4)) op.kind = OpKind::map;
      if (random.one_in(4)) {
        const IovaRange page = ops.empty() || random.one_in(3)
                                   ? at(base + random.below(2) * m2 + random.below(64) * k4, 1)
                                   : ops[random.below(ops.size())].range;
        op = {.kind = OpKind::unmap,
              .range = random.one_in(3)   ? range
                       : random.one_in(8) ? at(base + random.below(2) * m2, 64)
                                          : page};
      }
      ops.push_back(op);
      at_iova += k4;
      memory += k4;
    }
    std::vector<BackendOpResult> together(ops.size()), alone(ops.size());
    space_->execute(ops, together);
    for (std::size_t i = 0; i < ops.size(); ++i) other->execute({&ops[i], 1}, {&alone[i], 1});
    for (std::size_t i = 0; i < ops.size(); ++i) {
      ASSERT_EQ(together[i].error.code, alone[i].error.code)
          << i << ": " << together[i].error.message() << " / " << alone[i].error.message();
      ASSERT_EQ(together[i].error ? Bytes{} : together[i].bytes, alone[i].error ? Bytes{} : alone[i].bytes) << i;
      ++(together[i].error ? refused : done);
    }
    for (std::uint64_t page = 0; page < 130; ++page) {
      const Iova iova{base + page % 65 * k4 + page / 65 * m2};
      std::array<std::byte, 32> a{}, b{};
      const bool reached = model_->device(0).dma_read(iova, a).ok();
      ASSERT_EQ(reached, model_->device(1).dma_read(iova, b).ok()) << page;
      ASSERT_EQ(a, b) << page;
      if (reached) {
        ASSERT_EQ(model_->device(0).dma_write(iova, a).ok(), model_->device(1).dma_write(iova, b).ok()) << page;
      }
    }
    ASSERT_TRUE(space_->unmap_all());
    ASSERT_TRUE(other->unmap_all());
    // What was pinned for a mapping alone went with it.
    ASSERT_EQ(pinned_beside_tables(), pinned) << round;
  }
  EXPECT_GT(done, 1000U);
  EXPECT_GT(refused, 1000U);
}

TEST_P(Stage1Test, unregistered_memory_is_pinned_for_its_mapping_alone) {
  const Memory memory{4};
  const Bytes before = model_->usage().pinned;
  const auto address = memory.address();
  ASSERT_TRUE(
      run({.kind = OpKind::map, .access = Access::read_write, .range = at(base, 4), .memory = address}).error.ok());
  EXPECT_TRUE(reads(base + 3 * k4, memory.page(3)));
  EXPECT_EQ(model_->usage().pinned, Bytes{before.value + 4 * k4});
  EXPECT_EQ(unmap(at(base, 1)).bytes, Bytes{k4}) << "a cut";
  EXPECT_EQ(model_->usage().pinned, Bytes{before.value + 4 * k4});
  EXPECT_EQ(unmap(at(base, 4)).bytes, Bytes{3 * k4});
  EXPECT_EQ(model_->usage().pinned, before);
}

TEST_P(Stage1Test, large_memory_takes_blocks_and_can_be_cut) {
  // Registered memory keeps its position within 2 MiB, so blocks fit.
  const Memory memory{3 * 512};
  const RegionId region = registered(memory);
  const std::uint64_t skew = memory.address() & (m2 - 1);
  const IovaRange range = at(base + skew, 3 * 512);
  ASSERT_TRUE(map(region, range, 0).error.ok());
  EXPECT_TRUE(reads(base + skew + 777 * k4, memory.page(777)));
  EXPECT_EQ(unmap(at(base + skew + 777 * k4, 1)).bytes, Bytes{k4});
  EXPECT_FALSE(reads(base + skew + 777 * k4, memory.page(777)));
  EXPECT_TRUE(reads(base + skew + 778 * k4, memory.page(778)));
  EXPECT_EQ(unmap(range).bytes, Bytes{memory.length().value - k4});
}

TEST_P(Stage1Test, two_spaces_of_one_descriptor_do_not_disturb_each_other) {
  const Memory memory{2};
  const RegionId region = registered(memory);
  auto other = *backend_->create_space({});
  ASSERT_TRUE(other->attach({.pci_address = model_->device(1).address()}));
  const RegionId there = *other->register_memory({.address = memory.data(), .length = memory.length()});
  ASSERT_TRUE(map(region, at(base, 1), 0).error.ok());
  const BackendOp op{.kind = OpKind::copy, .access = Access::read, .region = there, .range = at(base, 1), .memory = k4};
  BackendOpResult result;
  other->execute({&op, 1}, {&result, 1});
  ASSERT_TRUE(result.error.ok());
  EXPECT_TRUE(reads(base, memory.page(0), 0));
  EXPECT_TRUE(reads(base, memory.page(1), 1));
  EXPECT_EQ(unmap(at(base, 1)).bytes, Bytes{k4});
  EXPECT_FALSE(reads(base, memory.page(0), 0));
  EXPECT_TRUE(reads(base, memory.page(1), 1));
}

TEST_P(Stage1Test, many_small_mappings_reuse_tables) {
  const Memory memory{1};
  constexpr std::uint64_t high = 0x1'0000'0000;  // beyond the interrupt window
  const RegionId region = registered(memory);
  for (std::uint64_t i = 0; i < 20'000; ++i) {
    ASSERT_TRUE(map(region, at(high + i * m2, 1), 0).error.ok());
    if (i % 37 == 0) {
      ASSERT_TRUE(reads(high + i * m2, memory.page(0)));
    }
    ASSERT_EQ(unmap(at(high + i * m2, 1)).bytes, Bytes{k4});
  }
  EXPECT_LT(space_->table_memory().value, std::uint64_t{4000} * k4) << "empty tables are collected";
}

// Each GiB that was ever touched takes a table of its own.
TEST_P(Stage1Test, tables_above_the_lowest_level_come_back_when_memory_comes_and_goes) {
  const Memory memory{1};
  constexpr std::uint64_t high = 0x1'0000'0000;
  const RegionId region = registered(memory);
  ASSERT_TRUE(map(region, at(high, 1), 0).error.ok());
  std::uint64_t most = 0;
  for (std::uint64_t round = 0; round < 20; ++round) {
    for (std::uint64_t i = 1; i <= 100; ++i) {
      const IovaRange page = at(high + (100 * round + i) * (1U << 30), 1);
      ASSERT_TRUE(map(region, page, 0).error.ok());
      ASSERT_TRUE(reads(page.start.value, memory.page(0)));
      ASSERT_EQ(unmap(page).bytes, Bytes{k4});
    }
    const Memory plugged{1};
    const auto one = space_->register_memory({.address = plugged.data(), .length = plugged.length()});
    ASSERT_TRUE(one);
    ASSERT_TRUE(space_->unregister_memory(*one));
    most = std::max(most, space_->table_memory().value);
  }
  EXPECT_LE(most, 512 * k4) << "2,000 GiB were touched";
  EXPECT_TRUE(reads(high, memory.page(0))) << "what is mapped stays";
}

TEST_P(Stage1Test, the_width_of_addresses_can_be_chosen) {
  start({}, 39);
  const bool smmu = GetParam() == Nesting::smmuv3;
  EXPECT_EQ(space_->usable_ranges()->back().last.value, (std::uint64_t{1} << (smmu ? 39 : 48)) - 1);
  const Memory memory{1};
  ASSERT_TRUE(map(registered(memory), at(base, 1), 0).error.ok());
  EXPECT_TRUE(reads(base, memory.page(0)));
  if (smmu) return;
  start({}, 57);
  EXPECT_EQ(space_->usable_ranges()->back().last.value, (std::uint64_t{1} << 57) - 1);
  ASSERT_TRUE(map(registered(memory), at(std::uint64_t{1} << 55, 1), 0).error.ok());
  EXPECT_TRUE(reads(std::uint64_t{1} << 55, memory.page(0)));
}

TEST_P(Stage1Test, faults_go_to_the_space_that_has_the_device_and_losses_are_counted) {
  auto other = *backend_->create_space({});
  const auto second = *other->attach({.pci_address = model_->device(1).address()});
  std::array<FaultRecord, 64> records;
  if (GetParam() == Nesting::vtd) {
    EXPECT_EQ(space_->fault_record_fd(), -1);
    EXPECT_EQ(space_->read_fault_records(records).error().code, Errc::unsupported);
    return;
  }
  const auto readable = [](const BackendSpace& space) {
    pollfd wait{.fd = space.fault_record_fd(), .events = POLLIN, .revents = 0};
    return ::poll(&wait, 1, 0) == 1;
  };
  EXPECT_FALSE(readable(*space_) || readable(*other));
  const Memory memory{1};
  EXPECT_FALSE(reads(base, memory.page(0), 0));
  EXPECT_FALSE(reads(base + k4, memory.page(0), 1));
  EXPECT_FALSE(reads(base + 2 * k4, memory.page(0), 1));
  EXPECT_TRUE(readable(*space_) && readable(*other)) << "either may have to read the queue";
  ASSERT_EQ(*other->read_fault_records(records), 2U);
  EXPECT_EQ(records[0].device_id, second.id.value);
  EXPECT_EQ(records[0].address, Iova{base + k4});
  EXPECT_EQ(records[1].address, Iova{base + 2 * k4});
  EXPECT_FALSE(readable(*other));
  EXPECT_TRUE(readable(*space_)) << "in its inbox";
  ASSERT_EQ(*space_->read_fault_records(records), 1U);
  EXPECT_EQ(records[0].address, Iova{base});
  EXPECT_FALSE(readable(*space_));
  // A device that moved is heard where it went.
  ASSERT_TRUE(backend_->move_device(*other, second.id, *space_));
  EXPECT_FALSE(reads(base + 3 * k4, memory.page(0), 1));
  ASSERT_EQ(*space_->read_fault_records(records), 1U);
  EXPECT_EQ(records[0].device_id, second.id.value);
  EXPECT_EQ(*other->read_fault_records(records), 0U);
  // More than the kernel's queue holds: what came first is told, then how many there were.
  constexpr std::size_t held = 1024, strays = 1500;
  for (std::size_t i = 0; i < strays; ++i) (void)reads(base + i * k4, memory.page(0), 0);
  std::size_t told = 0, lost = 0;
  while (const std::size_t got = *space_->read_fault_records(records)) {
    for (std::size_t i = 0; i < got; ++i) {
      if (records[i].reason == FaultRecord::Reason::lost) {
        lost += records[i].lost;
      } else {
        EXPECT_EQ(records[i].address, Iova{base + told * k4});
        ++told;
      }
    }
  }
  EXPECT_EQ(told, held);
  EXPECT_EQ(lost, strays - held);
  EXPECT_FALSE(readable(*space_));
}

TEST_P(Stage1Test, a_kernel_without_event_queues_only_lacks_them) {
  model::ModelOptions options;
  options.event_queues = false;
  start(options);
  const Memory memory{1};
  ASSERT_TRUE(map(registered(memory), at(base, 1), 0).error.ok());
  EXPECT_TRUE(reads(base, memory.page(0)));
  std::array<FaultRecord, 1> records;
  EXPECT_EQ(space_->read_fault_records(records).error().code, Errc::unsupported);
}

// A hint over a hole would lead the device into it: it believes hints.
TEST_P(Stage1Test, a_part_of_what_was_mapped_as_one_goes_for_the_device_too) {
  const Memory memory{1600};
  const RegionId region = registered(memory);
  const std::uint64_t skew = memory.address() & (m2 - 1);
  const IovaRange range = at(base + skew, 1600);
  ASSERT_TRUE(map(region, range, 0).error.ok());
  for (std::uint64_t page = 0; page < 1600; ++page) ASSERT_TRUE(reads(base + skew + page * k4, memory.page(page)));
  for (std::uint64_t page = 5; page < 1600; page += 97)
    ASSERT_EQ(unmap(at(base + skew + page * k4, 1)).bytes, Bytes{k4});
  for (std::uint64_t page = 0; page < 1600; ++page)
    ASSERT_EQ(reads(base + skew + page * k4, memory.page(page)), page % 97 != 5) << page;
  (void)unmap(range);
}

TEST_P(Stage1Test, tables_beyond_the_memlock_limit_name_limit_use_and_need) {
  const auto refused = [&](std::uint64_t kib) -> Error {
    model::ModelOptions options;
    options.iommus.front().nesting = GetParam();
    options.memlock.limit = Bytes{kib << 10};
    auto model = *model::ModelKernel::create(options);
    auto backend = *open_backend(*model, {.name = "stage1"});
    auto space = *backend->create_space({});
    if (const auto device = space->attach({.pci_address = model->device(0).address()}); !device) return device.error();
    const Memory memory{1};
    const auto region = *space->register_memory({.address = memory.data(), .length = memory.length()});
    for (std::uint64_t i = 0; i < 1000; ++i) {
      const BackendOp op{.kind = OpKind::copy,
                         .access = Access::read,
                         .region = region,
                         .range = at(0x1'0000'0000 + i * m2, 1),
                         .memory = 0};
      BackendOpResult result;
      space->execute({&op, 1}, {&result, 1});
      if (result.error) return result.error;
    }
    return {};
  };
  for (const std::uint64_t kib : {100, 300, 600}) {
    const Error error = refused(kib);
    EXPECT_EQ(error.code, Errc::memlock_exceeded) << kib << ": " << error.message();
    EXPECT_NE(error.message().find(std::to_string(kib << 10)), std::string::npos) << error.message();
    EXPECT_NE(error.message().find("262144"), std::string::npos) << "the need: " << error.message();
  }
}

TEST_P(Stage1Test, tables_prefer_the_node_of_the_device) {
  const auto bound_pieces = [] {
    std::ifstream maps{"/proc/self/numa_maps"};
    std::size_t count = 0;
    for (std::string line; std::getline(maps, line);)
      count += line.find(" bind") != std::string::npos || line.find(" prefer") != std::string::npos ? 1 : 0;
    return count;
  };
  const iovane::base::Topology topology = iovane::base::Topology::load();
  const Memory probe{1};
  const bool possible = topology.bind_memory(probe.data(), probe.length(), 0).has_value();
  const std::size_t before = bound_pieces();
  if (!possible || before == 0)
    GTEST_SKIP() << "this process may not bind memory to nodes, or there is nothing to bind";
  model::ModelOptions options;
  options.devices[0].numa_node = static_cast<int>(topology.os_number(0));
  start(options);
  EXPECT_EQ(bound_pieces(), before + 1) << "the first chunk of tables";
}

TEST_P(Stage1Test, a_host_that_cannot_says_why) {
  const auto refusal = [&](const model::ModelOptions& options) {
    auto model = model::ModelKernel::create(options);
    auto backend = open_backend(**model, {.name = "stage1"});
    auto space = (*backend)->create_space({});
    const auto device = (*space)->attach({.pci_address = (*model)->device(0).address()});
    EXPECT_FALSE(device);
    EXPECT_EQ(device.error().code, Errc::unsupported);
    return std::string{device.error().detail()};
  };
  model::ModelOptions options;
  EXPECT_NE(refusal(options).find("kind whose first stage is not known"), std::string::npos) << refusal(options);
  options.iommus.front().nesting = Nesting::amd;
  EXPECT_NE(refusal(options).find("AMD"), std::string::npos);
  options.iommus.front().nesting = Nesting::smmuv3;
  options.viommu = false;
  EXPECT_NE(refusal(options).find("6.13"), std::string::npos) << refusal(options);
  options.viommu = true;
  options.iommus.front().coherent = false;
  EXPECT_NE(refusal(options).find("coherent"), std::string::npos) << refusal(options);
}

INSTANTIATE_TEST_SUITE_P(Units, Stage1Test, testing::Values(Nesting::smmuv3, Nesting::vtd),
                         [](const auto& test) { return test.param == Nesting::smmuv3 ? "smmuv3" : "vtd"; });

// Behind two units there are two parents over the same intermediate addresses.
TEST(Stage1UnitsTest, one_space_serves_devices_behind_two_units) {
  model::ModelOptions options;
  options.iommus.assign(2, {.nesting = Nesting::smmuv3});
  options.devices[1].iommu = 1;
  auto model = *model::ModelKernel::create(options);
  {
    auto backend = *open_backend(*model, {.name = "stage1"});
    auto space = *backend->create_space({});
    for (const std::size_t device : {0, 1}) {
      const auto attached = space->attach({.pci_address = model->device(device).address()});
      ASSERT_TRUE(attached) << attached.error().message();
    }
    const Memory memory{1};
    const auto region = *space->register_memory({.address = memory.data(), .length = memory.length()});
    BackendOp op{.kind = OpKind::copy, .access = Access::read, .region = region, .range = at(base, 1), .memory = 0};
    BackendOpResult result;
    space->execute({&op, 1}, {&result, 1});
    ASSERT_TRUE(result.error.ok());
    std::array<std::byte, 16> bytes{};
    for (const std::size_t device : {0, 1}) EXPECT_TRUE(model->device(device).dma_read(Iova{base}, bytes).ok());
    op = {.kind = OpKind::unmap, .range = at(base, 1)};
    space->execute({&op, 1}, {&result, 1});
    for (const std::size_t device : {0, 1}) EXPECT_FALSE(model->device(device).dma_read(Iova{base}, bytes).ok());
  }
  EXPECT_EQ(model->usage(), model::ModelUsage{});
}

}  // namespace
}  // namespace iovane::test
