// The persistent tree of segments against an array of units, change by change; older versions stay what they were.
#include "iova/extent_tree.hpp"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "support/seed.hpp"

namespace iovane::iova {
namespace {

constexpr Unit units = 700;

using Plain = std::vector<std::uint64_t>;  // a SegmentValue per unit

Segment plain_find(const Plain& plain, Unit unit) {
  Segment s{{unit, unit}, {plain[unit]}};
  while (s.range.first > 0 && plain[s.range.first - 1] == plain[unit]) --s.range.first;
  while (s.range.last + 1 < plain.size() && plain[s.range.last + 1] == plain[unit]) ++s.range.last;
  return s;
}

bool plain_fits(const Plain& plain, const SearchRequest& request) {
  const Unit step = Unit{1} << request.align_log2;
  for (Unit start = 0; start + request.count <= plain.size(); start += step) {
    bool free = start + request.count - 1 <= request.last_max;
    for (Unit u = start; free && u < start + request.count; ++u) free = plain[u] == SegmentValue::free().raw;
    if (free) return true;
  }
  return false;
}

void compare(const TreeView& tree, const Plain& plain) {
  for (Unit u = 0; u < plain.size();) {
    const Segment there = tree.find(u);
    const Segment expected = plain_find(plain, u);
    ASSERT_EQ(there.value, expected.value) << "unit " << u;
    ASSERT_EQ(there.range, expected.range) << "unit " << u;
    u = there.range.last + 1;
  }
}

TEST(ExtentTreeModel, AgreesWithAnArrayAndKeepsOlderVersions) {
  const std::uint64_t seed = test::seed();
  SCOPED_TRACE("IOVANE_SEED=" + std::to_string(seed));
  std::mt19937_64 random{seed};
  MetadataArena arena = *MetadataArena::create(Bytes{std::uint64_t{256} << 20});
  NodeStash stash;
  Plain plain(units, SegmentValue::free().raw);
  ObjectId root = 0;
  {
    TreeEdit first{arena, stash, 0, units - 1, 1, false};
    ASSERT_TRUE(first.make_empty(SegmentValue::free()));
    root = first.root();
  }
  struct Old {
    ObjectId root;
    Plain plain;
  };
  std::vector<Old> old;
  ObjectId next_run = 1;
  for (std::uint64_t version = 2; version < 3000; ++version) {
    SCOPED_TRACE("version " + std::to_string(version));
    const Unit first = random() % units;
    const Unit last = std::min<Unit>(first + random() % (random() % 8 == 0 ? 300 : 12), units - 1);
    const SegmentValue value = random() % 3 == 0   ? SegmentValue::run(next_run++)
                               : random() % 4 == 0 ? SegmentValue::hole()
                                                   : SegmentValue::free();
    TreeEdit edit{arena, stash, root, units - 1, version, false};
    ASSERT_TRUE(edit.put({first, last}, value));
    root = edit.root();
    for (Unit u = first; u <= last; ++u) plain[u] = value.raw;
    const TreeView tree{arena, root, units - 1};
    compare(tree, plain);
    SearchRequest request;
    request.count = 1 + random() % 30;
    request.align_log2 = static_cast<unsigned>(random() % 5);
    request.last_max = random() % units;
    request.direction = random() % 2 == 0 ? Direction::top_down : Direction::bottom_up;
    const auto found = tree.search(request);
    ASSERT_EQ(found.has_value(), plain_fits(plain, request));
    if (found) {
      ASSERT_EQ(*found % (Unit{1} << request.align_log2), 0U);
      ASSERT_LE(*found + request.count - 1, request.last_max);
      for (Unit u = *found; u < *found + request.count; ++u) ASSERT_EQ(plain[u], SegmentValue::free().raw);
    }
    if (version % 500 == 0) old.push_back({root, plain});  // its nodes are never released here
    if (HasFatalFailure()) return;
  }
  for (const Old& o : old) compare({arena, o.root, units - 1}, o.plain);
}

TEST(ExtentTreeModel, AnEditWithoutMemoryLeavesNothingBehind) {
  MetadataArena arena = *MetadataArena::create(Bytes{64U << 10});
  NodeStash stash;
  TreeEdit first{arena, stash, 0, units - 1, 1, false};
  ASSERT_TRUE(first.make_empty(SegmentValue::free()));
  while (arena.allocate(ObjectKind::tree_node, sizeof(TreeNode)) != 0) {
  }
  TreeEdit edit{arena, stash, first.root(), units - 1, 2, false};
  EXPECT_FALSE(edit.put({3, 5}, SegmentValue::run(1)));
  edit.abandon();
  EXPECT_EQ((TreeView{arena, first.root(), units - 1}.find(4).value), SegmentValue::free());
  TreeEdit last_resort{arena, stash, first.root(), units - 1, 2, true};
  EXPECT_TRUE(last_resort.put({3, 5}, SegmentValue::hole()));
}

}  // namespace
}  // namespace iovane::iova
