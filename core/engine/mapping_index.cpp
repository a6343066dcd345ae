#include "engine/mapping_index.hpp"

#include <limits>
#include <utility>

#include "base/error_text.hpp"

namespace iovane::engine {

using radix::child_at;
using radix::digit_of;
using radix::LargeNode;
using radix::Ref;
using radix::SmallNode;

namespace {

// Kept out of line: insert() is short without them.
[[gnu::cold, gnu::noinline]] Error ends_before_it_starts(IovaRange range) noexcept {
  return base::fail(Errc::invalid_argument, Stage::publish, 0, "range [{:#x}, {:#x}] ends before it starts",
                    range.start.value, range.last.value);
}
[[gnu::cold, gnu::noinline]] Error in_the_way(IovaRange range, const MappingRecord& other) noexcept {
  return base::fail(Errc::iova_busy, Stage::publish, 0, "[{:#x}, {:#x}] overlaps the {} mapping [{:#x}, {:#x}]",
                    range.start.value, range.last.value, to_string(other.state), other.range.start.value,
                    other.range.last.value);
}
[[gnu::cold, gnu::noinline]] Error full(std::size_t size) noexcept {
  return base::fail(Errc::limit_reached, Stage::publish, 0,
                    "{} mappings are live, as many as mappings_max allows: unmap some or raise it", size);
}
[[gnu::cold, gnu::noinline]] Error no_memory(std::size_t size) noexcept {
  return base::fail(Errc::out_of_memory, Stage::publish, 0,
                    "no memory to index one more mapping beside {} live ones; nothing was changed", size);
}

}  // namespace

std::string_view to_string(MappingState state) noexcept {
  switch (state) {
    case MappingState::mapping: return "mapping";
    case MappingState::live: return "live";
    case MappingState::unmapping: return "unmapping";
    case MappingState::stale: return "stale";
    case MappingState::quarantined: return "quarantined";
  }
  return "unknown";
}

Result<MappingIndex> MappingIndex::create(std::uint32_t mappings_max, base::MemorySource& source) {
  if (mappings_max == 0) {
    return base::fail(Errc::invalid_argument, Stage::validate, 0,
                      "an index of at most 0 mappings can hold nothing: mappings_max must be at least 1");
  }
  return MappingIndex{mappings_max, source};
}

MappingIndex::MappingIndex(std::uint32_t mappings_max, base::MemorySource& source) noexcept
    : entries_{mappings_max, source}, small_nodes_{mappings_max, source}, large_nodes_{mappings_max, source} {}

MappingIndex::MappingIndex(MappingIndex&& o) noexcept
    : entries_{std::move(o.entries_)},
      small_nodes_{std::move(o.small_nodes_)},
      large_nodes_{std::move(o.large_nodes_)},
      root_{std::exchange(o.root_, {})},
      finger_{std::exchange(o.finger_, {})},
      head_{std::exchange(o.head_, nullptr)},
      size_{std::exchange(o.size_, 0)},
      bytes_{std::exchange(o.bytes_, 0)} {}

MappingIndex& MappingIndex::operator=(MappingIndex&& o) noexcept {
  entries_ = std::move(o.entries_);
  small_nodes_ = std::move(o.small_nodes_);
  large_nodes_ = std::move(o.large_nodes_);
  root_ = std::exchange(o.root_, {});
  finger_ = std::exchange(o.finger_, {});
  head_ = std::exchange(o.head_, nullptr);
  size_ = std::exchange(o.size_, 0);
  bytes_ = std::exchange(o.bytes_, 0);
  return *this;
}

// --- Looking up ------------------------------------------------------------------------------------------------------

inline MappingIndex::Entry* MappingIndex::lowest(Ref child) noexcept {
  while (!child.is_entry()) child = radix::lowest_child(child);
  return child.entry<Entry>();
}

inline MappingIndex::Entry* MappingIndex::highest(Ref child) noexcept {
  while (!child.is_entry()) child = radix::highest_child(child);
  return child.entry<Entry>();
}

[[gnu::always_inline]] inline MappingIndex::Place MappingIndex::locate(std::uint64_t key) const noexcept {
  Place place{Ref{}, root_};
  if (finger_ && radix::covers(finger_, key)) place = {finger_, child_at(finger_, key)};
  while (place.child && !place.child.is_entry() && radix::covers(place.child, key)) {
    place.node = place.child;
    place.child = child_at(place.node, key);
  }
  return place;
}

// The entry with the greatest start not above `key`, given where `key` belongs.
[[gnu::always_inline]] inline MappingIndex::Entry* MappingIndex::floor_at(const Place& place,
                                                                          std::uint64_t key) noexcept {
  if (place.child.is_entry()) {
    Entry* const entry = place.child.entry<Entry>();
    return entry->record.range.start.value <= key ? entry : entry->prev;
  }
  if (place.child) return place.child.node()->key < key ? highest(place.child) : lowest(place.child)->prev;
  if (!place.node) return nullptr;
  const Ref below = radix::child_below(place.node, key);
  return below ? highest(below) : lowest(radix::lowest_child(place.node))->prev;
}

MappingIndex::Entry* MappingIndex::floor(std::uint64_t key) const noexcept { return floor_at(locate(key), key); }

const MappingIndex::Entry* MappingIndex::first_entry(IovaRange range) const noexcept {
  const Entry* const below = floor(range.start.value);
  if (below != nullptr && below->record.range.last >= range.start) return below;
  const Entry* const above = below != nullptr ? below->next : head_;
  return above != nullptr && above->record.range.start <= range.last ? above : nullptr;
}

MappingRecord* MappingIndex::find(MappingId id) noexcept {
  Entry* const entry = entries_.find(id.value);
  return entry != nullptr ? &entry->record : nullptr;
}

const MappingRecord* MappingIndex::find(MappingId id) const noexcept {
  const Entry* const entry = entries_.find(id.value);
  return entry != nullptr ? &entry->record : nullptr;
}

MappingId MappingIndex::covering(Iova iova) const noexcept {
  // Most lookups fall into the first granule of a mapping or find its digit taken by it: follow the digits without
  // comparing anything on the way, and look at what is there.
  const Ref at = radix::follow(finger_ && radix::covers(finger_, iova.value) ? finger_ : root_, iova.value);
  if (at) {
    const Entry* const entry = at.entry<Entry>();
    if (entry->record.range.contains(iova)) [[likely]]
      return MappingId{entries_.handle_of(entry)};
  }
  const Entry* const below = floor(iova.value);
  return below != nullptr && below->record.range.contains(iova) ? id_of(below) : MappingId{};
}

MappingId MappingIndex::first_in(IovaRange range) const noexcept { return id_of(first_entry(range)); }

MappingId MappingIndex::next(MappingId id) const noexcept {
  const Entry* const entry = entries_.find(id.value);
  return entry != nullptr ? id_of(entry->next) : MappingId{};
}

Bytes MappingIndex::bytes() const noexcept {
  // Disjoint ranges sum up to at most 2^64, which is the only sum above zero that is zero modulo 2^64.
  if (size_ != 0 && bytes_ == 0) return {std::numeric_limits<std::uint64_t>::max()};
  return {bytes_};
}

// --- Changing --------------------------------------------------------------------------------------------------------

Result<MappingId> MappingIndex::insert(const MappingRecord& record) noexcept {
  MappingRecord* const inserted = try_insert(record.range);
  if (inserted == nullptr) return why_not(record.range);
  *inserted = record;
  return id_of(inserted);
}

MappingRecord* MappingIndex::insert_anywhere(IovaRange range) noexcept {
  const std::uint64_t key = range.start.value;
  const Place place = locate(key);
  Entry* const entry = enter(range, floor_at(place, key));
  if (entry == nullptr) [[unlikely]]
    return nullptr;
  if (!hang(place, key, entry)) [[unlikely]] {
    entries_.release(entry);
    return nullptr;
  }
  link(entry);
  return &entry->record;
}

Error MappingIndex::why_not(IovaRange range) const noexcept {
  if (!range.well_formed()) return ends_before_it_starts(range);
  if (const Entry* const other = first_entry(range)) return in_the_way(range, other->record);
  return size_ == entries_.entries_max() ? full(size_) : no_memory(size_);
}

bool MappingIndex::erase(MappingId id) noexcept {
  Entry* const entry = entries_.find(id.value);
  if (entry == nullptr) return false;
  remove(entry);
  return true;
}

// Makes `child` what stands below `parent` (nothing: at the root) on the way to `key`, where something stands already.
void MappingIndex::set_child(Ref parent, std::uint64_t key, Ref child) noexcept {
  if (parent)
    radix::replace_child(parent, key, child);
  else
    root_ = child;
  if (child && !child.is_entry()) child.node()->parent = parent;
}

// Hangs an entry into the tree. False, and nothing changed, when there is no memory for the node this needs.
inline bool MappingIndex::hang(const Place& place, std::uint64_t key, Entry* entry) noexcept {
  const Ref leaf = Ref::to_entry(entry);
  if (place.child || !place.node) [[unlikely]]
    return hang_anywhere(place, key, leaf);
  if (place.node.is_large())
    place.node.large()->add(place.node.digit_of_large(key), leaf);
  else if (place.node.small()->count() < SmallNode::children_max)
    place.node.small()->add(place.node.digit_of(key), leaf);
  else
    return hang_anywhere(place, key, leaf);
  finger_ = place.node;
  return true;
}

bool MappingIndex::hang_anywhere(Place place, std::uint64_t key, Ref leaf) noexcept {
  if (place.child) {  // a node where the two part ways
    SmallNode* const fork = small_nodes_.acquire();
    if (fork == nullptr) return false;
    const std::uint64_t other =
        place.child.is_entry() ? place.child.entry<Entry>()->record.range.start.value : place.child.node()->key;
    const unsigned level = radix::parting_level(key, other);
    const Ref node = Ref::to_node(fork, level);
    fork->key = key;
    fork->add(digit_of(key, level), leaf);
    fork->add(digit_of(other, level), place.child);
    if (!place.child.is_entry()) place.child.node()->parent = node;
    set_child(place.node, key, node);
    finger_ = node;
    return true;
  }
  if (!place.node) {
    root_ = leaf;
    return true;
  }
  const Ref node = widen(place.node);  // a small one, and full
  if (!node) return false;
  node.large()->add(node.digit_of_large(key), leaf);
  finger_ = node;
  return true;
}

// Takes the entry at `key` out of the tree. Precondition: there is one.
void MappingIndex::unhang(std::uint64_t key) noexcept {
  Ref node;
  Ref at = finger_ && radix::covers(finger_, key) ? finger_ : root_;
  while (!at.is_entry()) {
    node = at;
    at = child_at(node, key);
  }
  finger_ = node;
  if (node && node.is_large())
    unhang_from_large(node, key);
  else
    unhang_from_small(node, key);
}

void MappingIndex::unhang_from_small(Ref node, std::uint64_t key) noexcept {
  if (!node) {
    root_ = Ref{};
    return;
  }
  node.small()->remove(node.digit_of(key));
  if (node.small()->count() == 1) dissolve(node, node.small()->children[0]);
}

// A large node in place of a full small one, or nothing when there is no memory.
Ref MappingIndex::widen(Ref node) noexcept {
  LargeNode* const large = large_nodes_.acquire();
  if (large == nullptr) return Ref{};
  SmallNode* const small = node.small();
  const Ref wide = Ref::to_node(large, node.level());
  large->key = small->key;
  for (unsigned i = 0; i < SmallNode::children_max; ++i) {
    const Ref child = small->children[i];
    large->add(static_cast<unsigned>(small->digits >> (8 * i)) & 0xff, child);
    if (!child.is_entry()) child.node()->parent = wide;
  }
  set_child(small->parent, small->key, wide);
  small_nodes_.release(small);
  return wide;
}

// A small node in place of a large one with at most three children. Without memory for it the large one stays, which
// costs only its size: an erase does not fail.
void MappingIndex::narrow(Ref node) noexcept {
  LargeNode* const large = node.large();
  if ((large->present & (large->present - 1)) == 0) {
    dissolve(node, radix::lowest_child(node));
    return;
  }
  SmallNode* const small = small_nodes_.acquire();
  if (small == nullptr) return;
  const Ref slim = Ref::to_node(small, node.level());
  small->key = large->key;
  for (std::uint64_t left = large->present; left != 0; left &= left - 1) {
    const auto digit = static_cast<unsigned>(std::countr_zero(left));
    const Ref child = large->children[digit];
    small->add(digit, child);
    if (!child.is_entry()) child.node()->parent = slim;
  }
  set_child(large->parent, large->key, slim);
  large_nodes_.release(large);
  finger_ = slim;
}

// Lets the last child of a node take its place.
void MappingIndex::dissolve(Ref node, Ref only_child) noexcept {
  const Ref parent = node.node()->parent;
  set_child(parent, node.node()->key, only_child);
  if (node.is_large())
    large_nodes_.release(node.large());
  else
    small_nodes_.release(node.small());
  finger_ = parent;
}

}  // namespace iovane::engine
