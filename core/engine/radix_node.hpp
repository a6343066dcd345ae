// Nodes of a radix tree over 64-bit keys, six bits per level (level 0: the lowest bits; level 10: the top four).
//
// A node at level n stands where keys part ways: all keys under it agree above digit n, and at least two of its
// children differ there. Up to five children live in one cache line, in digit order; more live in an array of 64.
// Everything here is pure bookkeeping of one node: no allocation, no knowledge of what an entry is but its address.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace iovane::engine::radix {

inline constexpr unsigned digit_bits = 6;
inline constexpr unsigned digit_count = 1U << digit_bits;

constexpr unsigned digit_of(std::uint64_t key, unsigned level) noexcept {
  return static_cast<unsigned>(key >> (level * digit_bits)) & (digit_count - 1);
}
/// The level at which two different keys part ways.
constexpr unsigned parting_level(std::uint64_t a, std::uint64_t b) noexcept {
  return static_cast<unsigned>(63 - std::countl_zero(a ^ b)) / digit_bits;
}

struct Node;
struct SmallNode;
struct LargeNode;

/// What a child is: nothing, an entry, or a node. All are aligned to 64 bytes; the six bits this leaves hold a node's
/// shift (level * digit_bits, always even), so that a descent need not read a node's header to find its way through it
/// and shifts by the word as it is. An odd word is a small node or, with all six bits set, an entry.
class Ref {
 public:
  constexpr Ref() noexcept = default;
  static Ref to_entry(const void* entry) noexcept { return Ref{reinterpret_cast<std::uintptr_t>(entry) | tag_mask}; }
  static Ref to_node(SmallNode* node, unsigned level) noexcept {
    return Ref{reinterpret_cast<std::uintptr_t>(node) | (level * digit_bits) | odd};
  }
  static Ref to_node(LargeNode* node, unsigned level) noexcept {
    return Ref{reinterpret_cast<std::uintptr_t>(node) | (level * digit_bits)};
  }

  constexpr explicit operator bool() const noexcept { return bits_ != 0; }
  constexpr bool operator==(const Ref&) const noexcept = default;
  constexpr bool is_entry() const noexcept { return (bits_ & tag_mask) == tag_mask; }
  /// A large node, or nothing.
  constexpr bool is_even() const noexcept { return (bits_ & odd) == 0; }

  // Of a node:
  constexpr bool is_large() const noexcept { return is_even(); }
  constexpr unsigned shift() const noexcept { return static_cast<unsigned>(bits_ & tag_mask & ~odd); }
  constexpr unsigned level() const noexcept { return shift() / digit_bits; }
  constexpr unsigned digit_of(std::uint64_t key) const noexcept {
    return static_cast<unsigned>(key >> shift()) & (digit_count - 1);
  }
  /// Of a large node: digit_of(), one step cheaper.
  constexpr unsigned digit_of_large(std::uint64_t key) const noexcept {
    return static_cast<unsigned>(key >> (bits_ & tag_mask)) & (digit_count - 1);
  }

  template <typename Entry>
  Entry* entry() const noexcept {
    return reinterpret_cast<Entry*>(bits_ & ~tag_mask);
  }
  Node* node() const noexcept { return reinterpret_cast<Node*>(bits_ & ~tag_mask); }
  SmallNode* small() const noexcept { return reinterpret_cast<SmallNode*>(bits_ & ~tag_mask); }
  LargeNode* large() const noexcept { return reinterpret_cast<LargeNode*>(bits_ & ~tag_mask); }

 private:
  static constexpr std::uintptr_t odd = 1, tag_mask = 63;

  constexpr explicit Ref(std::uintptr_t bits) noexcept : bits_{bits} {}
  std::uintptr_t bits_ = 0;
};

struct Node {
  std::uint64_t key = 0;  // one of the keys that were under the node: good for the digits above its level
  Ref parent;             // a node, or nothing for the root
};

struct alignas(64) SmallNode : Node {
  static constexpr unsigned children_max = 5;
  static constexpr std::uint64_t bytes_01 = 0x0101'0101'0101'0101, no_digits = bytes_01 * 0x7f;

  std::uint64_t digits = no_digits;  // one per byte, ascending from the lowest byte; 0x7f: unused
  Ref children[children_max];

