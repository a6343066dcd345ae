// Stands in for an IOMMU's walkers when first-stage tables are tested alone: it remembers tables and leaves until it is
// told to forget, as hardware may, and says when the tables broke a rule of the architecture.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include "backends/stage1/table_editor.hpp"

namespace iovane::test {

using namespace backends::stage1;

/// Memory that needs no pinning; may refuse.
class PlainTableMemory final : public TableMemory {
 public:
  int pin(std::uint64_t address, std::byte* memory, std::uint64_t bytes) noexcept override {
    // relaxed: tests count.
    if (left_.load(std::memory_order_relaxed) <= 0) return 12;
    left_.fetch_sub(1, std::memory_order_relaxed);
    (void)address, (void)memory, (void)bytes;
    return 0;
  }
  void allow(int chunks) noexcept { left_.store(chunks, std::memory_order_relaxed); }  // relaxed: as above

 private:
  std::atomic<int> left_{1 << 20};
};

/// A walker with caches that never lose anything by themselves.
class FirstStageWalker final : public TableWalkers {
 public:
  void watch(TableEditor& editor, TablePool& pool) {
    editor_ = &editor;
    pool_ = &pool;
  }

  /// As a device: the leaf for `iova` and where it leads, from the caches where they know.
  std::optional<std::uint64_t> translate(std::uint64_t iova) {
    const std::lock_guard lock{mutex_};
    if (const auto known = leaves_.find(iova >> 12); known != leaves_.end()) return known->second;
    const TableFormat& format = editor_->format();
    unsigned level = editor_->levels() - 1;
    const Table* table = pool_->at(editor_->root_address());
    if (const auto known = tables_.find(iova >> 21); known != tables_.end()) {
      table = known->second;
      level = 0;
    } else if (const auto upper = uppers_.find(iova >> 30); upper != uppers_.end()) {
      table = upper->second;
      level = 1;
    }
    while (true) {
      // A.entry - as the hardware's dependent load.
      const std::uint64_t entry = table->entries[index_of(iova, level)].load(std::memory_order_acquire);
      const EntryKind kind = format.kind(entry, level);
      if (kind == EntryKind::table) {
        table = pool_->at(format.address(entry));
        if (--level == 0) tables_[iova >> 21] = table;
        if (level == 1) uppers_[iova >> 30] = table;
        continue;
      }
      if (kind != EntryKind::leaf) return std::nullopt;
      if ((entry & format.hint_bit) != 0) {
        // As the architecture allows: one entry vouches for all sixteen, and what it says of the others is kept.
        const std::uint64_t run = group_entries * bytes_of(level), start = iova & ~(run - 1);
        const std::uint64_t base = format.address(entry) & ~(run - 1);
        for (std::uint64_t at = 0; at < run; at += page_bytes) leaves_[(start + at) >> 12] = base + at;
        return leaves_[iova >> 12];
      }
      const std::uint64_t leads = format.address(entry) + (iova & (bytes_of(level) - 1) & ~(page_bytes - 1));
      leaves_[iova >> 12] = leads;
      return leads;
    }
  }

  bool forget(IovaRange range) noexcept override {
    const std::lock_guard lock{mutex_};
    ++forgets_;
    if (refuse_) return false;
    if (!deaf_) drop(range, true);
    return true;
  }
  /// What the space does for an unmap.
  void forget_leaves(IovaRange range) {
    const std::lock_guard lock{mutex_};
    drop(range, false);
  }

  std::size_t forgets() const noexcept { return forgets_; }
  void set_deaf(bool deaf) noexcept { deaf_ = deaf; }  ///< says yes and keeps everything
  void set_refusing(bool refuse) noexcept { refuse_ = refuse; }

 private:
  void drop(IovaRange range, bool tables) {
    leaves_.erase(leaves_.lower_bound(range.start.value >> 12), leaves_.upper_bound(range.last.value >> 12));
    if (!tables) return;
    tables_.erase(tables_.lower_bound(range.start.value >> 21), tables_.upper_bound(range.last.value >> 21));
    uppers_.erase(uppers_.lower_bound(range.start.value >> 30), uppers_.upper_bound(range.last.value >> 30));
  }

  TableEditor* editor_ = nullptr;
  TablePool* pool_ = nullptr;
  std::mutex mutex_;
  std::map<std::uint64_t, std::uint64_t> leaves_;
  std::map<std::uint64_t, const Table*> tables_;  // of level 0
  std::map<std::uint64_t, const Table*> uppers_;  // of level 1
  std::size_t forgets_ = 0;
  bool deaf_ = false;
  bool refuse_ = false;
};

/// Tables ready for use.
struct TableWorld {
  explicit TableWorld(const TableFormat& format, unsigned levels, std::uint32_t pages = 1U << 14)
      : editor{format, levels, pool, walker} {
    if (!pool.open(memory, 0x1'0000'0000, pages) || !editor.open()) std::abort();
    walker.watch(editor, pool);
  }
  MapVerdict map(IovaRange range, std::uint64_t address, Access access = Access::read_write, bool large = true) {
    TableEditor::Session session{editor};
    std::uint64_t written = 0;
    const MapVerdict verdict = editor.map(session, range, address, access, 0, large, written);
    if (verdict != MapVerdict::done && written != 0)
      editor.unmap(session, {range.start, Iova{range.start.value + written - 1}}, [](auto, auto, auto) {});
    return verdict;
  }
  /// The bytes cleared; the walker forgets them.
  std::uint64_t unmap(IovaRange range) {
    std::uint64_t bytes = 0;
    TableEditor::Session session{editor};
    const bool all =
        editor.unmap(session, range, [&](std::uint64_t, std::uint64_t length, std::uint64_t) { bytes += length; });
    session.leave();
    unmapped_all.store(all, std::memory_order_relaxed);  // relaxed: for tests with one thread
    walker.forget_leaves(range);
    return bytes;
  }

  PlainTableMemory memory;
  FirstStageWalker walker;
  TablePool pool;
  TableEditor editor;
  std::atomic<bool> unmapped_all{true};
};

}  // namespace iovane::test
