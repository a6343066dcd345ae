// A guest's IOMMU on an address space of the interface under test, with a device to witness what it does.
#pragma once

#include <memory>

#include "conformance/engine_conformance.hpp"
#include "viommu/engine_target.hpp"
#include "viommu/guest_ram.hpp"

namespace iovane::test {

class FrontEndContract : public EngineConformance {
 protected:
  static constexpr std::uint64_t tables_bytes = 4U << 20;
  static constexpr std::uint64_t ram_start = 16U << 20;
  static constexpr std::size_t ram_pages = 1024;
  static constexpr std::uint16_t device_function = 0x08;

  void SetUp() override {
    Conformance::SetUp();
    if (HasFatalFailure() || IsSkipped()) return;
    open_space(*kernel_);
    if (HasFatalFailure()) return;
    ASSERT_TRUE(guest_memory_.add(tables_.config()));
    ASSERT_TRUE(guest_memory_.add({ram_start, ram_.length(), ram_.data(), -1, 0, false}));
    auto target = viommu::EngineTarget::create(address_space_, guest_memory_);
    ASSERT_TRUE(target) << target.error().message();
    target_ = *std::move(target);
  }
  void TearDown() override {
    target_.reset();
    close_space();
    Conformance::TearDown();
  }

  static std::uint64_t iova(std::uint64_t page) { return base + page * 4096; }
  /// The guest's pages have 4 KiB, whatever the host's have.
  std::span<std::byte> guest_page(std::size_t page) const { return ram_.bytes().subspan(page * 4096, 4096); }
  static std::uint64_t gpa(std::size_t page) { return ram_start + page * 4096; }
  /// The device reads and writes guest page `page` at the IOVA of `slot`.
  testing::AssertionResult reaches(std::uint64_t slot, std::size_t page) {
    if (auto read = reads(*witness_, Iova{iova(slot)}, guest_page(page)); !read) return read;
    return writes(*witness_, Iova{iova(slot)}, guest_page(page));
  }
  testing::AssertionResult cannot_reach(std::uint64_t slot, std::size_t page) {
    if (auto read = cannot_read(*witness_, Iova{iova(slot)}, guest_page(page)); !read) return read;
    return cannot_write(*witness_, Iova{iova(slot)}, guest_page(page));
  }

  viommu::GuestRam tables_{tables_bytes};
  Memory ram_{ram_pages};
  viommu::GuestMemory guest_memory_;
  std::unique_ptr<viommu::EngineTarget> target_;
};

}  // namespace iovane::test
