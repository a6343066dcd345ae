// A guest's TCE hypercalls on a POWER kernel with KVM: handled inside the kernel, their effect seen by a device's DMA,
// the table moved to userspace and back, and what each way costs.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>

#include "backends/kvm_tce/kvm_tce.hpp"
#include "backends/open.hpp"
#include "backends/system_kernel.hpp"
#include "backends/uapi/vfio.hpp"
#include "conformance/edu_witness.hpp"
#include "conformance/memory.hpp"
#include "lab/tiny_guest.hpp"
#include "viommu/backend_target.hpp"
#include "viommu/kvm_tce_host.hpp"
#include "viommu/papr.hpp"
#include "viommu/recording_target.hpp"

namespace iovane::test {
namespace {

using namespace viommu;
using backends::BackendOp;
using backends::BackendOpResult;
using backends::OpKind;

constexpr std::size_t ram_bytes = 32U << 20;
constexpr std::uint64_t buid = 0x8000'0000'2000'0000;
constexpr std::uint32_t liobn = 0x8000'0001;
constexpr std::uint64_t source = 0x10'0000;  // guest physical pages
constexpr std::uint64_t list = 0x20'0000;
constexpr std::uint64_t at = 0x100'0000;  // bus addresses

class KvmTceLab : public testing::Test {
 protected:
  void SetUp() override {
    ram_ = static_cast<std::byte*>(
        ::mmap(nullptr, ram_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0));
    ASSERT_NE(ram_, MAP_FAILED);
    for (std::size_t i = 0; i < ram_bytes; ++i) ram_[i] = static_cast<std::byte>(i * 13 + i / 4096 * 5);
    guest_ = std::make_unique<TinyGuest>(ram_, ram_bytes);
    if (guest_->error() != nullptr && std::string{guest_->error()} == "open /dev/kvm") GTEST_SKIP() << "no KVM here";
    ASSERT_EQ(guest_->error(), nullptr) << guest_->error();
    ASSERT_TRUE(memory_.add({.gpa = 0, .length = Bytes{ram_bytes}, .address = ram_}));
    const char* const devices = std::getenv("IOVANE_LAB_DEVICES");
    ASSERT_NE(devices, nullptr);
    std::string first{devices};
    first.resize(std::min(first.size(), first.find(',')));
    container_ = kernel_.open("/dev/vfio/vfio", 0x2);
    ASSERT_GE(container_, 0);
    auto backend =
        backends::open_backend(kernel_, {.name = "spapr", .descriptor = {.fd = container_, .duplicate = false}});
    ASSERT_TRUE(backend) << backend.error().message();
    backend_ = *std::move(backend);
    auto space = backend_->create_space({});
    ASSERT_TRUE(space) << space.error().message();
    space_ = *std::move(space);
    const auto device = space_->attach({.pci_address = first});
    ASSERT_TRUE(device) << device.error().message();
    witness_ = make_edu_witness(kernel_, *space_, *device);
    ASSERT_NE(witness_, nullptr);
    auto kvm = backends::KvmTce::open(kernel_, {.fd = guest_->vm(), .duplicate = false});
    ASSERT_TRUE(kvm) << kvm.error().message();
    kvm_ = *std::move(kvm);
    ASSERT_TRUE(kvm_->any_window() && kvm_->lists_in_kernel() && kvm_->can_couple());
    host_ = std::make_unique<KvmSpaprHost>(*kvm_);
    papr_ = std::make_unique<PaprTce>(memory_, host_.get());
    target_ = std::make_unique<BackendTarget>("container", *space_);
    for (const Region& region : memory_.regions()) ASSERT_TRUE(target_->add_region(region));
    PhbConfig phb;
    phb.buid = buid;
    phb.liobn = liobn;
    window_ = space_->usable_ranges()->front();
    phb.dma32_address = window_.start.value;
    phb.dma32_bytes = window_.length().value;
    ASSERT_TRUE(papr_->add_phb(phb));
    const auto added = papr_->add_device(buid, target_.get());
    ASSERT_TRUE(added) << added.error().message();
  }
  void TearDown() override {
    witness_.reset();
    if (papr_ && target_) {
      EXPECT_TRUE(papr_->remove_device(buid, target_.get()));
    }
    papr_.reset();
    target_.reset();
    host_.reset();
    kvm_.reset();
    space_.reset();
    backend_.reset();
    if (container_ >= 0) kernel_.close(container_);
    guest_.reset();
    if (ram_ != nullptr) ::munmap(ram_, ram_bytes);
  }

