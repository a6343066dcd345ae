// ShadowIndex: what a guest domain maps, as a radix tree of 64-bit slots.
//
// Purpose: compare a guest's table with what the host was told, one word per leaf; find, set and clear runs of leaves.
// Why a radix tree: the questions come per aligned run ("what did these 512 entries say before?"), so the answer should
// lie as the question does. An ordered map of intervals costs a search per leaf; here a changed leaf costs one load and
// one store beside its neighbours.
// Shape: level 0 slots are one granule; a slot of level k is granule << 9k and is a leaf or a child node. A leaf may
// sit at any level whatever its memory's alignment, since only its IOVA must be aligned: a range of any length costs at
// most 512 slots per level at each side.
// Roles: one writer at a time; translate() from any thread meanwhile.
// Progress: translate() is lock-free: it starts again only when the writer took a node out of the tree meanwhile.
// Reclamation: nodes are never given back while the index lives, only reused; `structure_version_` is odd while a node
// is being taken out, so a reader that met a reused node notices (a sequence lock over structure, not over slots).
// Bounds: nodes_max nodes of about 4 KiB; beyond that limit_reached.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <optional>
#include <utility>

#include "iovane/result.hpp"
#include "iovane/types.hpp"

namespace iovane::viommu {

/// One leaf, as a word: guest physical address in the high bits, flags in the low twelve.
struct LeafWord {
  static constexpr std::uint64_t access_mask = 3;   ///< iovane::Access
  static constexpr std::uint64_t leaf = 1U << 2;    ///< present
  static constexpr std::uint64_t child = 1U << 3;   ///< not a leaf: the high bits are a node's address
  static constexpr std::uint64_t unit = 1U << 4;    ///< a host mapping begins here
  static constexpr std::uint64_t backed = 1U << 5;  ///< the host was told
  static constexpr std::uint64_t head = 1U << 6;    ///< a guest mapping begins here
  static constexpr std::uint64_t gpa_mask = ~std::uint64_t{0xfff};
  /// What a guest's own entry says: address, access and presence.
  static constexpr std::uint64_t guest_mask = gpa_mask | access_mask | leaf;

  static constexpr std::uint64_t make(std::uint64_t gpa, Access access) noexcept {
    return (gpa & gpa_mask) | leaf | static_cast<std::uint64_t>(access);
  }
  static constexpr Access access(std::uint64_t word) noexcept { return static_cast<Access>(word & access_mask); }
  static constexpr std::uint64_t gpa(std::uint64_t word) noexcept { return word & gpa_mask; }
};

/// A leaf and where it lies.
struct LeafAt {
  IovaRange range{};
  std::uint64_t word = 0;
};

class ShadowIndex {
 public:
  static constexpr unsigned fan_bits = 9;
  static constexpr unsigned fan = 1U << fan_bits;
  static constexpr unsigned levels_max = 6;

  struct alignas(64) Node {
    std::uint32_t used = 0;  // slots that are not empty
    std::uint32_t level = 0;
    Node* next_free = nullptr;
    Node* next_owned = nullptr;
    std::array<std::uint64_t, fan> slots{};
  };

  /// `granule_shift` 12 to 28; addresses have `address_bits` (at most 64).
  ShadowIndex(unsigned granule_shift, unsigned address_bits, std::uint32_t nodes_max);
  ShadowIndex(const ShadowIndex&) = delete;
  ShadowIndex& operator=(const ShadowIndex&) = delete;
  ~ShadowIndex();

  unsigned granule_shift() const noexcept { return granule_shift_; }
  std::uint32_t nodes_in_use() const noexcept { return nodes_in_use_; }
  std::uint64_t leaves() const noexcept { return leaves_; }
  IovaRange everything() const noexcept { return {Iova{0}, Iova{last_address_}}; }

  /// The slots of the level-0 node that covers an address, or null when there is none (empty, or a larger leaf).
  const std::uint64_t* leaf_slots(std::uint64_t iova) const noexcept {
    const std::uint64_t key = iova >> (granule_shift_ + fan_bits);
    if (key == cached_key_) [[likely]]
      return cached_node_->slots.data();
    const Node* node = find_leaf_node(iova);
    return node == nullptr ? nullptr : node->slots.data();
  }

  /// The leaf that covers an address. Writer's side.
  std::optional<LeafAt> at(std::uint64_t iova) const noexcept;
  /// As at(), from any thread; translates to a guest physical address and its access, if mapped.
  std::optional<std::pair<std::uint64_t, Access>> translate(std::uint64_t iova) const noexcept;

  /// True when no leaf lies in the range.
  bool is_free(const IovaRange& range) const noexcept;
  /// The first leaf at or after `from`, not beyond `last`.
  std::optional<LeafAt> next(std::uint64_t from, std::uint64_t last) const noexcept;
  /// How a range compares with one contiguous run of leaves that starts with guest word `first_word`.
  enum class Match : std::uint8_t { empty, equal, different };
  Match match(const IovaRange& range, std::uint64_t first_word) const noexcept;

