#include "viommu/vtd_sync.hpp"

#include <array>

namespace iovane::viommu {
namespace {

class DifferenceVisitor {
 public:
  DifferenceVisitor(const GuestMemory::View& view, ShadowDomain& domain, const VtdEntryRules& rules, WorkBudget& budget,
                    std::uint32_t tag) noexcept
      : view_{view},
        domain_{domain},
        rules_{rules},
        budget_{budget},
        tag_{tag},
        run_bytes_{domain.config().exact ? 4096
                                         : std::max<std::uint64_t>(domain.config().merge_bytes_max.value, 4096)} {}

  SyncOutcome outcome;

  bool hole(const IovaRange& range, VtdFault fault) noexcept {
    ++outcome.entries;
    if (fault == VtdFault::first_reserved || fault == VtdFault::second_reserved ||
        fault == VtdFault::paging_entry_reserved)
      ++outcome.reserved_entries;
    if (hole_ && hole_->precedes_directly(range)) {
      hole_->last = range.last;
    } else {
      flush_hole();
      hole_ = range;
    }
    return budget_.take(1) && outcome.error.ok();
  }

  bool superpage(std::uint64_t iova, unsigned shift, std::uint64_t gpa, Access access) noexcept {
    const IovaRange range{Iova{iova}, Iova{iova + ((std::uint64_t{1} << shift) - 1)}};
    if (access == Access::none) return hole(range, VtdFault::none);
    flush_hole();
    ++outcome.entries;
    const auto changed = domain_.assign(view_, range, gpa, access, tag_);
    if (!changed) outcome.error = changed.error();
    return budget_.take(1) && outcome.error.ok();
  }

  // Level-1 entries: `want` is decided on one load each; then removals, then additions, in runs.
  bool run(std::uint64_t iova, const std::uint64_t* entries, unsigned count, Access inherited) noexcept {
    flush_hole();
    if (count == 1) {
      one(iova, entries, inherited);
    } else if (count <= 16) {
      several<16>(iova, entries, count, inherited);
    } else {
      several<512>(iova, entries, count, inherited);
    }
    return budget_.take(count) && outcome.error.ok();
  }

  void one(std::uint64_t iova, const std::uint64_t* entry, Access inherited) noexcept {
    ++outcome.entries;
    bool reserved = false;
    Error error;
    if (sync_entry(view_, domain_, rules_, iova, entry, inherited, tag_, reserved, error)) {
      note(error);
    } else {
      const std::uint64_t want = load(entry, inherited, reserved);
      whole(iova, &want, 1);
    }
    if (reserved) ++outcome.reserved_entries;
  }

  void flush_hole() noexcept {
    if (!hole_) return;
    const IovaRange range = *hole_;
    hole_.reset();
    remove(range);
  }

 private:
  static constexpr std::uint64_t page = 4096;

  template <std::size_t CountMax>
  void several(std::uint64_t iova, const std::uint64_t* entries, unsigned count, Access inherited) noexcept {
    outcome.entries += count;
    bool reserved = false;
    const std::uint64_t* have = domain_.index().leaf_slots(iova);
    std::array<std::uint64_t, CountMax> want{};
    for (unsigned i = 0; i < count; ++i) want[i] = load(entries + i, inherited, reserved);
    if (have == nullptr) {
      whole(iova, want.data(), count);
    } else {
      have += iova >> 12 & 511U;
      std::array<std::uint64_t, CountMax> had{};  // the edits below change the slots
      for (unsigned i = 0; i < count; ++i) had[i] = have[i] & LeafWord::guest_mask;
      differences(iova, want.data(), had.data(), count);
    }
    if (reserved) ++outcome.reserved_entries;
  }

  std::uint64_t load(const std::uint64_t* entry, Access inherited, bool& reserved) const noexcept {
    std::uint64_t word = GuestMemory::View::load(entry);
    if constexpr (std::endian::native == std::endian::big) word = __builtin_bswap64(word);
    return rules_.leaf_word(word, inherited, reserved);
  }

