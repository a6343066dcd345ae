#include "conformance/conformance.hpp"

#include <algorithm>

namespace iovane::test {

std::string parameter_name(Interface interface) {
  std::string name{to_string(interface)};
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

void Conformance::SetUp() {
  if (!machine_can_have(GetParam()))
    GTEST_SKIP() << "this machine's architecture has no " << to_string(GetParam()) << " interface";
  restart({});
}

void Conformance::restart(const MachineOptions& options) {
  backend_.reset();
  kernel_.reset();
  machine_.reset();
  MachineOptions wanted = options;
  wanted.interface = GetParam();
  machine_ = make_machine(wanted);
  ASSERT_NE(machine_, nullptr);
  ASSERT_FALSE(machine_->devices().empty()) << "no device can bear witness";
  pinned_before_ = machine_->kernel().memlock().pinned;
  locked_before_ = machine_->kernel().memlock().locked;
  kernel_ = std::make_unique<CountingKernel>(machine_->kernel());
  backend_ = open();
  ASSERT_NE(backend_, nullptr);
}

void Conformance::TearDown() {
  witness_.reset();
  space_.reset();
  backend_.reset();
  if (kernel_ == nullptr) return;
  EXPECT_EQ(kernel_->open_descriptors(), 0) << "descriptors leaked";
  EXPECT_EQ(machine_->kernel().memlock().pinned, pinned_before_) << "pins leaked";
  EXPECT_EQ(machine_->kernel().memlock().locked, locked_before_) << "locked memory leaked";
}

std::unique_ptr<Backend> Conformance::open(int handed_in, bool duplicate) {
  auto opened = open_backend(
      *kernel_, {.name = std::string{to_string(GetParam())}, .descriptor = {.fd = handed_in, .duplicate = duplicate}});
  EXPECT_TRUE(opened) << opened.error().message();
  return opened ? std::move(*opened) : nullptr;
}

std::unique_ptr<BackendSpace> Conformance::make_space(const SpaceOptions& options) {
  auto made = backend_->create_space(options);
  EXPECT_TRUE(made) << made.error().message();
  return made ? std::move(*made) : nullptr;
}

AttachedDevice Conformance::attach(BackendSpace& space, std::size_t device) {
  auto attached = space.attach({.pci_address = machine_->devices().at(device)});
  EXPECT_TRUE(attached) << attached.error().message();
  return attached ? std::move(*attached) : AttachedDevice{};
}

void Conformance::make_default() {
  space_ = make_space();
  ASSERT_NE(space_, nullptr);
  device_ = attach(*space_);
  ASSERT_GE(device_.device_fd, 0);
  witness_ = machine_->witness(*space_, device_);
  ASSERT_NE(witness_, nullptr) << device_.name << " is no witness";
  if (!spapr_v2()) return;
  const auto window = space_->spapr()->create_window({.length = Bytes{64U << 20}, .page = Bytes{4096}});
  ASSERT_TRUE(window) << window.error().message();
}

std::optional<std::uint64_t> Conformance::high_iova() {
  if (!spapr()) return 0x12'3450'0000;
  const auto usable = space_->usable_ranges();
  if (!usable || usable->empty() || usable->back().start.value <= 0xffff'ffff) return std::nullopt;
  return usable->back().start.value + 0x10'0000;
}

Bytes Conformance::charged() {
  const MemlockUse use = kernel_->memlock();
  if (!spapr()) return Bytes{use.pinned.value - pinned_before_.value - space_->table_memory().value};
  std::uint64_t windows = 0;
  for (const SpaprWindow& window : space_->spapr()->windows()) windows += window.table.value;
  return Bytes{use.locked.value - locked_before_.value - windows};
}

BackendOp Conformance::map_op(IovaRange range, std::uint64_t memory, Access access) {
  return {.kind = OpKind::map, .access = access, .region = {}, .range = range, .memory = memory};
}

BackendOp Conformance::unmap_op(IovaRange range) { return {.kind = OpKind::unmap, .range = range}; }

BackendOpResult Conformance::run(BackendSpace& space, const BackendOp& op) {
  BackendOpResult result;
  space.execute({&op, 1}, {&result, 1});
  return result;
}

std::vector<BackendOpResult> Conformance::run_batch(BackendSpace& space, const std::vector<BackendOp>& ops) {
  std::vector<BackendOpResult> results(ops.size());
  space.execute(ops, results);
  return results;
}

namespace {

constexpr std::size_t probe_bytes = 64;

std::vector<std::byte> inverted(std::span<const std::byte> bytes) {
  std::vector<std::byte> other;
  for (const std::byte b : bytes) other.push_back(~b);
  return other;
}

}  // namespace

testing::AssertionResult Conformance::reads(Witness& witness, Iova iova, std::span<const std::byte> memory) {
  const auto wanted = memory.first(std::min(memory.size(), probe_bytes));
  const auto got = witness.read(iova, wanted.size());
  if (std::equal(got.begin(), got.end(), wanted.begin(), wanted.end())) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "the device reads other bytes at " << std::hex << iova.value;
}

testing::AssertionResult Conformance::cannot_read(Witness& witness, Iova iova, std::span<const std::byte> memory) {
  if (!reads(witness, iova, memory)) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "the device can still read the memory at " << std::hex << iova.value;
}

testing::AssertionResult Conformance::writes(Witness& witness, Iova iova, std::span<std::byte> memory) {
  const auto sent = inverted(memory.first(std::min(memory.size(), probe_bytes)));
  witness.write(iova, sent);
  if (std::equal(sent.begin(), sent.end(), memory.begin())) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "what the device wrote at " << std::hex << iova.value << " did not arrive";
}

testing::AssertionResult Conformance::cannot_write(Witness& witness, Iova iova, std::span<std::byte> memory) {
  const std::vector<std::byte> before{memory.begin(), memory.end()};
  witness.write(iova, inverted(memory.first(std::min(memory.size(), probe_bytes))));
  if (std::equal(before.begin(), before.end(), memory.begin())) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "the device wrote memory at " << std::hex << iova.value;
}

}  // namespace iovane::test
