// Fail the nth, of direct batches beside a queue: the same workload, and the same kernel call or allocation fails in
// both. Answers, index and what the kernel has must be the same, and all must be usable again.
#include <gtest/gtest.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <memory>
#include <tuple>
#include <variant>
#include <vector>

#include "backends/kernel_decorators.hpp"
#include "backends/model/model_kernel.hpp"
#include "backends/open.hpp"
#include "base/fault_point.hpp"
#include "engine/direct_batch.hpp"
#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"

namespace iovane {
namespace {

using backends::FailingKernel;
using backends::model::ModelKernel;
using backends::model::ModelUsage;
using base::FaultKind;
using engine::DirectBatch;
using engine::Operation;
using Request = std::variant<MapRequest, UnmapRequest, ReplaceRequest>;

constexpr std::uint64_t page = 4096;
constexpr std::uint64_t base_iova = 0x1000'0000;
constexpr std::size_t window_pages = 40;
constexpr std::size_t memory_pages = 32;

struct Sweep {
  const char* name;
  const char* interface;
  FaultKind kind;
  int os_errno;
};

IovaRange at(std::uint64_t first, std::uint64_t count = 1) {
  return *IovaRange::from_length(Iova{base_iova + first * page}, Bytes{count * page});
}

/// An address space on a software IOMMU of its own.
class Side {
 public:
  Side(const Sweep& sweep, std::byte* pages, bool direct) : kernel_{*ModelKernel::create()}, pages_{pages} {
    failing_.set_fault_errno(sweep.os_errno);
    engine_ = EngineAccess::open(*backends::open_backend(failing_, {.name = sweep.interface}), "model");
    space = *engine_.create_address_space();
    EXPECT_TRUE(space.attach({.pci_address = kernel_->device(0).address()}));
    registered_ = *space.register_memory({pages_ + 16 * page, Bytes{8 * page}, -1, 0});
    core_ = DirectBatch::join(space);
    if (direct)
      batch_ = std::make_unique<DirectBatch>(*core_);
    else
      queue_ = *space.open_queue({.depth = 32});
  }

  /// With the nth of `kind` failing; whether there was one.
  bool workload(FaultKind kind, std::uint64_t n) {
    const std::array pieces{memory(6), memory(8), memory(7)};
    MapRequest scattered = map(6, memory(6));
    scattered.pieces = pieces;
    MapRequest linked = map(20, memory(12));
    linked.order = Order::link;
    base::arm_fault(static_cast<std::uint32_t>(kind), n);
    run({map(0, memory(0)), map(1, memory(1, 3)), scattered, map(10, memory(9)),
         map(12, registered_.piece(Bytes{0}, Bytes{2 * page}))});
    run({UnmapRequest::of(at(0)), UnmapRequest::of(at(10, 4)), map(0, memory(11)), linked, map(21, memory(13)),
         ReplaceRequest{at(1, 3), memory(2, 3), Access::read_write, 0, Order::free}});
    run({UnmapRequest::of(at(6, 3)), map(30, memory(14)), map(31, memory(15)), UnmapRequest::of(at(31)),
         UnmapRequest::of(at(20, 2))});
    return base::disarm_fault();
  }
  auto mappings() {
    std::vector<std::tuple<std::uint64_t, std::uint64_t, bool>> all;
    space.for_each(IovaRange::everything(), [&](const MappingInfo& info) {
      all.emplace_back(info.range.start.value, info.range.last.value, info.quarantined);
      return true;
    });
    return all;
  }
  bool reaches(std::uint64_t where) {
    std::array<std::byte, 1> seen{};
    return kernel_->device(0).dma_read(at(where).start, seen).ok();
  }
  void all_is_usable_again() {
    EXPECT_TRUE(space.unmap_all());
    answers.clear();
    std::vector<Request> maps;
    for (std::uint64_t p = 0; p < 30; ++p) maps.emplace_back(map(p, memory(p)));
    run(maps);
    for (const Completion& c : answers) EXPECT_TRUE(c.ok()) << c.error.message();
    EXPECT_EQ(space.unmap(UnmapRequest::of(at(0, 30))).bytes.value, 30 * page);
  }
  ModelUsage usage() const { return kernel_->usage(); }

