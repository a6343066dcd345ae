// A guest's TCE hypercalls on a POWER kernel with KVM: handled inside the kernel, their effect seen by a device's DMA,
// the table moved to userspace and back, and what each way costs.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "backends/kvm_tce/kvm_tce.hpp"
#include "backends/open.hpp"
#include "backends/system_kernel.hpp"
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

constexpr std::size_t ram_bytes = 32U << 20;
constexpr std::uint64_t buid = 0x8000'0000'2000'0000;
constexpr std::uint32_t liobn = 0x8000'0001;
constexpr std::uint64_t source = 0x10'0000;  // guest physical pages
constexpr std::uint64_t list = 0x20'0000;
constexpr std::uint64_t at = 0x100'0000;  // bus addresses
constexpr std::uint64_t no_ram = 0x4000'0000;

/// A VFIO container with one device, as the PAPR front end sees it.
struct Container {
  std::unique_ptr<backends::BackendSpace> space;
  std::unique_ptr<Witness> witness;
  std::unique_ptr<BackendTarget> target;
};

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
    auto backend = backends::open_backend(kernel_, {.name = "spapr", .descriptor = {}});
    ASSERT_TRUE(backend) << backend.error().message();
    backend_ = *std::move(backend);
    auto kvm = backends::KvmTce::open(kernel_, {.fd = guest_->vm(), .duplicate = false});
    ASSERT_TRUE(kvm) << kvm.error().message();
    kvm_ = *std::move(kvm);
    ASSERT_TRUE(kvm_->any_window() && kvm_->lists_in_kernel() && kvm_->can_couple());
    host_ = std::make_unique<KvmSpaprHost>(*kvm_);
    papr_ = std::make_unique<PaprTce>(memory_, host_.get());
    open(first_, 0);
    if (HasFatalFailure()) return;
    PhbConfig phb;
    phb.buid = buid;
    phb.liobn = liobn;
    window_ = first_.space->usable_ranges()->front();
    phb.dma32_address = window_.start.value;
    phb.dma32_bytes = window_.length().value;
    ASSERT_TRUE(papr_->add_phb(phb));
    const auto added = papr_->add_device(buid, first_.target.get());
    ASSERT_TRUE(added) << added.error().message();
    ASSERT_TRUE(papr_->in_kvm(liobn));
  }
  void TearDown() override {
    for (Container* const container : {&second_, &first_}) {
      container->witness.reset();
      // Skipped, or not yet behind the bridge: nothing to take out.
      if (papr_ && container->target) static_cast<void>(papr_->remove_device(buid, container->target.get()));
    }
    papr_.reset();
    for (Container* const container : {&second_, &first_}) {
      container->target.reset();
      container->space.reset();
    }
    host_.reset();
    kvm_.reset();
    backend_.reset();
    guest_.reset();
    if (ram_ != nullptr && ram_ != MAP_FAILED) ::munmap(ram_, ram_bytes);
  }

  static std::vector<std::string> devices() {
    std::vector<std::string> found;
    const char* const text = std::getenv("IOVANE_LAB_DEVICES");
    std::istringstream words{text != nullptr ? text : ""};
    for (std::string word; std::getline(words, word, ',');) found.push_back(word);
    return found;
  }
  /// A container with device number `number`; guest memory is registered with it.
  void open(Container& container, std::size_t number) {
    ASSERT_GT(devices().size(), number);
    auto space = backend_->create_space({});
    ASSERT_TRUE(space) << space.error().message();
    container.space = *std::move(space);
    const auto device = container.space->attach({.pci_address = devices()[number]});
    ASSERT_TRUE(device) << device.error().message();
    container.witness = make_edu_witness(kernel_, *container.space, *device);
    ASSERT_NE(container.witness, nullptr);
    container.target = std::make_unique<BackendTarget>(devices()[number], *container.space);
    for (const Region& region : memory_.regions()) ASSERT_TRUE(container.target->add_region(region));
  }

  TinyGuest::Outcome hypercall(std::uint64_t number, const std::array<std::uint64_t, 4>& arguments,
                               std::uint64_t times = 1, std::uint64_t alternate = 0) {
    const auto outcome = guest_->call(
        number, arguments, times,
        [&](std::uint64_t n, const std::array<std::uint64_t, 4>& a) { return papr_->call_and_wait(n, a).status; },
        alternate);
    EXPECT_TRUE(outcome.ok) << "the guest went astray";
    return outcome;
  }
  /// Writes a list of `count` entries for consecutive pages that repeat after `pages`.
  void write_list(std::uint64_t count, std::uint64_t pages, std::uint64_t page = 4096) {
    for (std::uint64_t i = 0; i < count; ++i) {
      const std::uint64_t entry = __builtin_bswap64((source + page * (i % pages)) | 3);
      std::memcpy(ram_ + list + 8 * i, &entry, sizeof entry);
    }
  }
  bool reads(std::uint64_t bus, std::uint64_t gpa) { return reads(first_, bus, gpa); }
  bool reads(Container& container, std::uint64_t bus, std::uint64_t gpa) const {
    const auto got = container.witness->read(Iova{bus}, 64);
    return std::equal(got.begin(), got.end(), ram_ + gpa);
  }
  bool writes(std::uint64_t bus, std::uint64_t gpa) { return writes(first_, bus, gpa); }
  bool writes(Container& container, std::uint64_t bus, std::uint64_t gpa) const {
    std::vector<std::byte> sent;
    for (std::size_t i = 0; i < 64; ++i) sent.push_back(~ram_[gpa + i]);
    container.witness->write(Iova{bus}, sent);
    return std::equal(sent.begin(), sent.end(), ram_ + gpa);
  }

  backends::SystemKernel kernel_;
  GuestMemory memory_;
  std::byte* ram_ = nullptr;
  std::unique_ptr<TinyGuest> guest_;
  std::unique_ptr<backends::Backend> backend_;
  std::unique_ptr<backends::KvmTce> kvm_;
  std::unique_ptr<KvmSpaprHost> host_;
  std::unique_ptr<PaprTce> papr_;
  Container first_;
  Container second_;
  IovaRange window_{};
};

