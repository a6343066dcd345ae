#include "iova/extent_tree.hpp"

#include <algorithm>

namespace iovane::iova {
namespace {

// Leaves that a search may open in vain. Only requests that are neither naturally aligned nor given room for their
// alignment can meet such leaves, and only when nothing roomier is free.
constexpr unsigned vain_leaves_max = 1024;

// Below this a fresh node is joined with a neighbour.
constexpr unsigned sparse_entries = 6;

Unit end_of(const TreeNode& leaf, unsigned index, Unit last) noexcept {
  return index + 1 < leaf.count ? leaf.leaf.first[index + 1] - 1 : last;
}

// The index of the entry that holds `unit`: the last whose first is not above it.
template <unsigned N>
unsigned entry_of(const Unit (&first)[N], unsigned count, Unit unit) noexcept {
  unsigned index = 0;
  for (unsigned i = 1; i < count; ++i) index += first[i] <= unit ? 1U : 0U;
  return index;
}

Reach reach_of_leaf(const TreeNode& leaf, Unit last) noexcept {
  Reach reach;
  for (unsigned i = 0; i < leaf.count; ++i)
    if (leaf.leaf.value[i].is_free())
      reach = Reach::max(reach, Reach::of_free({leaf.leaf.first[i], end_of(leaf, i, last)}));
  return reach;
}

std::uint64_t align_up_unit(Unit u, unsigned align_log2) noexcept {
  const std::uint64_t mask = (std::uint64_t{1} << align_log2) - 1;
  return (u + mask) & ~mask;  // units have 52 bits: no overflow
}

}  // namespace

Reach Reach::of_free(UnitRange range) noexcept {
  unsigned order = floor_log2(range.count());
  // One of the two fits: 2^order <= count means that any 2 * 2^(order-1) - 1 units in a row hold an aligned half.
  while (order > 0) {
    const Unit aligned = align_up_unit(range.first, order);
    if (aligned <= range.last && range.last - aligned >= (std::uint64_t{1} << order) - 1) break;
    --order;
  }
  return {(range.count() << 6) | (order + 1)};
}

Segment TreeView::find(Unit unit) const noexcept {
  ObjectId id = root_;
  Unit last = last_;
  for (;;) {
    const TreeNode& n = node(id);
    if (n.level == 0) {
      const unsigned i = entry_of(n.leaf.first, n.count, unit);
      return {{n.leaf.first[i], end_of(n, i, last)}, n.leaf.value[i]};
    }
    const unsigned i = entry_of(n.inner.first, n.count, unit);
    if (i + 1 < n.count) last = n.inner.first[i + 1] - 1;
    id = n.inner.child[i];
  }
}

struct TreeView::Probe {
  SearchRequest request;
  std::uint64_t longest_min;  ///< children with less are not entered
  unsigned order_plus_1_min;
  unsigned vain_leaves = 0;