 private:
  std::unique_ptr<ModelKernel> kernel_;
  FailingKernel failing_{*kernel_};
  Engine engine_;

 public:
  AddressSpace space;
  std::vector<Completion> answers;

 private:
  static MapRequest map(std::uint64_t where, MemoryPiece memory) {
    MapRequest request;
    request.memory = memory;
    request.placement = Placement::fixed(at(where).start);
    return request;
  }
  MemoryPiece memory(std::size_t first, std::size_t count = 1) const {
    return MemoryPiece::at(pages_ + first * page, Bytes{count * page});
  }
  void run(const std::vector<Request>& requests) {
    std::vector<Completion> done(requests.size());
    if (batch_) {
      std::vector<Operation> operations;
      for (const Request& any : requests) std::visit([&](const auto& r) { operations.emplace_back(r); }, any);
      EXPECT_TRUE(batch_->submit(operations, done));
    } else {
      for (const Request& any : requests) std::visit([&](const auto& r) { EXPECT_TRUE(queue_.stage(r)); }, any);
      queue_.submit();
      EXPECT_EQ(queue_.wait(done, done.size(), std::chrono::seconds{10}), done.size());
    }
    answers.insert(answers.end(), done.begin(), done.end());
  }

  std::byte* pages_;
  Memory registered_;
  std::shared_ptr<engine::SpaceCore> core_;
  std::unique_ptr<DirectBatch> batch_;
  Queue queue_;
};

class DirectBatchSweep : public ::testing::TestWithParam<Sweep> {};

TEST_P(DirectBatchSweep, AFailureHasTheSameEndAsInAQueue) {
  std::vector<std::byte> bytes((memory_pages + 1) * page, std::byte{7});
  const auto start = reinterpret_cast<std::uintptr_t>(bytes.data());
  auto* const pages = reinterpret_cast<std::byte*>((start + page - 1) & ~(page - 1));
  std::uint64_t n = 0;
  for (bool fired = true; fired;) {
    ++n;
    ASSERT_LT(n, 1000U) << "the sweep does not end";
    SCOPED_TRACE(::testing::Message() << GetParam().name << ", failure " << n);
    Side by_queue{GetParam(), pages, false};
    Side direct{GetParam(), pages, true};
    const bool fired_there = by_queue.workload(GetParam().kind, n);
    fired = direct.workload(GetParam().kind, n);
    ASSERT_EQ(fired, fired_there);
    for (std::size_t i = 0; i < direct.answers.size(); ++i) {
      const Completion& a = direct.answers[i];
      const Completion& b = by_queue.answers[i];
      ASSERT_EQ(std::tie(a.error.code, a.iova, a.bytes), std::tie(b.error.code, b.iova, b.bytes))
          << i << ": " << a.error.message() << " / " << b.error.message();
    }
    ASSERT_EQ(direct.mappings(), by_queue.mappings());
    for (std::uint64_t p = 0; p < window_pages; ++p) ASSERT_EQ(direct.reaches(p), by_queue.reaches(p)) << "page " << p;
    ASSERT_EQ(direct.usage(), by_queue.usage());
    direct.all_is_usable_again();
    if (HasFailure()) return;
  }
  std::printf("%s: %llu failures\n", GetParam().name, static_cast<unsigned long long>(n - 1));
  if (GetParam().kind == FaultKind::kernel_call) {
    EXPECT_GT(n, 10U) << "the sweep reached hardly anything";
  }
}

INSTANTIATE_TEST_SUITE_P(Software, DirectBatchSweep,
                         ::testing::Values(Sweep{"iommufd_calls", "iommufd", FaultKind::kernel_call, ENOMEM},
                                           Sweep{"iommufd_lost", "iommufd", FaultKind::kernel_call, EFAULT},
                                           Sweep{"iommufd_memory", "iommufd", FaultKind::allocation, 0},
                                           Sweep{"type1_calls", "type1", FaultKind::kernel_call, ENOMEM},
                                           Sweep{"type1_lost", "type1", FaultKind::kernel_call, EFAULT},
                                           Sweep{"type1_memory", "type1", FaultKind::allocation, 0}),
                         [](const auto& test) { return std::string{test.param.name}; });

}  // namespace
}  // namespace iovane
