#include "backends/model/first_stage.hpp"

#include <atomic>

namespace iovane::backends::model {
namespace {

// What the second stage makes of an intermediate address; null where it has nothing.
std::byte* reach(const PageTable& parent, std::uint64_t address) noexcept { return parent.walk(Iova{address}).memory; }

std::uint64_t word_at(const std::byte* memory) noexcept {
  // A.walk - pairs with the release stores of whoever writes first-stage entries: a table is complete before the
  // pointer to it. Hardware has the address dependency for that.
  auto* const word = reinterpret_cast<std::uint64_t*>(const_cast<std::byte*>(memory));
  return std::atomic_ref<std::uint64_t>{*word}.load(std::memory_order_acquire);
}

std::uint64_t context_word(const PageTable& parent, std::uint64_t context, unsigned index) noexcept {
  const std::byte* const memory = reach(parent, context);
  return memory == nullptr ? 0 : word_at(memory + index * 8);
}

constexpr bool bit(std::uint64_t word, unsigned index) noexcept { return (word >> index & 1) != 0; }

}  // namespace

FirstStage FirstStage::smmuv3(std::uint64_t context) noexcept {
  FirstStage out;
  out.kind_ = Nesting::smmuv3;
  out.base_ = context;
  return out;
}

FirstStage FirstStage::x86(std::uint64_t root, unsigned levels) noexcept {
  FirstStage out;
  out.kind_ = Nesting::vtd;
  out.base_ = root;
  out.levels_ = levels;
  return out;
}

FirstStage::Root FirstStage::root(const PageTable& parent) const noexcept {
  if (kind_ != Nesting::smmuv3) return {base_, levels_};
  const std::uint64_t word = context_word(parent, base_, 0);
  const auto unused_bits = static_cast<unsigned>(word & 63);  // T0SZ
  const bool granule_4k = (word >> 6 & 3) == 0;
  // V, AA64, and a first half that is walked (EPD0); the second half is not ours (EPD1).
  if (!bit(word, 31) || !bit(word, 41) || bit(word, 14) || !bit(word, 30) || !granule_4k) return {};
  if (unused_bits < 16 || unused_bits > 39) return {};
  const unsigned address_bits = 64 - unused_bits;
  return {context_word(parent, base_, 1) & 0x000f'ffff'ffff'fff0, (address_bits - 12 + 8) / 9};
}

Iova FirstStage::last_address(const PageTable& parent) const noexcept {
  if (kind_ != Nesting::smmuv3) return Iova{(std::uint64_t{1} << (12 + 9 * levels_)) - 1};
  const std::uint64_t word = context_word(parent, base_, 0);
  return bit(word, 31) ? Iova{(std::uint64_t{1} << (64 - (word & 63))) - 1} : Iova{0};
}

std::uint16_t FirstStage::asid(const PageTable& parent) const noexcept {
  return kind_ == Nesting::smmuv3 ? static_cast<std::uint16_t>(context_word(parent, base_, 0) >> 48) : std::uint16_t{0};
}

Translation FirstStage::walk(const PageTable& parent, Iova address, const std::byte*& table) const noexcept {
  const bool arm = kind_ == Nesting::smmuv3;
  const std::uint64_t frame = arm ? 0x0000'ffff'ffff'f000 : 0x000f'ffff'ffff'f000;
  unsigned level = 0;
  bool writable = true;
  if (table == nullptr) {
    const Root from = root(parent);
    if (from.levels == 0) return {};
    level = from.levels - 1;
    table = reach(parent, from.address);
  }
  while (table != nullptr) {
    const std::uint64_t entry = word_at(table + (address.value >> (12 + 9 * level) & 511) * 8);
    bool leaf = level == 0;
    if (arm) {
      const bool second = bit(entry, 1);
      if (!bit(entry, 0) || (leaf && !second)) break;
      leaf = leaf || !second;
      if (leaf && !bit(entry, 10)) break;  // an access flag fault
      if (leaf && !bit(entry, 6)) break;   // not for unprivileged accesses, which a device's are
      writable = writable && (!leaf || !bit(entry, 7));
    } else {
      if (!bit(entry, 0) || !bit(entry, 2)) break;  // present, and for user requests
      leaf = leaf || bit(entry, 7);
      writable = writable && bit(entry, 1);
    }
    if (leaf) {
      if (level > 2) break;
      const std::uint64_t inside = address.value & ((std::uint64_t{1} << (12 + 9 * level)) - 1);
      const std::uint64_t base = entry & frame & ~((std::uint64_t{1} << (12 + 9 * level)) - 1);
      Translation found = parent.walk(Iova{base + inside});
      found.access = static_cast<Access>(static_cast<unsigned>(found.access) &
                                         static_cast<unsigned>(writable ? Access::read_write : Access::read));
      found.entry = nullptr;
      if (level != 0) table = nullptr;
      return found;
    }
    table = reach(parent, entry & frame);
    --level;
  }
  // Nothing is remembered of a walk that found nothing.
  table = nullptr;
  return {};
}

}  // namespace iovane::backends::model
