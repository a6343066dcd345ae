// The fixture of the contract's tests: one interface of one kernel, spaces on it, and witnesses.
#pragma once

#include <gtest/gtest.h>

#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backends/backend.hpp"
#include "backends/kernel_decorators.hpp"
#include "backends/open.hpp"
#include "backends/spapr_tce/spapr_control.hpp"
#include "conformance/machine.hpp"
#include "conformance/memory.hpp"

namespace iovane::test {

using namespace backends;

class Conformance : public testing::TestWithParam<Interface> {
 protected:
  void SetUp() override;
  /// Everything is taken down; no descriptor and no pin may be left.
  void TearDown() override;

  bool compat() const { return GetParam() == Interface::compat_v1 || GetParam() == Interface::compat_v2; }
  bool container() const { return is_container(GetParam()); }
  bool type1() const { return GetParam() == Interface::type1_v1 || GetParam() == Interface::type1_v2; }
  bool stage1() const { return GetParam() == Interface::stage1; }
  /// Devices come in by their own node; others by their group's.
  bool by_cdev() const { return GetParam() == Interface::iommufd || stage1(); }
  /// sPAPR: windows instead of reserved ranges, version 2 with registered memory.
  bool spapr() const { return GetParam() == Interface::spapr_v1 || spapr_v2(); }
  bool spapr_v2() const { return GetParam() == Interface::spapr_v2; }
  bool version_1() const { return GetParam() == Interface::type1_v1 || GetParam() == Interface::compat_v1; }

  /// Another machine in the first one's place, with nothing open yet but the backend.
  void restart(const MachineOptions& options);
  std::unique_ptr<Backend> open(int handed_in = -1, bool duplicate = false);
  std::unique_ptr<BackendSpace> make_space(const SpaceOptions& options = {});
  AttachedDevice attach(BackendSpace& space, std::size_t device = 0);
  /// A space with the first device attached, and its witness. On sPAPR version 2 with a second window.
  void make_default();
  /// An IOVA above 4 GiB with room for a MiB; nothing where all windows are below.
  std::optional<std::uint64_t> high_iova();
  /// Bytes that the kernel charged for registered memory and mappings, windows and the spaces' own tables left out.
  Bytes charged();

  static IovaRange at(std::uint64_t iova, std::uint64_t pages) {
    return *IovaRange::from_length(Iova{iova}, Bytes{pages * os_page_bytes()});
  }
  static BackendOp map_op(IovaRange range, std::uint64_t memory, Access access = Access::read_write);
  static BackendOp unmap_op(IovaRange range);
  BackendOpResult run(BackendSpace& space, const BackendOp& op);
  std::vector<BackendOpResult> run_batch(BackendSpace& space, const std::vector<BackendOp>& ops);
  BackendOpResult map(IovaRange range, std::uint64_t memory, Access access = Access::read_write) {
    return run(*space_, map_op(range, memory, access));
  }
  BackendOpResult unmap(IovaRange range) { return run(*space_, unmap_op(range)); }

  /// The device finds the first bytes of `memory` at `iova`.
  static testing::AssertionResult reads(Witness& witness, Iova iova, std::span<const std::byte> memory);
  /// The device does not get the first bytes of `memory` at `iova`.
  static testing::AssertionResult cannot_read(Witness& witness, Iova iova, std::span<const std::byte> memory);
  /// What the device writes at `iova` arrives in `memory`.
  static testing::AssertionResult writes(Witness& witness, Iova iova, std::span<std::byte> memory);
  /// What the device writes at `iova` leaves `memory` alone.
  static testing::AssertionResult cannot_write(Witness& witness, Iova iova, std::span<std::byte> memory);

  std::unique_ptr<Machine> machine_;
  std::unique_ptr<CountingKernel> kernel_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<BackendSpace> space_;
  AttachedDevice device_;
  std::unique_ptr<Witness> witness_;
  Bytes pinned_before_{};
  Bytes locked_before_{};

  // Far from address 0, from interrupts and from the witness's scratch page; a multiple of 2 MiB.
  static constexpr std::uint64_t base = 0x1000'0000;
};

#define IOVANE_CONFORMANCE(suite)                                                                         \
  INSTANTIATE_TEST_SUITE_P(                                                                               \
      Kernel, suite,                                                                                      \
      testing::Values(Interface::iommufd, Interface::type1_v2, Interface::type1_v1, Interface::compat_v2, \
                      Interface::compat_v1, Interface::spapr_v2, Interface::spapr_v1, Interface::stage1), \
      [](const auto& test) { return iovane::test::parameter_name(test.param); })

std::string parameter_name(Interface interface);

}  // namespace iovane::test
