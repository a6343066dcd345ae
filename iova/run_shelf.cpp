#include "iova/run_shelf.hpp"

#include <bit>

#include "base/yield_point.hpp"

namespace iovane::iova {
namespace {

constexpr unsigned tries_max = 8;

std::uint64_t bit(unsigned index) noexcept { return std::uint64_t{1} << index; }

void init_node(ShelfNode& node) noexcept {
  // relaxed: nobody sees the node before its parent names it (W.child).
  node.ready.store(0, std::memory_order_relaxed);
  node.taken.store(0, std::memory_order_relaxed);
  for (auto& child : node.child) child.store(0, std::memory_order_relaxed);
}

// R.child - acquire, pairs with W.child: the node is initialised.
ObjectId child_id(const ShelfNode& node, unsigned index) noexcept {
  return node.child[index].load(std::memory_order_acquire);
}

}  // namespace

// The node at `level` (0: leaf) on the path to `position`, which exists because the position was put there.
ShelfNode& RunShelf::node_above(const MetadataArena& arena, Position position, unsigned level) noexcept {
  ShelfNode* node = &root_;
  for (unsigned l = levels - 1; l > level; --l) node = arena.at<ShelfNode>(child_id(*node, index_at(position, l)));
  return *node;
}

std::optional<RunShelf::Position> RunShelf::put(MetadataArena& arena, ObjectId run) noexcept {
  for (unsigned tries = 0; tries < tries_max; ++tries) {
    ShelfNode* node = &root_;
    Position position = 0;
    unsigned level = levels - 1;
    for (;; --level) {
      // seq_cst: the summaries' handshake, see the header.
      const std::uint64_t taken = node->taken.load(std::memory_order_seq_cst);
      if (taken == ~std::uint64_t{0}) break;
      const auto index = static_cast<unsigned>(std::countr_one(taken));
      position |= index << (6 * level);
      base::yield_point("shelf.put");
      if (level == 0) {
        // seq_cst: as above. Linearization of put().
        const std::uint64_t before = node->taken.fetch_or(bit(index), std::memory_order_seq_cst);
        if ((before & bit(index)) != 0) break;
        // W.run - release, pairs with R.child in find_ready(): the run's fields are visible.
        node->child[index].store(run, std::memory_order_release);
        for (unsigned up = 1; up < levels; ++up) {
          ShelfNode& parent = node_above(arena, position, up);
          ShelfNode& child = node_above(arena, position, up - 1);
          // seq_cst: as above.
          if (child.taken.load(std::memory_order_seq_cst) != ~std::uint64_t{0}) break;
          parent.taken.fetch_or(bit(index_at(position, up)), std::memory_order_seq_cst);
          if (child.taken.load(std::memory_order_seq_cst) == ~std::uint64_t{0}) continue;
          parent.taken.fetch_and(~bit(index_at(position, up)), std::memory_order_seq_cst);
          break;
        }
        return position;
      }
      ObjectId below = child_id(*node, index);
      if (below == 0) {
        const ObjectId fresh = arena.allocate(ObjectKind::shelf_node, sizeof(ShelfNode));
        if (fresh == 0) return std::nullopt;
        init_node(*arena.at<ShelfNode>(fresh));
        // W.child - release on success, pairs with R.child.
        if (node->child[index].compare_exchange_strong(below, fresh, std::memory_order_acq_rel,
                                                       std::memory_order_acquire)) {
          below = fresh;
        } else {
          arena.release(ObjectKind::shelf_node, sizeof(ShelfNode), fresh);
        }
      }
      node = arena.at<ShelfNode>(below);
    }
    if (level == levels - 1) return std::nullopt;  // the root is full
    // seq_cst: as below, in one order with remove().
    if (level > 0 || node->taken.load(std::memory_order_seq_cst) == ~std::uint64_t{0}) {
      // A summary that was late: correct it and go on.
      ShelfNode& parent = node_above(arena, position, level + 1);
      parent.taken.fetch_or(bit(index_at(position, level + 1)), std::memory_order_seq_cst);
      if (node->taken.load(std::memory_order_seq_cst) != ~std::uint64_t{0})
        parent.taken.fetch_and(~bit(index_at(position, level + 1)), std::memory_order_seq_cst);
    }
  }
  return std::nullopt;
}

void RunShelf::remove(const MetadataArena& arena, Position position) noexcept {
  clear_ready(arena, position);
  ShelfNode& leaf = node_above(arena, position, 0);
  // relaxed: a reader that still takes the old id checks the run itself.
  leaf.child[index_at(position, 0)].store(0, std::memory_order_relaxed);
  base::yield_point("shelf.remove");
  for (unsigned level = 0; level < levels; ++level) {
    // seq_cst: the summaries' handshake. Linearization of remove() at level 0.
    const std::uint64_t before =
        node_above(arena, position, level).taken.fetch_and(~bit(index_at(position, level)), std::memory_order_seq_cst);
    if (level > 0 && (before & bit(index_at(position, level))) == 0) break;
  }
}

void RunShelf::set_ready(const MetadataArena& arena, Position position) noexcept {
  for (unsigned level = 0; level < levels; ++level) {
    const std::uint64_t mine = bit(index_at(position, level));
    auto& word = node_above(arena, position, level).ready;
    // seq_cst: the summaries' handshake; the load spares a write to a shared line.
    if (level > 0 && (word.load(std::memory_order_seq_cst) & mine) != 0) return;
    base::yield_point("shelf.ready");
    word.fetch_or(mine, std::memory_order_seq_cst);
  }
}

void RunShelf::clear_ready(const MetadataArena& arena, Position position) noexcept {
  // seq_cst: the caller looks at the run's own word afterwards and sets the bit again if that changed.
  node_above(arena, position, 0).ready.fetch_and(~bit(index_at(position, 0)), std::memory_order_seq_cst);
}

std::optional<RunShelf::Found> RunShelf::find_ready(const MetadataArena& arena, unsigned bias) noexcept {
  for (unsigned tries = 0; tries < tries_max; ++tries) {
    ShelfNode* node = &root_;
    ShelfNode* parent = nullptr;
    Position position = 0;
    unsigned parent_index = 0;
    for (unsigned level = levels - 1;; --level) {
      // seq_cst: the summaries' handshake.
      const std::uint64_t ready = node->ready.load(std::memory_order_seq_cst);
      if (ready == 0) {
        if (parent == nullptr) return std::nullopt;
        base::yield_point("shelf.find");
        parent->ready.fetch_and(~bit(parent_index), std::memory_order_seq_cst);
        if (node->ready.load(std::memory_order_seq_cst) != 0)
          parent->ready.fetch_or(bit(parent_index), std::memory_order_seq_cst);
        break;
      }
      const unsigned turn = level == 0 ? bias & 63 : 0;
      const unsigned index =
          (static_cast<unsigned>(std::countr_zero(std::rotr(ready, static_cast<int>(turn)))) + turn) & 63;
      position |= index << (6 * level);
      const ObjectId below = child_id(*node, index);
      if (level == 0) {
        if (below == 0) return std::nullopt;  // being removed at this moment
        return Found{below, position};
      }
      parent = node;
      parent_index = index;
      node = arena.at<ShelfNode>(below);
    }
  }
  return std::nullopt;
}

std::optional<RunShelf::Found> RunShelf::next_ready(const MetadataArena& arena, Position from) const noexcept {
  for (unsigned tries = 0; tries < tries_max && from < positions; ++tries) {
    const ShelfNode* node = &root_;
    Position position = 0;
    for (unsigned level = levels - 1;; --level) {
      // Nodes before `from` are behind us: only on the way to it does its index count.
      const bool on_the_way = position == (from >> (6 * (level + 1)) << (6 * (level + 1)));
      const std::uint64_t wanted = on_the_way ? ~std::uint64_t{0} << index_at(from, level) : ~std::uint64_t{0};
      // seq_cst: the summaries' handshake; a hint that is wrong costs a try.
      const std::uint64_t ready = node->ready.load(std::memory_order_seq_cst) & wanted;
      if (ready == 0) {
        // Nothing in the rest of this node.
        from = ((position >> (6 * (level + 1))) + 1) << (6 * (level + 1));
        break;
      }
      const auto index = static_cast<unsigned>(std::countr_zero(ready));
      position |= index << (6 * level);
      const ObjectId below = child_id(*node, index);
      if (below == 0) {  // being removed at this moment
        from = position + 1;
        break;
      }
      if (level == 0) return Found{below, position};
      node = arena.at<ShelfNode>(below);
    }
  }
  return std::nullopt;
}

}  // namespace iovane::iova