  bool may_hold(Reach r) const noexcept { return r.longest() >= longest_min && r.order_plus_1() >= order_plus_1_min; }
  std::optional<Unit> fit(UnitRange free) const noexcept {
    const Unit last = std::min(free.last, request.last_max);
    if (free.first > last || last - free.first + 1 < request.count) return std::nullopt;
    if (request.direction == Direction::bottom_up) {
      const Unit start = align_up_unit(free.first, request.align_log2);
      if (start > last || last - start + 1 < request.count) return std::nullopt;
      return start;
    }
    const Unit start = ((last - request.count + 1) >> request.align_log2) << request.align_log2;
    if (start < free.first) return std::nullopt;
    return start;
  }
};

std::optional<Unit> TreeView::search_below(ObjectId id, Unit last, Probe& probe) const noexcept {
  const TreeNode& n = node(id);
  const bool up = probe.request.direction == Direction::bottom_up;
  for (unsigned step = 0; step < n.count; ++step) {
    const unsigned i = up ? step : n.count - 1 - step;
    if (n.level == 0) {
      if (!n.leaf.value[i].is_free()) continue;
      if (const auto start = probe.fit({n.leaf.first[i], end_of(n, i, last)})) return start;
      continue;
    }
    if (n.inner.first[i] > probe.request.last_max || !probe.may_hold(n.inner.reach[i])) continue;
    const Unit child_last = i + 1 < n.count ? n.inner.first[i + 1] - 1 : last;
    if (const auto start = search_below(n.inner.child[i], child_last, probe)) return start;
    if (probe.vain_leaves > vain_leaves_max) return std::nullopt;
  }
  if (n.level == 0) ++probe.vain_leaves;
  return std::nullopt;
}

std::optional<Unit> TreeView::search(const SearchRequest& request) const noexcept {
  const std::uint64_t alignment = std::uint64_t{1} << request.align_log2;
  // A block of `count` at a multiple of 2^align holds a naturally aligned block of this order.
  const unsigned order = std::min(request.align_log2, floor_log2(request.count));
  Probe probe{request, request.count, order + 1};
  if (request.count != alignment && request.align_log2 != 0) {
    probe.longest_min = request.count + alignment - 1;
    if (const auto start = search_below(root_, last_, probe)) return start;
    probe.longest_min = request.count;
    probe.vain_leaves = 0;
  }
  return search_below(root_, last_, probe);
}

bool TreeEdit::make_empty(SegmentValue value) noexcept {
  const ObjectId id = new_node(0);
  if (id == 0) return false;
  TreeNode& leaf = node(id);
  leaf.count = 1;
  leaf.leaf.first[0] = 0;
  leaf.leaf.value[0] = value;
  root_ = id;
  return true;
}

ObjectId TreeEdit::new_node(unsigned level) noexcept {
  if (fresh_count_ == nodes_max) failed_ = true;
  ObjectId id = 0;
  if (!failed_) {
    id = stash_.count > 0 ? stash_.ids[--stash_.count]
                          : arena_.allocate(ObjectKind::tree_node, sizeof(TreeNode), last_resort_);
  }
  if (id == 0) {
    failed_ = true;
    return 0;
  }
  fresh_[fresh_count_++] = id;
  TreeNode& n = node(id);
  n.level = static_cast<std::uint16_t>(level);
  n.count = 0;
  n.kind = ObjectKind::tree_node;
  n.bytes = sizeof(TreeNode);
  n.birth = birth_;
  return id;
}

// A node that this edit itself made was never seen by others and is recycled at once.
void TreeEdit::drop(ObjectId id) noexcept {
  if (replaced_count_ == nodes_max) {
    failed_ = true;
    return;
  }
  if (node(id).birth == birth_) {
    for (unsigned i = 0; i < fresh_count_; ++i) {
      if (fresh_[i] != id) continue;
      fresh_[i] = fresh_[--fresh_count_];
      break;
    }
    if (stash_.count < NodeStash::capacity) {
      stash_.ids[stash_.count++] = id;
    } else {
      arena_.release(ObjectKind::tree_node, sizeof(TreeNode), id);
    }
    return;
  }
  replaced_[replaced_count_++] = id;
}

void TreeEdit::drop_subtree(ObjectId id) noexcept {
  const TreeNode& n = node(id);
  if (n.level > 0)
    for (unsigned i = 0; i < n.count && !failed_; ++i) drop_subtree(n.inner.child[i]);
  drop(id);
}

void TreeEdit::abandon() noexcept {
  for (unsigned i = 0; i < fresh_count_; ++i) {
    if (stash_.count < NodeStash::capacity) {
      stash_.ids[stash_.count++] = fresh_[i];
    } else {
      arena_.release(ObjectKind::tree_node, sizeof(TreeNode), fresh_[i]);
    }
  }
  fresh_count_ = 0;
}

bool TreeEdit::put(UnitRange range, SegmentValue value) noexcept {
  if (!value.is_run()) {
    const TreeView tree = view();
    if (range.first > 0) {
      const Segment before = tree.find(range.first - 1);
      if (before.value == value) range.first = before.range.first;
    }
    if (range.last < last_) {
      const Segment after = tree.find(range.last + 1);
      if (after.value == value) range.last = after.range.last;
    }
  }
  Item out[2];
  unsigned count = rebuild(root_, {0, last_}, {range, value}, out);
  if (failed_) return false;
  if (count == 2) {
    const unsigned level = node(out[0].id).level + 1U;
    count = emit_inner(out, 2, level, out);
    if (failed_) return false;
  }
  root_ = out[0].id;
  while (node(root_).level > 0 && node(root_).count == 1) {
    const ObjectId only = node(root_).inner.child[0];
    drop(root_);
    root_ = only;
  }
  return !failed_;
}

unsigned TreeEdit::rebuild(ObjectId id, UnitRange covered, const Change& change, Item out[2]) noexcept {
  const TreeNode& old = node(id);
  const unsigned count =
      old.level == 0 ? rebuild_leaf(old, covered, change, out) : rebuild_inner(old, covered, change, out);
  if (!failed_) drop(id);
  return count;
}

// A node that holds the change's first unit covers the changed range to its end; one that holds only its last unit
// begins behind it. So each node's coverage is known without looking at its neighbours.
unsigned TreeEdit::rebuild_leaf(const TreeNode& old, UnitRange covered, const Change& change, Item out[2]) noexcept {
  const auto [range, value] = change;
  Unit first[TreeNode::leaf_entries + 2];
  SegmentValue values[TreeNode::leaf_entries + 2];
  unsigned n = 0;
  const auto push = [&](Unit f, SegmentValue v) {
    first[n] = f;
    values[n++] = v;
  };
  unsigned i = 0;
  for (; i < old.count && old.leaf.first[i] < range.first; ++i) push(old.leaf.first[i], old.leaf.value[i]);
  if (covered.contains(range.first)) push(range.first, value);
  if (covered.contains(range.last) && range.last < covered.last) {
    const unsigned holder = entry_of(old.leaf.first, old.count, range.last);
    if (end_of(old, holder, covered.last) != range.last) push(range.last + 1, old.leaf.value[holder]);
  }
  for (; i < old.count; ++i)
    if (old.leaf.first[i] > range.last) push(old.leaf.first[i], old.leaf.value[i]);
  const Unit last = covered.contains(range.first) ? std::max(covered.last, range.last) : covered.last;

  const unsigned parts = n > TreeNode::leaf_entries ? 2 : 1;
  unsigned done = 0;
  for (unsigned p = 0; p < parts; ++p) {
    const unsigned take = p + 1 == parts ? n - done : n / 2;
    const ObjectId id = new_node(0);
    if (id == 0) return 0;
    TreeNode& leaf = node(id);
    leaf.count = static_cast<std::uint16_t>(take);
    std::copy_n(first + done, take, leaf.leaf.first);
    std::copy_n(values + done, take, leaf.leaf.value);
    done += take;
    out[p] = {leaf.leaf.first[0], reach_of_leaf(leaf, done < n ? first[done] - 1 : last), id};
  }
  return parts;
}

unsigned TreeEdit::rebuild_inner(const TreeNode& old, UnitRange covered, const Change& change, Item out[2]) noexcept {
  Item items[TreeNode::inner_entries + 2];
  unsigned n = 0;
  for (unsigned i = 0; i < old.count; ++i) {
    const UnitRange child{old.inner.first[i], i + 1 < old.count ? old.inner.first[i + 1] - 1 : covered.last};
    if (!child.overlaps(change.range)) {
      items[n++] = {child.first, old.inner.reach[i], old.inner.child[i]};
    } else if (change.range.first < child.first && child.last <= change.range.last) {
      drop_subtree(old.inner.child[i]);
    } else {
      n += rebuild(old.inner.child[i], child, change, items + n);
    }
    if (failed_) return 0;
  }
  n = merge_small(items, n);
  return failed_ ? 0 : emit_inner(items, n, old.level, out);
}

unsigned TreeEdit::merge_small(Item* items, unsigned count) noexcept {
  for (unsigned i = 0; i < count && count > 1; ++i) {
    const TreeNode& n = node(items[i].id);
    if (n.birth != birth_ || n.count >= sparse_entries) continue;
    const unsigned left = i > 0 ? i - 1 : i;
    Item merged;
    if (!try_merge(items[left], items[left + 1], merged)) continue;
    if (failed_) return 0;
    items[left] = merged;
    std::copy(items + left + 2, items + count, items + left + 1);
    --count;
    i = left;
  }
  return count;
}

bool TreeEdit::try_merge(const Item& left, const Item& right, Item& out) noexcept {
  const TreeNode& l = node(left.id);
  const TreeNode& r = node(right.id);
  const unsigned total = l.count + r.count;
  if (total > (l.level == 0 ? TreeNode::leaf_entries : TreeNode::inner_entries)) return false;
  const ObjectId id = new_node(l.level);
  if (id == 0) return true;
  TreeNode& both = node(id);
  both.count = static_cast<std::uint16_t>(total);
  if (l.level == 0) {
    std::copy_n(r.leaf.first, r.count, std::copy_n(l.leaf.first, l.count, both.leaf.first));
    std::copy_n(r.leaf.value, r.count, std::copy_n(l.leaf.value, l.count, both.leaf.value));
  } else {
    std::copy_n(r.inner.first, r.count, std::copy_n(l.inner.first, l.count, both.inner.first));
    std::copy_n(r.inner.reach, r.count, std::copy_n(l.inner.reach, l.count, both.inner.reach));
    std::copy_n(r.inner.child, r.count, std::copy_n(l.inner.child, l.count, both.inner.child));
  }
  out = {left.first, Reach::max(left.reach, right.reach), id};
  drop(left.id);
  drop(right.id);
  return true;
}

unsigned TreeEdit::emit_inner(const Item* items, unsigned count, unsigned level, Item out[2]) noexcept {
  Item made[2];
  const unsigned parts = count > TreeNode::inner_entries ? 2 : 1;
  unsigned done = 0;
  for (unsigned p = 0; p < parts; ++p) {
    const unsigned take = p + 1 == parts ? count - done : count / 2;
    const ObjectId id = new_node(level);
    if (id == 0) return 0;
    TreeNode& inner = node(id);
    inner.count = static_cast<std::uint16_t>(take);
    Reach reach;
    for (unsigned i = 0; i < take; ++i) {
      inner.inner.first[i] = items[done + i].first;
      inner.inner.reach[i] = items[done + i].reach;
      inner.inner.child[i] = items[done + i].id;
      reach = Reach::max(reach, items[done + i].reach);
    }
    made[p] = {inner.inner.first[0], reach, id};
    done += take;
  }
  std::copy_n(made, parts, out);
  return parts;
}

}  // namespace iovane::iova