  TinyGuest::Outcome hypercall(std::uint64_t number, const std::array<std::uint64_t, 4>& arguments,
                               std::uint64_t times = 1) {
    const auto outcome = guest_->call(
        number, arguments, times,
        [&](std::uint64_t n, const std::array<std::uint64_t, 4>& a) { return papr_->call_and_wait(n, a).status; });
    EXPECT_TRUE(outcome.ok) << "the guest went astray";
    return outcome;
  }
  std::span<std::byte> page(std::uint64_t gpa) { return {ram_ + gpa, 4096}; }
  bool reads(std::uint64_t bus, std::uint64_t gpa) {
    const auto got = witness_->read(Iova{bus}, 64);
    return std::equal(got.begin(), got.end(), ram_ + gpa);
  }
  bool writes(std::uint64_t bus, std::uint64_t gpa) {
    std::vector<std::byte> sent;
    for (std::size_t i = 0; i < 64; ++i) sent.push_back(~ram_[gpa + i]);
    witness_->write(Iova{bus}, sent);
    return std::equal(sent.begin(), sent.end(), ram_ + gpa);
  }

  backends::SystemKernel kernel_;
  GuestMemory memory_;
  std::byte* ram_ = nullptr;
  int container_ = -1;
  std::unique_ptr<TinyGuest> guest_;
  std::unique_ptr<backends::Backend> backend_;
  std::unique_ptr<backends::BackendSpace> space_;
  std::unique_ptr<Witness> witness_;
  std::unique_ptr<backends::KvmTce> kvm_;
  std::unique_ptr<KvmSpaprHost> host_;
  std::unique_ptr<PaprTce> papr_;
  std::unique_ptr<BackendTarget> target_;
  IovaRange window_{};
};

TEST_F(KvmTceLab, hypercalls_are_handled_in_the_kernel_and_dma_follows) {
  ASSERT_TRUE(papr_->in_kvm(liobn));
  const auto put = hypercall(hcall::put_tce, {liobn, at, source | 3, 0});
  EXPECT_EQ(put.status, hcall::success);
  EXPECT_EQ(put.exits, 0U);
  EXPECT_TRUE(reads(at, source));
  EXPECT_TRUE(writes(at, source));

  for (std::uint64_t i = 0; i < 512; ++i) {
    const std::uint64_t entry = __builtin_bswap64((source + 4096 * (i % 64)) | 3);
    std::memcpy(ram_ + list + 8 * i, &entry, 8);
  }
  const auto indirect = hypercall(hcall::put_tce_indirect, {liobn, at + 0x10'0000, list, 512});
  EXPECT_EQ(indirect.status, hcall::success);
  EXPECT_EQ(indirect.exits, 0U);
  EXPECT_TRUE(reads(at + 0x10'0000 + 511 * 4096, source + 63 * 4096));

  const auto stuff = hypercall(hcall::stuff_tce, {liobn, at + 0x10'0000, 0, 512});
  EXPECT_EQ(stuff.status, hcall::success);
  EXPECT_EQ(stuff.exits, 0U);
  EXPECT_FALSE(writes(at + 0x10'0000 + 511 * 4096, source + 63 * 4096)) << "the entry was taken away";
  EXPECT_TRUE(reads(at, source)) << "and this one was not";
}

TEST_F(KvmTceLab, bad_hypercalls_have_their_return_codes) {
  const auto unknown = hypercall(hcall::put_tce, {0x1234, at, source | 3, 0});
  EXPECT_EQ(unknown.status, hcall::parameter);
  EXPECT_EQ(unknown.exits, 1U) << "KVM leaves unknown LIOBNs to userspace";
  const auto outside = hypercall(hcall::put_tce, {liobn, window_.last.value + 1, source | 3, 0});
  EXPECT_EQ(outside.status, hcall::parameter);
  EXPECT_EQ(outside.exits, 0U);
  const auto no_memory = hypercall(hcall::put_tce, {liobn, at, 0x4000'0000 | 3, 0});
  EXPECT_NE(no_memory.status, hcall::success);
  std::printf("no such guest memory: status %lld, %llu exits\n", static_cast<long long>(no_memory.status),
              static_cast<unsigned long long>(no_memory.exits));
}

TEST_F(KvmTceLab, the_table_moves_to_userspace_and_back_without_losing_an_entry) {
  ASSERT_TRUE(papr_->in_kvm(liobn));
  for (std::uint64_t i = 0; i < 16; ++i)
    ASSERT_EQ(hypercall(hcall::put_tce, {liobn, at + i * 8192, (source + i * 4096) | 3, 0}).status, hcall::success);
  RecordingTarget other;  // no container: its presence keeps the table out of KVM
  other.may_cut = true;
  ASSERT_TRUE(papr_->add_device(buid, &other));
  EXPECT_FALSE(papr_->in_kvm(liobn));
  for (std::uint64_t i = 0; i < 16; i += 5) EXPECT_TRUE(reads(at + i * 8192, source + i * 4096)) << i;
  const auto put = hypercall(hcall::put_tce, {liobn, at + 0x20'0000, (source + 0x2'0000) | 3, 0});
  EXPECT_EQ(put.status, hcall::success);
  EXPECT_EQ(put.exits, 1U);
  EXPECT_TRUE(reads(at + 0x20'0000, source + 0x2'0000));
  EXPECT_EQ(hypercall(hcall::put_tce, {liobn, at, 0, 0}).exits, 1U);
  EXPECT_FALSE(writes(at, source));

  ASSERT_TRUE(papr_->remove_device(buid, &other));
  EXPECT_TRUE(papr_->in_kvm(liobn));
  for (std::uint64_t i = 1; i < 16; i += 5) EXPECT_TRUE(reads(at + i * 8192, source + i * 4096)) << i;
  for (std::uint64_t i = 1; i < 16; ++i) EXPECT_EQ(papr_->translate(liobn, at + i * 8192).gpa, source + i * 4096);
  const auto again = hypercall(hcall::put_tce, {liobn, at, (source + 0x3'0000) | 3, 0});
  EXPECT_EQ(again.status, hcall::success);
  EXPECT_EQ(again.exits, 0U);
  EXPECT_TRUE(reads(at, source + 0x3'0000));
  EXPECT_EQ(papr_->stats().moves_to_user, 1U);
  EXPECT_EQ(papr_->stats().moves_to_kvm, 2U);
}

double pairs_per(const std::function<void()>& pair, int count) {
  const auto before = std::chrono::steady_clock::now();
  for (int i = 0; i < count; ++i) pair();
  const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - before;
  return spent.count() / count;
}

TEST_F(KvmTceLab, what_each_way_costs) {
  constexpr std::uint64_t calls = 4000;
  const auto in_kernel = hypercall(hcall::put_tce, {liobn, at, source | 3, 0}, calls);
  EXPECT_EQ(in_kernel.exits, 0U);
  RecordingTarget other;
  other.may_cut = true;
  ASSERT_TRUE(papr_->add_device(buid, &other));
  const auto in_user = hypercall(hcall::put_tce, {liobn, at, source | 3, 0}, calls);
  EXPECT_EQ(in_user.exits, calls);
  // Alternating memory, so that each call changes the entry and reaches the container.
  std::uint64_t turn = 0;
  const auto changing = guest_->call(hcall::put_tce, {liobn, at, source | 3, 0}, calls,
                                     [&](std::uint64_t n, std::array<std::uint64_t, 4> a) {
                                       a[2] = (source + 4096 * (++turn & 1U)) | 3;
                                       return papr_->call_and_wait(n, a).status;
                                     });
  ASSERT_TRUE(papr_->remove_device(buid, &other));
  // The engine's side: the seam against the bare ioctls, on memory that is registered.
  const auto region = space_->register_memory({.address = ram_, .length = Bytes{ram_bytes}});
  ASSERT_TRUE(region);
  const IovaRange range = *IovaRange::from_length(Iova{at + 0x100'0000}, Bytes{4096});
  const BackendOp pair[] = {
      {.kind = OpKind::map, .access = Access::read_write, .region = *region, .range = range, .memory = source},
      {.kind = OpKind::unmap, .range = range}};
  BackendOpResult results[2];
  double seam = 1e18, bare = 1e18;  // the fastest of several rounds in turn
  for (int round = 0; round < 7; ++round) {
    seam = std::min(seam, pairs_per([&] { space_->execute(pair, results); }, 1000));
    ASSERT_TRUE(results[0].error.ok() && results[1].error.ok()) << results[0].error.message();
    bare = std::min(bare, pairs_per(
                              [&] {
                                backends::uapi::vfio::Type1DmaMap map{
                                    .flags = 3,
                                    .vaddr = reinterpret_cast<std::uintptr_t>(ram_) + source,
                                    .iova = range.start.value,
                                    .size = 4096};
                                kernel_.ioctl(container_, backends::uapi::vfio::Type1DmaMap::request, &map);
                                backends::uapi::vfio::Type1DmaUnmap unmap{.iova = range.start.value, .size = 4096};
                                kernel_.ioctl(container_, backends::uapi::vfio::Type1DmaUnmap::request, &unmap);
                              },
                              1000));
  }
  std::printf(
      "{\"put_tce_in_kernel_ns\": %.0f, \"put_tce_userspace_same_ns\": %.0f, \"put_tce_userspace_ns\": %.0f, "
      "\"ratio\": %.2f, \"pair_ns\": %.0f, \"pair_bare_ioctls_ns\": %.0f, \"pair_ratio\": %.3f}\n",
      static_cast<double>(in_kernel.nanoseconds) / calls, static_cast<double>(in_user.nanoseconds) / calls,
      static_cast<double>(changing.nanoseconds) / calls,
      static_cast<double>(changing.nanoseconds) / static_cast<double>(in_kernel.nanoseconds), seam, bare, seam / bare);
  EXPECT_LT(in_kernel.nanoseconds, changing.nanoseconds);
}

}  // namespace
}  // namespace iovane::test
