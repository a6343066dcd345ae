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

constexpr std::uint64_t bytes_at(unsigned level) noexcept { return std::uint64_t{1} << (12 + 9 * level); }

}  // namespace

FirstStage FirstStage::smmuv3(std::uint64_t word_0, std::uint64_t word_1) noexcept {
  FirstStage out;
  out.kind_ = Nesting::smmuv3;
  out.base_ = word_0 & 0x000f'ffff'ffff'ffc0;
  const auto config = static_cast<unsigned>(word_0 >> 1 & 7);
  out.mode_ = config == 4 ? Mode::bypass : Mode::abort;
  if (!bit(word_0, 0)) out.mode_ = Mode::abort;
  // With several contexts (S1CDMax) a transaction without substream uses the first, if S1DSS says so.
  const bool one_context = (word_0 >> 59) == 0;
  const bool linear = (word_0 >> 4 & 3) == 0;
  if (bit(word_0, 0) && config == 5 && (one_context || (linear && (word_1 & 3) == 2))) out.mode_ = Mode::translate;
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
  if (kind_ != Nesting::smmuv3) return {base_, levels_, bytes_at(levels_) - 1};
  const std::uint64_t word = context_word(parent, base_, 0);
  const auto unused_bits = static_cast<unsigned>(word & 63);  // T0SZ
  const bool granule_4k = (word >> 6 & 3) == 0;
  // V, AA64, and a first half that is walked (EPD0); the second half is not ours (EPD1).
  if (!bit(word, 31) || !bit(word, 41) || bit(word, 14) || !bit(word, 30) || !granule_4k) return {};
  if (unused_bits < 16 || unused_bits > 39) return {};
  const unsigned address_bits = 64 - unused_bits;
  return {context_word(parent, base_, 1) & 0x000f'ffff'ffff'fff0, (address_bits - 12 + 8) / 9,
          (std::uint64_t{1} << address_bits) - 1};
}

std::uint16_t FirstStage::asid(const PageTable& parent) const noexcept {
  return kind_ == Nesting::smmuv3 ? static_cast<std::uint16_t>(context_word(parent, base_, 0) >> 48) : std::uint16_t{0};
}

Translation FirstStage::walk(const PageTable& parent, Iova address, Walk& known) const noexcept {
  const auto fail = [&](StageFault why) {
    known.table = nullptr;  // nothing is remembered of a walk that found nothing
    known.fault = why;
    return Translation{};
  };
  known.fault = StageFault::none;
  if (mode_ == Mode::abort) return fail(StageFault::aborted);
  if (mode_ == Mode::bypass) {
    const Translation found = parent.walk(address);
    known.run = {address.value & ~std::uint64_t{4095}, address.value | 4095, address.value & ~std::uint64_t{4095}, 4096,
                 Access::read_write};
    return found.memory == nullptr ? fail(StageFault::second_stage) : found;
  }
  if (known.root.levels == 0) known.root = root(parent);
  if (known.root.levels == 0) return fail(StageFault::configuration);
  if (address.value > known.root.last) return fail(StageFault::translation);
  const bool arm = kind_ == Nesting::smmuv3;
  const std::uint64_t frame = arm ? 0x0000'ffff'ffff'f000 : 0x000f'ffff'ffff'f000;
  unsigned level = 0;
  bool writable = true;
  const std::byte*& table = known.table;
  if (table == nullptr) {
    level = known.root.levels - 1;
    table = reach(parent, known.root.address);
  }
  while (true) {
    if (table == nullptr) return fail(StageFault::second_stage);
    const std::uint64_t entry = word_at(table + (address.value >> (12 + 9 * level) & 511) * 8);
    bool leaf = level == 0;
    if (arm) {
      const bool second = bit(entry, 1);
      if (!bit(entry, 0) || (leaf && !second)) return fail(StageFault::translation);
      leaf = leaf || !second;
      if (leaf && !bit(entry, 10)) return fail(StageFault::access_flag);
      if (leaf && !bit(entry, 6)) return fail(StageFault::permission);  // a device's accesses are unprivileged
      writable = writable && (!leaf || !bit(entry, 7));
    } else {
      if (!bit(entry, 0)) return fail(StageFault::translation);
      if (!bit(entry, 2)) return fail(StageFault::permission);  // requests are user requests
      leaf = leaf || bit(entry, 7);
      writable = writable && bit(entry, 1);
    }
    if (!leaf) {
      table = reach(parent, entry & frame);
      --level;
      continue;
    }
    if (level > 2) return fail(StageFault::translation);
    // A contiguous hint vouches for all sixteen: what the others lead to is taken from this one.
    const std::uint64_t entry_bytes = bytes_at(level);
    const std::uint64_t run_bytes = arm && bit(entry, 52) ? 16 * entry_bytes : entry_bytes;
    const std::uint64_t start = address.value & ~(run_bytes - 1);
    const std::uint64_t base = entry & frame & ~(run_bytes - 1);
    known.run = {start, start + (run_bytes - 1), base, entry_bytes, writable ? Access::read_write : Access::read};
    Translation found = parent.walk(Iova{base + (address.value - start)});
    found.access = static_cast<Access>(static_cast<unsigned>(found.access) & static_cast<unsigned>(known.run.access));
    found.entry = nullptr;
    if (level != 0) table = nullptr;
    if (found.memory == nullptr) return fail(StageFault::second_stage);
    return found;
  }
}

}  // namespace iovane::backends::model
