// The walk of a first stage that somebody else writes, on top of a second stage: every table pointer and every leaf is
// an intermediate address, translated by the parent.
//
// Written from the architectures' manuals (VMSAv8-64, SMMUv3 stream table entries and context descriptors; VT-d
// first-stage entries), not from the code that writes tables here, so that the two check each other. Entries are read
// as a walker reads them: each once, whole, in order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backends/model/options.hpp"
#include "backends/model/page_table.hpp"

namespace iovane::backends::model {

/// What a first stage has no answer to.
enum class StageFault : std::uint8_t {
  none,
  translation,    ///< no valid entry, or an address beyond what is translated
  access_flag,    ///< an entry whose accessed state software would have to set
  permission,     ///< for the access as such: privileged only
  configuration,  ///< no valid context descriptor
  second_stage,   ///< the parent has nothing there
  aborted,        ///< the stream table entry says so; nothing is recorded
};

/// A leaf as a translation cache may keep it: one entry of the table, or all that a contiguous hint vouches for.
struct CachedRun {
  std::uint64_t start = 0, last = 0;  ///< input addresses
  std::uint64_t address = 0;          ///< where `start` leads, intermediate
  std::uint64_t entry_bytes = 0;      ///< what one entry translates: an invalidation takes whole entries
  Access access = Access::none;
};

class FirstStage {
 public:
  /// What the context says: walkers remember it until they are told to forget.
  struct Root {
    std::uint64_t address = 0;
    unsigned levels = 0;  ///< 0: not known
    std::uint64_t last = 0;
  };
  /// What a walker knows beforehand and learns.
  struct Walk {
    Root root{};                       ///< levels 0: read the context
    const std::byte* table = nullptr;  ///< the level-0 table for the address, or null
    CachedRun run{};                   ///< out: the leaf that was used
    StageFault fault = StageFault::none;
  };

  FirstStage() noexcept = default;
  /// SMMUv3: the two words of a stream table entry.
  static FirstStage smmuv3(std::uint64_t word_0, std::uint64_t word_1) noexcept;
  /// VT-d: where the root table lies, and how many levels there are.
  static FirstStage x86(std::uint64_t root, unsigned levels) noexcept;

  Translation walk(const PageTable& parent, Iova address, Walk& known) const noexcept;
  std::uint16_t asid(const PageTable& parent) const noexcept;
  bool is_smmuv3() const noexcept { return kind_ == Nesting::smmuv3; }
  /// Translates, rather than aborting or passing everything on.
  bool translates() const noexcept { return mode_ == Mode::translate; }

 private:
  enum class Mode : std::uint8_t { translate, bypass, abort };
  Root root(const PageTable& parent) const noexcept;

  Nesting kind_ = Nesting::none;
  Mode mode_ = Mode::translate;
  std::uint64_t base_ = 0;
  unsigned levels_ = 0;
};

}  // namespace iovane::backends::model
