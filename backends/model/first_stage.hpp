// The walk of a first stage that somebody else writes, on top of a second stage: every table pointer and every leaf is
// an intermediate address, translated by the parent.
//
// Written from the architectures' manuals (VMSAv8-64 and SMMUv3 context descriptors; VT-d first-stage entries; AMD
// guest tables), not from the code that writes tables here, so that the two check each other. What hardware would
// report as a fault is "nothing there". Entries are read as a walker reads them: each once, whole, in order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backends/model/options.hpp"
#include "backends/model/page_table.hpp"

namespace iovane::backends::model {

class FirstStage {
 public:
  FirstStage() noexcept = default;
  /// SMMUv3: where the context descriptor lies.
  static FirstStage smmuv3(std::uint64_t context) noexcept;
  /// VT-d and AMD: where the root table lies, and how many levels there are.
  static FirstStage x86(std::uint64_t root, unsigned levels) noexcept;

  /// `table`: a level-0 table that is known for this address, or null: then it is found, and comes back.
  Translation walk(const PageTable& parent, Iova address, const std::byte*& table) const noexcept;
  Iova last_address(const PageTable& parent) const noexcept;
  std::uint16_t asid(const PageTable& parent) const noexcept;

 private:
  struct Root {
    std::uint64_t address = 0;
    unsigned levels = 0;  ///< 0: not valid
  };
  Root root(const PageTable& parent) const noexcept;

  Nesting kind_ = Nesting::none;
  std::uint64_t base_ = 0;
  unsigned levels_ = 0;
};

}  // namespace iovane::backends::model
