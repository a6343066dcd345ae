// VtdQueue: the invalidation queue's registers (IQA, IQH, IQT) and the descriptors between them, in guest memory
// (specification 4.x, section 6.5.2).
//
// Descriptors are read ahead of IQH: the guest sees IQH move only when what was read is in effect (complete()).
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "viommu/guest_memory.hpp"
#include "viommu/vtd_descriptor.hpp"

namespace iovane::viommu {

class VtdQueue {
 public:
  /// GCMD.QIE with this IQA: bits 63:12 the queue, 11 its descriptors' width, 2:0 its size. Head and tail become 0.
  /// False for an IQA that is not one: the queue is off then.
  bool set(std::uint64_t iqa, bool wide_allowed) noexcept {
    const bool wide = (iqa >> 11 & 1) != 0;
    on_ = (iqa & 0x7f8) == 0 && (!wide || wide_allowed);
    iqa_ = iqa;
    gpa_ = iqa & ~std::uint64_t{0xfff};
    entry_shift_ = wide ? 5 : 4;
    entries_ = (4096U << (iqa & 7)) >> entry_shift_;
    next_ = done_ = tail_ = 0;
    base_ = nullptr;
    return on_;
  }
  /// IQT as written; false when it is outside the queue or, where descriptors have 256 bits, between two of them (bit 4
  /// is reserved there).
  bool set_tail(std::uint64_t iqt) noexcept {
    if ((iqt & 0x7fff0 & ((1U << entry_shift_) - 1)) != 0) return false;
    const auto tail = static_cast<std::uint32_t>((iqt & 0x7fff0) >> entry_shift_);
    if (tail >= entries_) return false;
    tail_ = tail;
    return true;
  }
  /// Head and tail as the registers say them; false when they are not inside the queue.
  bool restore(std::uint64_t head, std::uint64_t tail) noexcept {
    const std::uint64_t bytes = std::uint64_t{entries_} << entry_shift_;
    if (head >= bytes || tail >= bytes || ((head | tail) & ((1U << entry_shift_) - 1)) != 0) return false;
    next_ = done_ = static_cast<std::uint32_t>(head >> entry_shift_);
    tail_ = static_cast<std::uint32_t>(tail >> entry_shift_);
    return true;
  }

  bool on() const noexcept { return on_; }
  bool all_read() const noexcept { return next_ == tail_; }
  std::uint32_t entries() const noexcept { return entries_; }
  std::uint64_t iqa() const noexcept { return on_ ? iqa_ : 0; }
  std::uint64_t head() const noexcept { return std::uint64_t{done_} << entry_shift_; }
  std::uint64_t tail() const noexcept { return std::uint64_t{tail_} << entry_shift_; }

  /// Unread descriptors that follow each other in host memory.
  struct Run {
    const std::uint64_t* words = nullptr;
    std::uint32_t count = 0;   // none: the next one is not in RAM
    std::uint32_t stride = 2;  // words of a descriptor

    /// Loads each word of the first one once.
    VtdRawDescriptor first() const noexcept {
      const auto load = [](const std::uint64_t* word) {
        const std::uint64_t value = GuestMemory::View::load(word);
        return std::endian::native == std::endian::big ? __builtin_bswap64(value) : value;
      };
      if (stride == 4) return {load(words), load(words + 1), load(words + 2), load(words + 3)};
      return {load(words), load(words + 1), 0, 0};
    }
    void step() noexcept { words += stride; }
  };
  Run unread(const GuestMemory::View& view) const noexcept {
    Run run{place(view), 0, 1U << (entry_shift_ - 3)};
    if (run.words == nullptr) return run;
    run.count = (next_ <= tail_ ? tail_ : entries_) - next_;
    // In several regions: a descriptor is aligned to its size, so at least that one lies in one.
    if (base_ == nullptr) run.count = std::min(run.count, 1U);
    return run;
  }
  /// Goes past descriptors of a run.
  void skip(std::uint32_t count) noexcept { next_ = next_ + count == entries_ ? 0 : next_ + count; }
  /// Everything that was read is in effect.
  void complete() noexcept { done_ = next_; }

 private:
  // Where the next descriptor lies, or null. Host pointers of one View are good in another of the same generation.
  const std::uint64_t* place(const GuestMemory::View& view) const noexcept {
    const std::uint64_t at = std::uint64_t{next_} << entry_shift_;
    if (base_ == nullptr || generation_ != view.generation()) [[unlikely]] {
      base_ = nullptr;
      const Region* region = view.find(gpa_);
      if (region != nullptr && region->last - gpa_ >= (std::uint64_t{entries_} << entry_shift_) - 1) {
        base_ = region->address + (gpa_ - region->gpa);
        generation_ = view.generation();
      } else {
        region = view.find(gpa_ + at);
        if (region == nullptr) return nullptr;
        return reinterpret_cast<const std::uint64_t*>(region->address + (gpa_ + at - region->gpa));
      }
    }
    return reinterpret_cast<const std::uint64_t*>(base_ + at);
  }

  bool on_ = false;
  unsigned entry_shift_ = 4;
  std::uint32_t entries_ = 0;
  std::uint32_t next_ = 0;  // to be read
  std::uint32_t done_ = 0;  // IQH
  std::uint32_t tail_ = 0;  // IQT
  std::uint64_t gpa_ = 0;
  std::uint64_t iqa_ = 0;
  mutable const std::byte* base_ = nullptr;  // of a queue that lies in one region
  mutable std::uint64_t generation_ = 0;
};

}  // namespace iovane::viommu
