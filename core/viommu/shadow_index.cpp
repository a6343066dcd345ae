#include "viommu/shadow_index.hpp"

#include <algorithm>
#include <new>

namespace iovane::viommu {
namespace {

// Freeing nodes walks the tree: only worth it when an eighth of it is empty, so that a guest cannot make every one of
// its actions pay for a walk.
constexpr std::uint32_t prune_fraction = 8;

Error node_error(Errc code) noexcept {
  return make_error(code, Stage::publish,
                    code == Errc::limit_reached
                        ? "guest domain: its mappings need more index nodes than nodes_max; raise it, or the guest's "
                          "tables are hostile"
                        : "guest domain: no memory for an index node");
}

}  // namespace

ShadowIndex::ShadowIndex(unsigned granule_shift, unsigned address_bits, std::uint32_t nodes_max)
    : granule_shift_{granule_shift},
      levels_{std::max(1U, (std::min(address_bits, 64U) - granule_shift + fan_bits - 1) / fan_bits)},
      last_address_{address_bits >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << address_bits) - 1},
      nodes_max_{std::max(nodes_max, levels_max + 1)} {
  root_ = take_node(levels_ - 1);
}

ShadowIndex::~ShadowIndex() {
  while (owned_ != nullptr) delete std::exchange(owned_, owned_->next_owned);
}

ShadowIndex::Node* ShadowIndex::take_node(unsigned level) noexcept {
  Node* node = free_;
  if (node != nullptr) {
    free_ = node->next_free;
  } else {
    if (nodes_owned_ >= nodes_max_) return nullptr;
    node = new (std::nothrow) Node;
    if (node == nullptr) return nullptr;
    node->next_owned = owned_;
    owned_ = node;
    ++nodes_owned_;
  }
  node->next_free = nullptr;
  node->used = 0;
  node->level = level;
  ++nodes_in_use_;
  if (level == 0) ++nodes_empty_;
  return node;
}

// Slots are empty when a node is given back, so a stale reader sees "not mapped" or, once it is reused, a version that
// moved.
void ShadowIndex::give_node(Node* node) noexcept {
  if (node->level == 0) {
    --nodes_empty_;
    if (node == cached_node_) cached_key_ = ~std::uint64_t{0}, cached_node_ = nullptr;
  }
  --nodes_in_use_;
  node->next_free = free_;
  free_ = node;
}

