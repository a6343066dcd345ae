#include "iova/extent_map.hpp"

#include <algorithm>
#include <array>

#include "base/asymmetric_barrier.hpp"
#include "base/yield_point.hpp"

namespace iovane::iova {

bool ExtentMap::start(Participant& me) noexcept {
  const ObjectId windows = arena_.allocate(ObjectKind::window_list, sizeof(WindowList));
  const ObjectId id = versions_.allocate(ObjectKind::map_version, sizeof(MapVersion));
  TreeEdit edit{arena_, me.stash, 0, last_, 1, false};
  if (windows == 0 || id == 0 || !edit.make_empty(SegmentValue::hole())) return false;
  auto& list = *arena_.at<WindowList>(windows);
  list.kind = ObjectKind::window_list;
  list.bytes = sizeof(WindowList);
  list.birth = 1;
  list.count = 0;
  auto& version = *versions_.at<MapVersion>(id);
  version.kind = ObjectKind::map_version;
  version.bytes = sizeof(MapVersion);
  version.birth = 1;
  version.tree = edit.root();
  version.windows = windows;
  // W.version - release, as in commit().
  word_.store((std::uint64_t{1} << id_bits) | id, std::memory_order_release);
  return true;
}

void ExtentMap::release(VersionedObject& object, ObjectId id) noexcept {
  MetadataArena& home = object.kind == ObjectKind::map_version ? versions_ : arena_;
  home.release(object.kind, object.bytes, id);
}

void ExtentMap::retire(Participant& me, VersionedObject& object, ObjectId id) noexcept {
  // One above the current version: a section that still found the object in use announced at most the current one.
  object.retired = current_version() + 1;
  // relaxed: the chain is this thread's own.
  object.next_free.store(me.limbo, std::memory_order_relaxed);
  // Ids of the two arenas share the chain; the top bit says which.
  me.limbo = object.kind == ObjectKind::map_version ? id | (ObjectId{1} << 31) : id;
  if (++me.limbo_count >= me.limbo_scan_at) reclaim(me);
}

void ExtentMap::reclaim(Participant& me) noexcept {
  struct Eras {
    // More participants inside sections at once than fit here: nothing is reclaimed this time.
    std::array<std::uint64_t, 256> announced;
    unsigned count = 0;
    bool overflow = false;
  } eras;
  base::heavy_barrier();
  roster_.for_each_era(
      [](void* context, std::uint64_t era) {
        auto& e = *static_cast<Eras*>(context);
        if (era == 0) return;
        if (e.count == e.announced.size()) {
          e.overflow = true;
        } else {
          e.announced[e.count++] = era - 1;
        }
      },
      &eras);
  ObjectId tagged = me.limbo;
  me.limbo = 0;
  me.limbo_count = 0;
  while (tagged != 0) {
    const bool is_version = (tagged >> 31) != 0;
    const ObjectId id = tagged & ~(ObjectId{1} << 31);
    auto& object = *(is_version ? versions_ : arena_).at<VersionedObject>(id);
    // relaxed: this thread's own chain.
    const ObjectId next = object.next_free.load(std::memory_order_relaxed);
    const bool pinned =
        eras.overflow || std::any_of(eras.announced.begin(), eras.announced.begin() + eras.count,
                                     [&](std::uint64_t v) { return object.birth <= v && v < object.retired; });
    if (pinned) {
      // relaxed: as above.
      object.next_free.store(me.limbo, std::memory_order_relaxed);
      me.limbo = tagged;
      ++me.limbo_count;
    } else if (object.kind == ObjectKind::tree_node && me.stash.count < NodeStash::capacity) {
      me.stash.ids[me.stash.count++] = id;
    } else {
      release(object, id);
    }
    tagged = next;
  }
  // What stays pinned is looked at again only after as much has been retired anew: amortised constant.
  me.limbo_scan_at = std::max(64U, 2 * me.limbo_count);
}

MapSection::MapSection(ExtentMap& map, Participant& me) noexcept : map_{map}, me_{me} { renew(); }

MapSection::~MapSection() {
  // W.leave - release, pairs with R.era: this section's reads come before any reuse.
  me_.era.store(0, std::memory_order_release);
}

void MapSection::renew() noexcept {
  // R.version - acquire, pairs with W.version.
  std::uint64_t word = map_.word_.load(std::memory_order_acquire);
  for (;;) {
    base::yield_point("section.announce");
    base::announce(me_.era, (word >> ExtentMap::id_bits) + 1);
    base::yield_point("section.check");
    // R.version - seq_cst: the handshake's second half (era.hpp). Linearization of a read of the map.
    const std::uint64_t now = map_.word_.load(std::memory_order_seq_cst);
    if (now == word) break;
    word = now;  // lock-free: another thread's commit succeeded in between
  }
  word_ = word;
}

TreeEdit MapSection::edit(bool last_resort) const noexcept {
  return {map_.arena_, me_.stash, map_.version_of(word_).tree, map_.last_, version() + 1, last_resort};
}

ExtentMap::Commit MapSection::commit(TreeEdit& edit, ObjectId windows) noexcept {
  const ObjectId id = map_.versions_.allocate(ObjectKind::map_version, sizeof(MapVersion));
  if (id == 0) {
    edit.abandon();
    return ExtentMap::Commit::no_memory;
  }
  const MapVersion& old = map_.version_of(word_);
  const ObjectId old_windows = old.windows;
  auto& next = *map_.versions_.at<MapVersion>(id);
  next.kind = ObjectKind::map_version;
  next.bytes = sizeof(MapVersion);
  next.birth = version() + 1;
  next.tree = edit.root();
  next.windows = windows != 0 ? windows : old_windows;

  const std::uint64_t desired = ((version() + 1) << ExtentMap::id_bits) | id;
  std::uint64_t expected = word_;
  base::yield_point("map.commit");
  // W.version - seq_cst: releases the tree before its name (pairs with R.version) and takes part in the handshake with
  // announcements (era.hpp). Linearization of every change of the map.
  if (!map_.word_.compare_exchange_strong(expected, desired, std::memory_order_seq_cst, std::memory_order_relaxed)) {
    edit.abandon();
    map_.versions_.release(ObjectKind::map_version, sizeof(MapVersion), id);
    return ExtentMap::Commit::conflict;
  }
  base::yield_point("map.retire");
  const auto old_id = static_cast<ObjectId>(word_ & ExtentMap::id_mask);
  for (const ObjectId node : edit.replaced()) map_.retire(me_, *map_.arena_.at<VersionedObject>(node), node);
  map_.retire(me_, *map_.versions_.at<VersionedObject>(old_id), old_id);
  if (windows != 0) map_.retire(me_, *map_.arena_.at<VersionedObject>(old_windows), old_windows);
  return ExtentMap::Commit::done;
}

}  // namespace iovane::iova