  /// Fills a free range with leaves: contiguous guest physical memory from `word`; `flags_first` are added to the first
  /// leaf only. All or nothing; limit_reached or out_of_memory when nodes run out. Returns the number of leaves.
  Result<std::uint32_t> fill(const IovaRange& range, std::uint64_t word, std::uint64_t flags_first) noexcept;
  /// The slot of one granule whose level-0 node is there; null otherwise. Good until the next edit of the index.
  [[gnu::always_inline]] std::uint64_t* granule_slot(std::uint64_t iova) noexcept {
    if (iova > last_address_ || leaf_slots(iova) == nullptr) return nullptr;
    return &const_cast<Node*>(cached_node_)->slots[slot_of(iova, 0)];
  }
  /// Of what granule_slot() gave.
  bool is_last_of_node(const std::uint64_t* slot) const noexcept { return slot == &cached_node_->slots.back(); }
  /// fill() of a free slot and clear() of one that is not, right after granule_slot() gave it.
  void fill_granule(std::uint64_t* slot, std::uint64_t word) noexcept {
    auto* node = const_cast<Node*>(cached_node_);
    if (node->used++ == 0) --nodes_empty_;
    ++leaves_;
    store(*slot, word);
  }
  void clear_granule(std::uint64_t* slot) noexcept {
    auto* node = const_cast<Node*>(cached_node_);
    if (--node->used == 0) ++nodes_empty_;
    --leaves_;
    store(*slot, 0);
  }
  /// Makes `iova` the start of a leaf, if one covers it, by breaking larger leaves. Changes no meaning.
  Result<void> split_at(std::uint64_t iova) noexcept;
  /// Or-s flags into the leaf that covers `iova`.
  void mark(std::uint64_t iova, std::uint64_t flags) noexcept;
  /// Takes flags out of the leaf that covers `iova`.
  void unmark(std::uint64_t iova, std::uint64_t flags) noexcept;

  /// What clear() removed.
  struct Cleared {
    std::uint32_t leaves = 0;
    std::uint64_t first_backed = 0;  ///< first address the host knows, when any_backed
    std::uint64_t last_backed = 0;
    bool any_backed = false;
  };
  /// Removes every leaf in the range. Precondition: no leaf reaches across its borders (split_at).
  Cleared clear(const IovaRange& range) noexcept;
  /// Gives empty nodes back for reuse, if there are enough of them to be worth a walk.
  void prune() noexcept;

 private:
  unsigned shift(unsigned level) const noexcept { return granule_shift_ + fan_bits * level; }
  std::uint64_t slot_span(unsigned level) const noexcept { return (std::uint64_t{1} << shift(level)) - 1; }
  unsigned slot_of(std::uint64_t iova, unsigned level) const noexcept {
    return static_cast<unsigned>(iova >> shift(level)) & (fan - 1);
  }
  static Node* child_of(std::uint64_t word) noexcept { return reinterpret_cast<Node*>(word & ~std::uint64_t{63}); }
  static std::uint64_t word_of(Node* node) noexcept { return reinterpret_cast<std::uintptr_t>(node) | LeafWord::child; }
  static std::uint64_t load(const std::uint64_t& slot) noexcept { return slot; }
  static void store(std::uint64_t& slot, std::uint64_t word) noexcept {
    // R.slot - pairs with A.slot in translate(): a child's slots are there before its address.
    __atomic_store_n(&slot, word, __ATOMIC_RELEASE);
  }

  const Node* find_leaf_node(std::uint64_t iova) const noexcept;
  Node* take_node(unsigned level) noexcept;
  void give_node(Node* node) noexcept;
  void begin_structure_change() noexcept;
  void end_structure_change() noexcept;
  bool subtree_is_free(const Node& node) const noexcept;
  void free_subtree(Node* node) noexcept;
  bool range_is_free(const Node& node, unsigned level, std::uint64_t first, std::uint64_t last) const noexcept;
  std::optional<LeafAt> next_in(const Node& node, unsigned level, std::uint64_t base, std::uint64_t from,
                                std::uint64_t last) const noexcept;
  Errc fill_in(Node& node, unsigned level, std::uint64_t first, std::uint64_t last, std::uint64_t word,
               std::uint64_t& flags_first, std::uint32_t& leaves) noexcept;
  void clear_in(Node& node, unsigned level, std::uint64_t base, std::uint64_t first, std::uint64_t last,
                Cleared& out) noexcept;
  Errc break_leaf(Node& node, unsigned slot) noexcept;
  void prune_in(Node& node) noexcept;
  std::uint64_t* slot_at(std::uint64_t iova) noexcept;

  unsigned granule_shift_;
  unsigned levels_;
  std::uint64_t last_address_;
  std::uint32_t nodes_max_;
  std::uint32_t nodes_in_use_ = 0;
  std::uint32_t nodes_empty_ = 0;  // level-0 nodes without a leaf
  std::uint64_t leaves_ = 0;
  Node* root_ = nullptr;
  Node* free_ = nullptr;
  Node* owned_ = nullptr;  // every node there is, by next_owned
  std::uint32_t nodes_owned_ = 0;
  mutable std::uint64_t cached_key_ = ~std::uint64_t{0};  // of cached_node_: iova >> (shift of level 1)
  mutable const Node* cached_node_ = nullptr;
  std::atomic<std::uint64_t> structure_version_{0};
};

}  // namespace iovane::viommu
