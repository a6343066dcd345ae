// A guest's IOMMU driver, small: builds second- or first-level tables in guest RAM and queues invalidations, as a real
// one does under caching mode.
#pragma once

#include <cstdint>

#include "guest_ram.hpp"
#include "viommu/vtd.hpp"

namespace iovane::viommu {

class VtdGuest {
 public:
  static constexpr std::uint64_t root = 0x10000;
  static constexpr std::uint64_t queue = 0x20000;  // one page, 256 descriptors of 128 bits
  static constexpr std::uint64_t status = 0x30000;

  VtdGuest(const GuestRam& ram, Vtd& unit, std::uint64_t tables = 0x100000) : ram_{ram}, unit_{unit}, next_{tables} {}

  std::uint64_t new_table() {
    for (std::uint64_t i = 0; i < 4096; i += 8) ram_.store(next_ + i, 0);
    return std::exchange(next_, next_ + 4096);
  }
  /// A legacy context entry for a device: `levels`-level tables at `table`.
  void set_context(std::uint16_t source, std::uint64_t table, unsigned levels, std::uint16_t domain) {
    const std::uint64_t root_entry = root + (source >> 8U) * 16U;
    if (ram_.load(root_entry) == 0) ram_.store(root_entry, new_table() | 1);
    const std::uint64_t context = (ram_.load(root_entry) & ~0xfffULL) + (source & 0xffU) * 16U;
    ram_.store(context + 8, (levels - 2) | std::uint64_t{domain} << 8);
    ram_.store(context, table | 1);
  }
  /// The slot of the entry for `iova` at `level`, with the tables above it made.
  std::uint64_t slot(std::uint64_t table, unsigned levels, std::uint64_t iova, unsigned level) {
    for (unsigned l = levels; l > level; --l) {
      const std::uint64_t at = table + (iova >> (12 + 9 * (l - 1)) & 511) * 8;
      if (ram_.load(at) == 0) ram_.store(at, new_table() | 3);
      table = ram_.load(at) & ~0xfffULL;
    }
    return table + (iova >> (12 + 9 * (level - 1)) & 511) * 8;
  }
  void put(std::uint64_t table, unsigned levels, std::uint64_t iova, std::uint64_t entry, unsigned level = 1) {
    ram_.store(slot(table, levels, iova, level), entry);
  }
  void start() {
    unit_.set_queue(queue);
    unit_.set_root_table(root);
    unit_.set_translation(true);
  }
  void enqueue(std::uint64_t low, std::uint64_t high) {
    ram_.store(queue + tail_ * 16, low);
    ram_.store(queue + tail_ * 16 + 8, high);
    tail_ = (tail_ + 1) % 256;
  }
  void page(std::uint16_t domain, std::uint64_t iova, unsigned mask = 0) {
    enqueue(0x32 | std::uint64_t{domain} << 16, (iova & ~0xfffULL) | mask);
  }
  void domain(std::uint16_t domain) { enqueue(0x22 | std::uint64_t{domain} << 16, 0); }
  void global() { enqueue(0x12, 0); }
  void context_device(std::uint16_t source, std::uint16_t domain) {
    enqueue(0x31 | std::uint64_t{domain} << 16 | std::uint64_t{source} << 32, 0);
  }
  /// A wait whose status becomes `value`.
  void wait(std::uint32_t value) { enqueue(0x25 | std::uint64_t{value} << 32, status); }
  Progress ring() { return unit_.write_tail(tail_ * 16); }
  std::uint32_t waited() const { return static_cast<std::uint32_t>(ram_.load(status)); }

 private:
  const GuestRam& ram_;
  Vtd& unit_;
  std::uint64_t next_;
  std::uint64_t tail_ = 0;
};

}  // namespace iovane::viommu