TEST_F(KvmTceLab, hypercalls_are_handled_in_the_kernel_and_dma_follows) {
  const auto put = hypercall(hcall::put_tce, {liobn, at, source | 3, 0});
  EXPECT_EQ(put.status, hcall::success);
  EXPECT_EQ(put.exits, 0U);
  EXPECT_TRUE(reads(at, source));
  EXPECT_TRUE(writes(at, source));

  write_list(512, 64);
  const auto indirect = hypercall(hcall::put_tce_indirect, {liobn, at + 0x10'0000, list, 512});
  EXPECT_EQ(indirect.status, hcall::success);
  EXPECT_EQ(indirect.exits, 0U);
  EXPECT_TRUE(reads(at + 0x10'0000 + 511 * 4096, source + 63 * 4096));

  const auto stuff = hypercall(hcall::stuff_tce, {liobn, at + 0x10'0000, 0, 512});
  EXPECT_EQ(stuff.status, hcall::success);
  EXPECT_EQ(stuff.exits, 0U);
  EXPECT_FALSE(writes(at + 0x10'0000 + 511 * 4096, source + 63 * 4096)) << "the entry was taken away";
  EXPECT_TRUE(reads(at, source)) << "and this one was not";

  const auto clear = hypercall(hcall::put_tce, {liobn, at, 0, 0});
  EXPECT_EQ(clear.status, hcall::success);
  EXPECT_EQ(clear.exits, 0U);
  EXPECT_FALSE(writes(at, source));
}

TEST_F(KvmTceLab, bad_hypercalls_have_their_return_codes) {
  const auto unknown = hypercall(hcall::put_tce, {0x1234, at, source | 3, 0});
  EXPECT_EQ(unknown.status, hcall::parameter);
  EXPECT_EQ(unknown.exits, 1U) << "KVM leaves unknown LIOBNs to userspace";
  const std::uint64_t beyond = window_.last.value + 1;
  struct InKernel {
    const char* what;
    std::uint64_t number;
    std::array<std::uint64_t, 4> arguments;
  };
  // Not here: lists that begin inside the window and pass its end. Linux 6.12 checks their first entry only, and warns
  // from deep inside.
  const InKernel refused[] = {
      {"put outside the window", hcall::put_tce, {liobn, beyond, source | 3, 0}},
      {"list outside the window", hcall::put_tce_indirect, {liobn, beyond, list, 2}},
      {"list of 513", hcall::put_tce_indirect, {liobn, at, list, 513}},
      {"misaligned list", hcall::put_tce_indirect, {liobn, at, list + 8, 2}},
      {"stuff with rights", hcall::stuff_tce, {liobn, at, source | 3, 2}},
  };
  write_list(512, 64);
  for (const InKernel& call : refused) {
    SCOPED_TRACE(call.what);
    const auto outcome = hypercall(call.number, call.arguments);
    EXPECT_EQ(outcome.status, hcall::parameter);
    EXPECT_EQ(outcome.exits, 0U);
  }
  ASSERT_EQ(hypercall(hcall::put_tce, {liobn, at, source | 3, 0}).status, hcall::success);
  const auto no_memory = hypercall(hcall::put_tce, {liobn, at, no_ram | 3, 0});
  EXPECT_EQ(no_memory.status, hcall::parameter);
  EXPECT_EQ(no_memory.exits, 1U) << "the kernel has no memory slot there";
  EXPECT_EQ(papr_->translate(liobn, at).gpa, source) << "the entry is what it was";
  EXPECT_TRUE(reads(at, source)) << "and so is the hardware's";
  const auto no_list = hypercall(hcall::put_tce_indirect, {liobn, at, no_ram, 2});
  EXPECT_EQ(no_list.status, hcall::parameter);
  const std::uint64_t bad = __builtin_bswap64(no_ram | 3);
  std::memcpy(ram_ + list + 8, &bad, sizeof bad);
  const auto bad_entry = hypercall(hcall::put_tce_indirect, {liobn, at + 0x1'0000, list, 2});
  EXPECT_EQ(bad_entry.status, hcall::parameter);
  EXPECT_EQ(bad_entry.exits, 1U);
  EXPECT_TRUE(reads(at + 0x1'0000, source)) << "what came before the bad entry stays";
  EXPECT_EQ(papr_->translate(liobn, at + 0x1'1000).access, Access::none);
  const auto again = hypercall(hcall::put_tce, {liobn, at + 0x1'0000, 0, 0});
  EXPECT_EQ(again.status, hcall::success);
  EXPECT_EQ(again.exits, 0U) << "what userspace did for the kernel is the kernel's again";
  EXPECT_FALSE(writes(at + 0x1'0000, source));
}

TEST_F(KvmTceLab, the_table_moves_to_userspace_and_back_without_losing_an_entry) {
  for (std::uint64_t i = 0; i < 16; ++i)
    ASSERT_EQ(hypercall(hcall::put_tce, {liobn, at + i * 8192, (source + i * 4096) | 3, 0}).status, hcall::success);
  const PaprStats before = papr_->stats();
  RecordingTarget other;  // no container: its presence keeps the table out of KVM
  other.may_cut = true;
  ASSERT_TRUE(papr_->add_device(buid, &other));
  EXPECT_FALSE(papr_->in_kvm(liobn));
  EXPECT_EQ(papr_->stats().moves_to_user, before.moves_to_user + 1);
  for (std::uint64_t i = 0; i < 16; i += 5) EXPECT_TRUE(reads(at + i * 8192, source + i * 4096)) << i;
  const auto put = hypercall(hcall::put_tce, {liobn, at + 0x20'0000, (source + 0x2'0000) | 3, 0});
  EXPECT_EQ(put.status, hcall::success);
  EXPECT_EQ(put.exits, 1U);
  EXPECT_TRUE(reads(at + 0x20'0000, source + 0x2'0000));
  EXPECT_EQ(hypercall(hcall::put_tce, {liobn, at, 0, 0}).exits, 1U);
  EXPECT_FALSE(writes(at, source));

  ASSERT_TRUE(papr_->remove_device(buid, &other));
  EXPECT_TRUE(papr_->in_kvm(liobn));
  EXPECT_EQ(papr_->stats().moves_to_kvm, before.moves_to_kvm + 1);
  for (std::uint64_t i = 1; i < 16; i += 5) EXPECT_TRUE(reads(at + i * 8192, source + i * 4096)) << i;
  for (std::uint64_t i = 1; i < 16; ++i) EXPECT_EQ(papr_->translate(liobn, at + i * 8192).gpa, source + i * 4096);
  EXPECT_TRUE(reads(at + 0x20'0000, source + 0x2'0000));
  const auto again = hypercall(hcall::put_tce, {liobn, at, (source + 0x3'0000) | 3, 0});
  EXPECT_EQ(again.status, hcall::success);
  EXPECT_EQ(again.exits, 0U);
  EXPECT_TRUE(reads(at, source + 0x3'0000));
}

TEST_F(KvmTceLab, containers_share_a_table_by_reference) {
  ASSERT_EQ(hypercall(hcall::put_tce, {liobn, at, source | 3, 0}).status, hcall::success);
  if (devices().size() < 2) GTEST_SKIP() << "one device only";
  open(second_, 1);
  const auto added = papr_->add_device(buid, second_.target.get());
  ASSERT_TRUE(added) << added.error().message();
  ASSERT_TRUE(papr_->in_kvm(liobn));
  EXPECT_TRUE(reads(second_, at, source)) << "what was there before it came";
  const auto put = hypercall(hcall::put_tce, {liobn, at + 4096, (source + 4096) | 3, 0});
  EXPECT_EQ(put.status, hcall::success);
  EXPECT_EQ(put.exits, 0U);
  for (Container* const container : {&first_, &second_}) {
    EXPECT_TRUE(reads(*container, at + 4096, source + 4096));
    EXPECT_TRUE(writes(*container, at + 4096, source + 4096));
  }
  ASSERT_TRUE(papr_->remove_device(buid, second_.target.get()));
  EXPECT_TRUE(papr_->in_kvm(liobn));
  EXPECT_FALSE(writes(second_, at + 4096, source + 4096)) << "nothing is left behind";
  EXPECT_TRUE(reads(at + 4096, source + 4096)) << "and the other one keeps it";
  EXPECT_EQ(hypercall(hcall::put_tce, {liobn, at, (source + 8192) | 3, 0}).exits, 0U);
  EXPECT_TRUE(reads(at, source + 8192));
  EXPECT_FALSE(reads(second_, at, source + 8192));
}

TEST_F(KvmTceLab, a_guests_second_window_is_the_kernels_too) {
  // 64 KiB pages for the guest; the host's are as large where its memory allows, else sixteen of 4 KiB for each.
  const bool large = os_page_bytes() >= 65536;
  const auto hardware =
      first_.space->spapr()->create_window({.length = Bytes{64U << 20}, .page = Bytes{large ? 65536U : 4096U}});
  ASSERT_TRUE(hardware) << hardware.error().message();
  // The front end asks its targets for their windows when they join.
  ASSERT_TRUE(papr_->remove_device(buid, first_.target.get()));
  ASSERT_TRUE(papr_->add_device(buid, first_.target.get()));
  const auto made = papr_->create_window(buid, 16, 26);
  ASSERT_EQ(made.status, rtas::success);
  ASSERT_EQ(made.address, hardware->range.start.value);
  ASSERT_TRUE(papr_->in_kvm(made.liobn));
  const auto put = hypercall(hcall::put_tce, {made.liobn, made.address + 0x5'0000, 0x30'0000 | 3, 0});
  EXPECT_EQ(put.status, hcall::success);
  EXPECT_EQ(put.exits, 0U);
  EXPECT_TRUE(reads(made.address + 0x5'3000, 0x30'3000));
  EXPECT_TRUE(writes(made.address + 0x5'f000, 0x30'f000));
  const auto odd = hypercall(hcall::put_tce, {made.liobn, made.address, 0x30'1000 | 3, 0});
  EXPECT_EQ(odd.status, hcall::parameter) << "no page of 64 KiB begins there";
  EXPECT_EQ(papr_->remove_window(made.liobn), rtas::success);
  EXPECT_FALSE(writes(made.address + 0x5'3000, 0x30'3000)) << "the guest's window took its entries along";
  EXPECT_TRUE(first_.space->spapr()->remove_window(hardware->range.start));
}

/// What a guest pays for a map and an unmap, by where its table lives; all in one run.
TEST_F(KvmTceLab, what_each_way_costs) {
  constexpr std::uint64_t pairs = 1000, lists = 20, rounds = 5;
  write_list(512, 512);
  struct Cost {
    double pair = 1e18, listed = 1e18, stuffed = 1e18;  // ns; the fastest of the rounds
  };
  const auto measure = [&](Cost& cost, bool in_kernel) {
    const auto put = hypercall(hcall::put_tce, {liobn, at, source | 3, 0}, 2 * pairs, source | 3);
    EXPECT_EQ(put.exits, in_kernel ? 0 : 2 * pairs);
    cost.pair = std::min(cost.pair, static_cast<double>(put.nanoseconds) / pairs);
    for (std::uint64_t i = 0; i < lists; ++i) {
      const auto listed = hypercall(hcall::put_tce_indirect, {liobn, at, list, 512});
      const auto stuffed = hypercall(hcall::stuff_tce, {liobn, at, 0, 512});
      EXPECT_EQ(listed.exits + stuffed.exits, in_kernel ? 0U : 2U);
      cost.listed = std::min(cost.listed, static_cast<double>(listed.nanoseconds) / 512);
      cost.stuffed = std::min(cost.stuffed, static_cast<double>(stuffed.nanoseconds) / 512);
    }
  };
  Cost kernel, user;
  for (std::uint64_t round = 0; round < rounds; ++round) {
    measure(kernel, true);
    RecordingTarget other;
    other.may_cut = true;
    ASSERT_TRUE(papr_->add_device(buid, &other));
    measure(user, false);
    ASSERT_TRUE(papr_->remove_device(buid, &other));
  }
  std::printf(
      "{\"benchmark\": \"guest_tce\", \"pair_in_kernel_ns\": %.0f, \"pair_userspace_ns\": %.0f, \"pair_ratio\": %.2f, "
      "\"indirect_per_tce_in_kernel_ns\": %.0f, \"indirect_per_tce_userspace_ns\": %.0f, \"indirect_ratio\": %.2f, "
      "\"stuff_per_tce_in_kernel_ns\": %.0f, \"stuff_per_tce_userspace_ns\": %.0f, \"stuff_ratio\": %.2f}\n",
      kernel.pair, user.pair, user.pair / kernel.pair, kernel.listed, user.listed, user.listed / kernel.listed,
      kernel.stuffed, user.stuffed, user.stuffed / kernel.stuffed);
  EXPECT_LT(kernel.pair, user.pair);
}

}  // namespace
}  // namespace iovane::test