  /// How many digits are less than `digit` (at most 64): compares all eight bytes at once.
  static constexpr unsigned rank(std::uint64_t digits, unsigned digit) noexcept {
    const std::uint64_t at_least = (((digits | (bytes_01 << 7)) - bytes_01 * digit) >> 7) & bytes_01;
    return 8 - static_cast<unsigned>((at_least * bytes_01) >> 56);
  }
  unsigned count() const noexcept { return rank(digits, digit_count); }
  /// The child at `digit`, or nothing: looks for the first byte without a difference.
  Ref find(unsigned digit) const noexcept {
    const std::uint64_t difference = digits ^ (bytes_01 * digit);
    const std::uint64_t equal = (difference - bytes_01) & ~difference & (bytes_01 << 7);
    return equal == 0 ? Ref{} : children[static_cast<unsigned>(std::countr_zero(equal)) / 8];
  }

  /// Precondition: fewer than children_max children, none at `digit`.
  void add(unsigned digit, Ref child) noexcept {
    const unsigned position = rank(digits, digit);
    for (unsigned i = children_max - 1; i > position; --i) children[i] = children[i - 1];
    children[position] = child;
    const std::uint64_t below = (std::uint64_t{1} << (8 * position)) - 1;
    digits = (digits & below) | (std::uint64_t{digit} << (8 * position)) | ((digits & ~below) << 8);
  }
  /// Precondition: there is a child at `digit`.
  void remove(unsigned digit) noexcept {
    const unsigned position = rank(digits, digit);
    for (unsigned i = position; i + 1 < children_max; ++i) children[i] = children[i + 1];
    children[children_max - 1] = Ref{};
    const std::uint64_t below = (std::uint64_t{1} << (8 * position)) - 1;
    digits = (digits & below) | ((digits >> 8) & ~below) | (std::uint64_t{0x7f} << 56);
  }
};
static_assert(sizeof(SmallNode) == 64);

struct alignas(64) LargeNode : Node {
  std::uint64_t present = 0;  // bit d: there is a child at digit d
  alignas(64) Ref children[digit_count];

  void add(unsigned digit, Ref child) noexcept {
    children[digit] = child;
    present |= std::uint64_t{1} << digit;
  }
  void remove(unsigned digit) noexcept {
    children[digit] = Ref{};
    present &= ~(std::uint64_t{1} << digit);
  }
  /// True when there are at most three children.
  bool is_sparse() const noexcept {
    std::uint64_t rest = present & (present - 1);
    rest &= rest - 1;
    return (rest & (rest - 1)) == 0;
  }
};
static_assert(sizeof(LargeNode) == 576);

/// The child on the way to `key`, or nothing.
inline Ref child_at(Ref node, std::uint64_t key) noexcept {
  if (node.is_large()) return node.large()->children[node.digit_of_large(key)];
  return node.small()->find(node.digit_of(key));
}

/// Follows the digits of `key` from `at` and compares nothing on the way: the entry this leads to, or nothing. If there
/// is an entry at `key` it is this one, else it may be any.
inline Ref follow(Ref at, std::uint64_t key) noexcept {
  for (;;) {
    while (at.is_even()) {
      if (!at) return at;
      at = at.large()->children[at.digit_of_large(key)];
    }
    if (at.is_entry()) return at;
    at = at.small()->find(at.digit_of(key));
  }
}

/// The child with the greatest digit below that of `key`, or nothing.
inline Ref child_below(Ref node, std::uint64_t key) noexcept {
  if (node.is_large()) {
    const LargeNode& large = *node.large();
    const std::uint64_t below = large.present & ((std::uint64_t{1} << node.digit_of_large(key)) - 1);
    return below == 0 ? Ref{} : large.children[63 - std::countl_zero(below)];
  }
  const SmallNode& small = *node.small();
  const unsigned position = SmallNode::rank(small.digits, node.digit_of(key));
  return position == 0 ? Ref{} : small.children[position - 1];
}
inline Ref highest_child(Ref node) noexcept {
  return node.is_large() ? node.large()->children[63 - std::countl_zero(node.large()->present)]
                         : node.small()->children[node.small()->count() - 1];
}
inline Ref lowest_child(Ref node) noexcept {
  return node.is_large() ? node.large()->children[std::countr_zero(node.large()->present)] : node.small()->children[0];
}

/// Puts `child` where another child is on the way to `key`. Precondition: there is one.
inline void replace_child(Ref node, std::uint64_t key, Ref child) noexcept {
  const unsigned digit = node.digit_of(key);
  if (node.is_large()) {
    node.large()->children[digit] = child;
  } else {
    node.small()->children[SmallNode::rank(node.small()->digits, digit)] = child;
  }
}

/// True when `key` belongs under the node: it agrees with the node's keys above its level.
inline bool covers(Ref node, std::uint64_t key) noexcept {
  return ((key ^ node.node()->key) >> node.shift()) >> digit_bits == 0;
}

}  // namespace iovane::engine::radix