  void note(const Error& error) noexcept {
    if (outcome.error.ok()) outcome.error = error;
  }
  void remove(const IovaRange& range) noexcept {
    const auto gone = domain_.unmap(view_, range, CutRule::cut, tag_);
    if (!gone) note(gone.error());
  }
  void add(std::uint64_t iova, std::uint64_t bytes, std::uint64_t word) noexcept {
    const auto done =
        domain_.map(view_, {Iova{iova}, Iova{iova + bytes - 1}}, LeafWord::gpa(word), LeafWord::access(word), tag_);
    if (!done) note(done.error());
  }
  void change(std::uint64_t iova, std::uint64_t word) noexcept {
    const auto done =
        domain_.assign(view_, {Iova{iova}, Iova{iova + page - 1}}, LeafWord::gpa(word), LeafWord::access(word), tag_);
    if (!done) note(done.error());
  }

  void differences(std::uint64_t iova, const std::uint64_t* want, const std::uint64_t* had, unsigned count) noexcept {
    for (unsigned i = 0; i < count;) {
      if (want[i] == had[i] || had[i] == 0) {
        ++i;
      } else if (want[i] != 0) {
        change(iova + i * page, want[i]);
        ++i;
      } else {
        unsigned stop = i + 1;  // a run of removals; holes inside it may ride along
        while (stop < count && want[stop] == 0) ++stop;
        remove({Iova{iova + i * page}, Iova{iova + stop * page - 1}});
        i = stop;
      }
    }
    for (unsigned i = 0; i < count;) {
      if (want[i] == 0 || had[i] != 0) {
        ++i;
        continue;
      }
      unsigned stop = i + 1;
      while (stop < count && had[stop] == 0 && want[stop] == want[stop - 1] + page && (stop - i) * page < run_bytes_)
        ++stop;
      add(iova + i * page, (stop - i) * page, want[i]);
      i = stop;
    }
  }

  // No small leaves there: nothing at all, or a larger leaf that may say the same.
  void whole(std::uint64_t iova, const std::uint64_t* want, unsigned count) noexcept {
    const IovaRange range{Iova{iova}, Iova{iova + count * page - 1}};
    bool one_run = want[0] != 0;
    for (unsigned i = 1; i < count && one_run; ++i) one_run = want[i] == want[i - 1] + page;
    if (!domain_.index().is_free(range)) {
      if (one_run && domain_.index().match(range, want[0]) == ShadowIndex::Match::equal) return;
      remove(range);
    }
    static constexpr std::array<std::uint64_t, 512> nothing{};
    differences(iova, want, nothing.data(), count);
  }

  const GuestMemory::View& view_;
  ShadowDomain& domain_;
  const VtdEntryRules& rules_;
  WorkBudget& budget_;
  std::uint32_t tag_;
  std::uint64_t run_bytes_;
  std::optional<IovaRange> hole_;
};

}  // namespace

SyncOutcome sync_range(const GuestMemory::View& view, ShadowDomain& domain, const VtdPageTable& table,
                       const VtdEntryRules& rules, IovaRange range, WorkBudget& budget, std::uint32_t tag) noexcept {
  DifferenceVisitor visitor{view, domain, rules, budget, tag};
  VtdWalk walk{view, table, rules, visitor};
  const auto resume = walk.walk(range);
  visitor.flush_hole();
  visitor.outcome.resume = visitor.outcome.error.ok() ? resume : std::nullopt;
  return visitor.outcome;
}

SyncOutcome sync_entries(const GuestMemory::View& view, ShadowDomain& domain, const VtdEntryRules& rules,
                         std::uint64_t iova, const std::uint64_t* entries, unsigned count, Access inherited,
                         WorkBudget& budget, std::uint32_t tag) noexcept {
  DifferenceVisitor visitor{view, domain, rules, budget, tag};
  static_cast<void>(visitor.run(iova, entries, count, inherited));
  return visitor.outcome;
}

}  // namespace iovane::viommu
