// Runs: stretches of IOVA cut into slots of one length, one word of truth per slot.
//
// Purpose: every interval that is live, cached or waiting lies in exactly one slot of one run, and the slot's word says
//   which of these it is. Deciding about an interval is one operation on that word.
// State word of a slot (SlotWord):
//     [63..16] incarnation's generation | [15..3] incarnation's thread cache + 1 | [2..0] state
//   free      nobody's; whoever changes it by CAS has it
//   hoarded   in the magazine of that incarnation of a thread cache (thread_cache.hpp)
//   live      handed out. With an incarnation: *biased*, only that incarnation may retire it, by plain stores, until it
//             is closed. Without: anybody by CAS.
//   settled   left the run for good; the map gives its units away. The intent comes first, the map follows: settle() in
//             interval_allocator.cpp, which any thread that meets the word may finish.
// Hints of a run: `bits`, the slots that are probably free, where the slot's own word decides; `flags`: doomed (its
// slots
//   are not handed out again; set for good before the run is retired) and parked.
// Transitions:  free -> hoarded | live | settled (CAS)            hoarded -> live (owner) | free, settled (CAS)
//               live -> hoarded (owner) | hoarded, free, settled (CAS)
// Identity: the tag names the incarnation of the object and is closed (0 slots) while its fields change. A reader
//   without a section loads the tag, the fields and a slot's word, and the tag again: open and unchanged proves that
//   they belong together. A reader in a section that got the run from the section's map needs no tag.
// Reclamation: era.hpp. `slots_left` counts slots that the map still gives to the run; who takes the last one retires
// it.
#pragma once

#include <atomic>
#include <cstdint>

#include "iova/metadata_arena.hpp"
#include "iova/unit.hpp"

namespace iovane::iova {

enum class SlotState : std::uint8_t { free = 0, hoarded = 1, live = 2, settled = 3 };

/// Which thread cache, at which generation; bits [2..0] are free for a state.
struct Incarnation {
  std::uint64_t raw = 0;
  static constexpr Incarnation of(std::uint32_t cache_index, std::uint64_t generation) noexcept {
    return {(generation << 16) | (std::uint64_t{cache_index + 1} << 3)};
  }
  constexpr bool nobody() const noexcept { return raw == 0; }
  constexpr std::uint32_t cache_index() const noexcept { return static_cast<std::uint32_t>((raw >> 3) & 0x1fff) - 1; }
  constexpr bool operator==(const Incarnation&) const noexcept = default;
};

struct SlotWord {
  std::uint64_t raw = 0;
  static constexpr SlotWord of(SlotState state, Incarnation owner = {}) noexcept {
    return {owner.raw | static_cast<std::uint64_t>(state)};
  }
  constexpr SlotState state() const noexcept { return static_cast<SlotState>(raw & 7); }
  constexpr Incarnation owner() const noexcept { return {raw & ~std::uint64_t{7}}; }
  constexpr bool operator==(const SlotWord&) const noexcept = default;
};

/// Where a run's slots go when they are freed.
enum class RunKind : std::uint8_t {
  shelved,    ///< cut for a length class: slots move through magazines
  claimed,    ///< made by claim(): freed slots stay for the next claim of the same range
  irregular,  ///< fits no class: a freed slot leaves the run
};

/// [63..8] generation | [7..0] slots, 0 while the fields change.
struct RunTag {
  std::uint64_t raw = 0;
  static constexpr RunTag closed(std::uint64_t generation) noexcept { return {generation << 8}; }
  static constexpr RunTag open(std::uint64_t generation, unsigned slots) noexcept {
    return {(generation << 8) | slots};
  }
  constexpr std::uint64_t generation() const noexcept { return raw >> 8; }
  constexpr unsigned slots() const noexcept { return static_cast<unsigned>(raw & 0xff); }
};

/// [63..12] first unit | [11..0] LengthClass::code, 0 unless shelved. One comparison tells a thread that a slot that it
/// found by a hint is the interval that it looks for.
struct RunIdentity {
  std::uint64_t raw = 0;
  static constexpr unsigned code_bits = 12;
  static constexpr RunIdentity of(Unit first, std::uint32_t code) noexcept { return {(first << code_bits) | code}; }
  constexpr Unit first() const noexcept { return raw >> code_bits; }
};

struct Run : VersionedObject {
  static constexpr unsigned slots_max = 64;
  static constexpr std::uint32_t doomed = 1;
  static constexpr std::uint32_t parked = 2;
  static constexpr std::uint32_t no_position = ~std::uint32_t{0};