void ShadowIndex::begin_structure_change() noexcept {
  // relaxed load: only the writer stores it. R.version - odd before any slot of a freed node can change: the slot
  // stores that follow are releases.
  structure_version_.store(structure_version_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
}

void ShadowIndex::end_structure_change() noexcept {
  // R.version - pairs with A.version in translate().
  structure_version_.store(structure_version_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
}

const ShadowIndex::Node* ShadowIndex::find_leaf_node(std::uint64_t iova) const noexcept {
  if (iova > last_address_) return nullptr;
  const Node* node = root_;
  for (unsigned level = levels_ - 1; level > 0; --level) {
    const std::uint64_t word = load(node->slots[slot_of(iova, level)]);
    if ((word & LeafWord::child) == 0) return nullptr;
    node = child_of(word);
  }
  cached_key_ = iova >> (granule_shift_ + fan_bits);
  cached_node_ = node;
  return node;
}

std::optional<LeafAt> ShadowIndex::at(std::uint64_t iova) const noexcept {
  if (iova > last_address_) return std::nullopt;
  const Node* node = root_;
  for (unsigned level = levels_ - 1;; --level) {
    const std::uint64_t word = load(node->slots[slot_of(iova, level)]);
    if (word == 0) return std::nullopt;
    if ((word & LeafWord::child) == 0) {
      const std::uint64_t start = iova & ~slot_span(level);
      return LeafAt{{Iova{start}, Iova{start + slot_span(level)}}, word};
    }
    node = child_of(word);
  }
}

std::optional<std::pair<std::uint64_t, Access>> ShadowIndex::translate(std::uint64_t iova) const noexcept {
  if (iova > last_address_) return std::nullopt;
  for (;;) {
    // A.version - pairs with R.version: an even value means every node we can reach is in the tree.
    const std::uint64_t before = structure_version_.load(std::memory_order_acquire);
    const Node* node = root_;
    std::uint64_t word = 0;
    unsigned level = levels_ - 1;
    for (;; --level) {
      // A.slot - pairs with R.slot in store().
      word = __atomic_load_n(&node->slots[slot_of(iova, level)], __ATOMIC_ACQUIRE);
      if ((word & LeafWord::child) == 0 || level == 0) break;
      node = child_of(word);
    }
    // A.version again: acquire loads above keep this one behind them, so an equal value means no node was taken out
    // and reused while we walked. A retry means the writer moved: lock-free.
    if ((before & 1U) == 0 && structure_version_.load(std::memory_order_relaxed) == before) {
      if ((word & LeafWord::leaf) == 0) return std::nullopt;
      return std::pair{LeafWord::gpa(word) + (iova & slot_span(level)), LeafWord::access(word)};
    }
  }
}

bool ShadowIndex::subtree_is_free(const Node& node) const noexcept {
  if (node.used == 0) return true;
  if (node.level == 0) return false;
  for (const std::uint64_t& slot : node.slots) {
    const std::uint64_t word = load(slot);
    if (word == 0) continue;
    if ((word & LeafWord::child) == 0 || !subtree_is_free(*child_of(word))) return false;
  }
  return true;
}

bool ShadowIndex::range_is_free(const Node& node, unsigned level, std::uint64_t first,
                                std::uint64_t last) const noexcept {
  if (node.used == 0) return true;
  const std::uint64_t base = first & ~slot_span(level);
  std::uint64_t slot_start = base;
  for (unsigned i = slot_of(first, level), stop = slot_of(last, level); i <= stop; ++i) {
    const std::uint64_t word = load(node.slots[i]);
    const std::uint64_t slot_last = slot_start + slot_span(level);
    if (word != 0) {
      if ((word & LeafWord::child) == 0) return false;
      if (!range_is_free(*child_of(word), level - 1, std::max(first, slot_start), std::min(last, slot_last)))
        return false;
    }
    slot_start = slot_last + 1;  // may wrap at the very last slot, which is then not looked at again
  }
  return true;
}

bool ShadowIndex::is_free(const IovaRange& range) const noexcept {
  if (range.start.value > last_address_) return true;
  if (const std::uint64_t* slots = leaf_slots(range.start.value);
      slots != nullptr && (range.start.value ^ range.last.value) <= slot_span(1)) {
    const unsigned stop = slot_of(range.last.value, 0);
    for (unsigned i = slot_of(range.start.value, 0); i <= stop; ++i)
      if (slots[i] != 0) return false;
    return true;
  }
  return range_is_free(*root_, levels_ - 1, range.start.value, std::min(range.last.value, last_address_));
}

std::optional<LeafAt> ShadowIndex::next_in(const Node& node, unsigned level, std::uint64_t base, std::uint64_t from,
                                           std::uint64_t last) const noexcept {
  if (node.used == 0) return std::nullopt;
  std::uint64_t slot_start = base + (static_cast<std::uint64_t>(slot_of(from, level)) << shift(level));
  for (unsigned i = slot_of(from, level), stop = slot_of(last, level); i <= stop; ++i) {
    const std::uint64_t slot_last = slot_start + slot_span(level);
    const std::uint64_t word = load(node.slots[i]);
    if (word != 0) {
      if ((word & LeafWord::child) == 0) return LeafAt{{Iova{slot_start}, Iova{slot_last}}, word};
      const auto found =
          next_in(*child_of(word), level - 1, slot_start, std::max(from, slot_start), std::min(last, slot_last));
      if (found) return found;
    }
    slot_start = slot_last + 1;
  }
  return std::nullopt;
}

std::optional<LeafAt> ShadowIndex::next(std::uint64_t from, std::uint64_t last) const noexcept {
  if (from > last_address_ || from > last) return std::nullopt;
  return next_in(*root_, levels_ - 1, 0, from, std::min(last, last_address_));
}

ShadowIndex::Match ShadowIndex::match(const IovaRange& range, std::uint64_t first_word) const noexcept {
  std::uint64_t expect_at = range.start.value;
  auto leaf = next(range.start.value, range.last.value);
  if (!leaf) return Match::empty;
  for (;;) {
    const std::uint64_t offset_in_leaf = expect_at - leaf->range.start.value;
    if (leaf->range.start.value > expect_at) return Match::different;
    const std::uint64_t have = (leaf->word & LeafWord::guest_mask) + offset_in_leaf;
    const std::uint64_t want = first_word + (expect_at - range.start.value);
    if (have != want) return Match::different;
    if (leaf->range.last.value >= range.last.value) break;
    expect_at = leaf->range.last.value + 1;
    leaf = next(expect_at, range.last.value);
    if (!leaf) return Match::different;
  }
  return Match::equal;
}

void ShadowIndex::free_subtree(Node* node) noexcept {
  if (node->level > 0) {
    for (std::uint64_t& slot : node->slots) {
      const std::uint64_t word = load(slot);
      if ((word & LeafWord::child) == 0) continue;
      free_subtree(child_of(word));
      store(slot, 0);
    }
    node->used = 0;
  }
  give_node(node);
}

Errc ShadowIndex::fill_in(Node& node, unsigned level, std::uint64_t first, std::uint64_t last, std::uint64_t word,
                          std::uint64_t& flags_first, std::uint32_t& leaves) noexcept {
  const std::uint64_t span = slot_span(level);
  unsigned i = slot_of(first, level);
  const unsigned stop = slot_of(last, level);
  if (level == 0) {
    if (node.used == 0) --nodes_empty_;
    node.used += stop - i + 1;
    leaves += stop - i + 1;
    for (; i <= stop; ++i, word += span + 1) store(node.slots[i], word | std::exchange(flags_first, 0));
    return Errc::ok;
  }
  std::uint64_t slot_start = first & ~span;
  for (; i <= stop; ++i) {
    const std::uint64_t slot_last = slot_start + span;
    const std::uint64_t from = std::max(first, slot_start);
    const std::uint64_t to = std::min(last, slot_last);
    const std::uint64_t here = word + (from - first);
    std::uint64_t have = load(node.slots[i]);
    if (from == slot_start && to == slot_last) {
      if (have != 0) {  // an empty subtree from earlier: a leaf of this size takes its place
        begin_structure_change();
        store(node.slots[i], 0);
        free_subtree(child_of(have));
        end_structure_change();
        --node.used;
      }
      store(node.slots[i], here | std::exchange(flags_first, 0));
      ++node.used;
      ++leaves;
    } else {
      if (have == 0) {
        Node* fresh = take_node(level - 1);
        if (fresh == nullptr) return nodes_owned_ >= nodes_max_ ? Errc::limit_reached : Errc::out_of_memory;
        have = word_of(fresh);
        store(node.slots[i], have);
        ++node.used;
      }
      const Errc code = fill_in(*child_of(have), level - 1, from, to, here, flags_first, leaves);
      if (code != Errc::ok) return code;
    }
    slot_start = slot_last + 1;
  }
  return Errc::ok;
}

Result<std::uint32_t> ShadowIndex::fill(const IovaRange& range, std::uint64_t word,
                                        std::uint64_t flags_first) noexcept {
  std::uint32_t leaves = 0;
  // The common case: a few granules in a node that is there.
  if ((range.start.value ^ range.last.value) <= slot_span(1) && leaf_slots(range.start.value) != nullptr &&
      range.span() != slot_span(1)) {
    auto* node = const_cast<Node*>(cached_node_);
    static_cast<void>(fill_in(*node, 0, range.start.value, range.last.value, word, flags_first, leaves));
    leaves_ += leaves;
    return leaves;
  }
  for (int attempt = 0;; ++attempt) {
    std::uint64_t flags = flags_first;
    leaves = 0;
    const Errc code = fill_in(*root_, levels_ - 1, range.start.value, range.last.value, word, flags, leaves);
    leaves_ += leaves;
    if (code == Errc::ok) return leaves;
    static_cast<void>(clear(range));  // what was filled before the nodes ran out; leaves reach no border yet
    if (attempt == 1 || nodes_empty_ < nodes_in_use_ / prune_fraction || nodes_empty_ == 0) return node_error(code);
    prune();
  }
}

Errc ShadowIndex::break_leaf(Node& node, unsigned slot) noexcept {
  const std::uint64_t word = load(node.slots[slot]);
  Node* fresh = take_node(node.level - 1);
  if (fresh == nullptr) return nodes_owned_ >= nodes_max_ ? Errc::limit_reached : Errc::out_of_memory;
  const std::uint64_t step = slot_span(fresh->level) + 1;
  const std::uint64_t flags = word & (LeafWord::unit | LeafWord::head);
  std::uint64_t each = word & ~flags;
  for (std::uint64_t& s : fresh->slots) {
    store(s, each);  // a stale reader may still look at a node that was given back
    each += step;
  }
  store(fresh->slots[0], load(fresh->slots[0]) | flags);
  fresh->used = fan;
  if (fresh->level == 0) --nodes_empty_;
  store(node.slots[slot], word_of(fresh));
  leaves_ += fan - 1;
  return Errc::ok;
}

Result<void> ShadowIndex::split_at(std::uint64_t iova) noexcept {
  if (iova > last_address_) return {};
  Node* node = root_;
  for (unsigned level = levels_ - 1; level > 0; --level) {
    const unsigned slot = slot_of(iova, level);
    const std::uint64_t word = load(node->slots[slot]);
    if (word == 0) return {};
    if ((word & LeafWord::child) == 0) {
      if ((iova & slot_span(level)) == 0) return {};
      Errc code = break_leaf(*node, slot);
      if (code != Errc::ok && nodes_empty_ != 0 && nodes_empty_ >= nodes_in_use_ / prune_fraction) {
        prune();
        code = break_leaf(*node, slot);
      }
      if (code != Errc::ok) return node_error(code);
    }
    node = child_of(load(node->slots[slot]));
  }
  return {};
}

std::uint64_t* ShadowIndex::slot_at(std::uint64_t iova) noexcept {
  if (iova > last_address_) return nullptr;
  Node* node = root_;
  for (unsigned level = levels_ - 1;; --level) {
    std::uint64_t& slot = node->slots[slot_of(iova, level)];
    if (load(slot) == 0) return nullptr;
    if ((load(slot) & LeafWord::child) == 0) return &slot;
    node = child_of(load(slot));
  }
}

void ShadowIndex::mark(std::uint64_t iova, std::uint64_t flags) noexcept {
  if (std::uint64_t* slot = slot_at(iova); slot != nullptr) store(*slot, load(*slot) | flags);
}

void ShadowIndex::unmark(std::uint64_t iova, std::uint64_t flags) noexcept {
  if (std::uint64_t* slot = slot_at(iova); slot != nullptr) store(*slot, load(*slot) & ~flags);
}

void ShadowIndex::clear_in(Node& node, unsigned level, std::uint64_t base, std::uint64_t first, std::uint64_t last,
                           Cleared& out) noexcept {
  if (node.used == 0) return;
  const std::uint64_t span = slot_span(level);
  std::uint64_t slot_start = base + (static_cast<std::uint64_t>(slot_of(first, level)) << shift(level));
  for (unsigned i = slot_of(first, level), stop = slot_of(last, level); i <= stop; ++i) {
    const std::uint64_t word = load(node.slots[i]);
    const std::uint64_t slot_last = slot_start + span;
    if ((word & LeafWord::child) != 0) {
      clear_in(*child_of(word), level - 1, slot_start, std::max(first, slot_start), std::min(last, slot_last), out);
    } else if (word != 0) {
      if ((word & LeafWord::backed) != 0) {
        if (!out.any_backed) out.first_backed = slot_start;
        out.any_backed = true;
        out.last_backed = slot_last;
      }
      store(node.slots[i], 0);
      --node.used;
      ++out.leaves;
    }
    slot_start = slot_last + 1;
  }
  if (level == 0 && node.used == 0) ++nodes_empty_;
}

ShadowIndex::Cleared ShadowIndex::clear(const IovaRange& range) noexcept {
  Cleared out;
  if (range.start.value > last_address_) return out;
  if ((range.start.value ^ range.last.value) <= slot_span(1) && leaf_slots(range.start.value) != nullptr) {
    clear_in(*const_cast<Node*>(cached_node_), 0, range.start.value & ~slot_span(1), range.start.value,
             range.last.value, out);
  } else {
    clear_in(*root_, levels_ - 1, 0, range.start.value, std::min(range.last.value, last_address_), out);
  }
  leaves_ -= out.leaves;
  return out;
}

void ShadowIndex::prune_in(Node& node) noexcept {
  if (node.level == 0) return;
  for (std::uint64_t& slot : node.slots) {
    const std::uint64_t word = load(slot);
    if ((word & LeafWord::child) == 0) continue;
    Node* child = child_of(word);
    prune_in(*child);
    if (child->used != 0) continue;
    store(slot, 0);
    --node.used;
    give_node(child);
  }
}

void ShadowIndex::prune() noexcept {
  begin_structure_change();
  prune_in(*root_);
  end_structure_change();
}

}  // namespace iovane::viommu