  // Atomics because readers without a section may look while the object is made into another run; see Identity.
  std::atomic<std::uint64_t> tag;       ///< RunTag: generation and number of slots
  std::atomic<std::uint64_t> identity;  ///< RunIdentity: the first unit, and which class's slots follow
  std::atomic<std::uint64_t> length;    ///< units per slot
  std::atomic<ObjectId> length_class;   ///< 0 unless shelved
  std::atomic<RunKind> run_kind;
  std::atomic<std::uint8_t> slots;        ///< also while the tag is closed
  std::atomic<std::uint64_t> reciprocal;  ///< reciprocal_of(): makes the division a multiplication
  // Behind the first cache line: what only the shared level uses.
  std::atomic<std::uint64_t> bits;
  std::atomic<std::uint32_t> flags;
  std::atomic<std::uint64_t> born;  ///< VersionedObject::birth for readers without a section
  std::atomic<std::uint32_t> slots_left;
  std::atomic<std::uint32_t> position;  ///< on the class's shelf
  // followed by one word per slot

  std::atomic<std::uint64_t>& slot(unsigned index) noexcept {
    return reinterpret_cast<std::atomic<std::uint64_t>*>(this + 1)[index];
  }
  const std::atomic<std::uint64_t>& slot(unsigned index) const noexcept {
    return reinterpret_cast<const std::atomic<std::uint64_t>*>(this + 1)[index];
  }
  static constexpr std::size_t bytes_for(unsigned slots) noexcept;
};
static_assert(sizeof(Run) == 96);
static_assert(sizeof(std::atomic<std::uint64_t>) == 8 && alignof(Run) == 8);

/// Sizes in which runs are made; counts between are possible (bounded by what fits), sizes of objects are not.
inline constexpr unsigned run_single_slots = 4;
inline constexpr unsigned run_few_slots = 12;
inline constexpr unsigned run_many_slots = Run::slots_max;

constexpr std::size_t Run::bytes_for(unsigned slots) noexcept {
  return sizeof(Run) + 8 * (slots <= run_single_slots ? run_single_slots
                            : slots <= run_few_slots  ? run_few_slots
                                                      : run_many_slots);
}
constexpr ObjectKind run_object_kind(unsigned slots) noexcept {
  return slots <= run_single_slots ? ObjectKind::run_single
         : slots <= run_few_slots  ? ObjectKind::run_few
                                   : ObjectKind::run_many;
}

/// Runs of several slots have slots shorter than this, so that the reciprocal is exact: 64 * length^2 < 2^63.
inline constexpr std::uint64_t multi_slot_length_max = std::uint64_t{1} << 28;

/// Names a slot by the place of its word.
using SlotWordPtr = std::atomic<std::uint64_t>*;

__extension__ using Wide = unsigned __int128;

/// What a run's fields said at one moment.
struct RunShape {
  RunTag tag;
  unsigned slots;
  Unit first;
  std::uint64_t length;
  std::uint64_t reciprocal;

  static RunShape load(const Run& run) noexcept {
    // R.shape - acquire, pairs with W.shape: each load stays before the next, and a value of a later incarnation brings
    // the odd generation with it, which unchanged() sees.
    return {RunTag{run.tag.load(std::memory_order_acquire)}, run.slots.load(std::memory_order_acquire),
            RunIdentity{run.identity.load(std::memory_order_acquire)}.first(),
            run.length.load(std::memory_order_acquire), run.reciprocal.load(std::memory_order_acquire)};
  }
  constexpr bool valid() const noexcept { return tag.slots() != 0; }
  bool unchanged(const Run& run) const noexcept {
    // relaxed: the acquire loads before it keep it last.
    return run.tag.load(std::memory_order_relaxed) == tag.raw;
  }
  constexpr UnitRange range() const noexcept { return {first, first + slots * length - 1}; }
  /// Precondition: range().contains(unit).
  constexpr unsigned slot_of(Unit unit) const noexcept { return slot_at(unit - first, reciprocal); }
  constexpr UnitRange slot_range(unsigned slot) const noexcept {
    return {first + slot * length, first + slot * length + length - 1};
  }
  static constexpr unsigned slot_at(std::uint64_t offset, std::uint64_t reciprocal) noexcept {
    return static_cast<unsigned>((static_cast<Wide>(offset) * reciprocal) >> 63);
  }
};

/// 2^63 / length rounded up; 0 for a run of one slot, whose every unit is in slot 0.
constexpr std::uint64_t reciprocal_of(std::uint64_t length, unsigned slots) noexcept {
  return slots == 1 ? 0 : ((std::uint64_t{1} << 63) - 1) / length + 1;
}

}  // namespace iovane::iova
