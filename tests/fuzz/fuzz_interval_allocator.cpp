// A tape of operations on the IOVA allocator and on the plain reference: any difference is a fault.
//
// The first byte chooses windows, direction and magazines; then each operation is one byte and its arguments. A tape
// that ends gives zeroes. The allocator lives for all inputs of one configuration, emptied after each: what one tape
// leaves behind in runs and magazines, the next one meets.
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <span>
#include <vector>

#include "iova/interval_allocator.hpp"
#include "support/reference_intervals.hpp"

namespace {

using namespace iovane;
using iova::AllocateOptions;
using iova::Direction;
using iova::IntervalAllocator;

constexpr std::uint64_t page = 4096;

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "fuzz: %s\n", what);
  std::abort();
}

IovaRange pages(std::uint64_t first, std::uint64_t count) {
  return {Iova{first * page}, Iova{first * page + (count * page - 1)}};
}

struct Tape {
  std::span<const std::uint8_t> rest;
  std::uint64_t byte() {
    if (rest.empty()) return 0;
    const std::uint8_t value = rest.front();
    rest = rest.subspan(1);
    return value;
  }
};

const std::vector<std::vector<IovaRange>>& window_sets() {
  static const std::vector<std::vector<IovaRange>> sets{
      {pages(0, 40)},
      {pages(3, 7), pages(11, 1), pages(17, 30), pages(64, 200)},
      {{Iova{~std::uint64_t{0} - 100 * page + 1}, iova_max}},
      {{Iova{0}, Iova{0xfedf'ffff}}, {Iova{0xfef0'0000}, Iova{(std::uint64_t{1} << 48) - 1}}},
  };
  return sets;
}

class World {
 public:
  World(std::vector<IovaRange> windows, Direction direction, bool magazines) : windows_{std::move(windows)} {
    auto made = IntervalAllocator::create(
        {.windows = windows_, .direction = direction, .metadata_limit = Bytes{16U << 20}, .magazines = magazines});
    check(made.has_value(), "no allocator");
    allocator_ = std::move(*made);
  }

  void run(Tape tape) {
    reference_ = test::ReferenceIntervals{page};
    reference_.set_windows(windows_);
    for (unsigned steps = 0; !tape.rest.empty() && steps < 300; ++steps) step(tape);
    std::vector<IovaRange> seen;
    allocator_->for_each([&](const IovaRange& r) { seen.push_back(r); });
    check(seen == reference_.all(), "iteration differs");
    check(allocator_->stats().live_intervals == reference_.count(), "the count of live intervals differs");
    for (const IovaRange& r : reference_.all()) check(allocator_->free(r).has_value(), "a live interval is not freed");
    check(allocator_->set_usable(windows_).has_value(), "the windows cannot be set back");
    allocator_->trim();
    check(allocator_->stats().idle.value == 0, "something stays idle after trim()");
  }

 private:
  // Around one of the windows' ends, where allocations are.
  std::uint64_t some_page(Tape& tape) {
    const IovaRange& window = windows_[tape.byte() % windows_.size()];
    const std::uint64_t first = window.start.value / page;
    const std::uint64_t last = window.last.value / page;
    const std::uint64_t step = tape.byte();
    return (tape.byte() & 1) != 0 ? first + std::min(step, last - first) : last - std::min(step, last - first);
  }
  IovaRange some_range(Tape& tape) {
    const std::uint64_t first = some_page(tape);
    const std::uint64_t room = ~std::uint64_t{0} / page - first + 1;
    return pages(first, std::min<std::uint64_t>(1 + tape.byte() % 9, room));
  }

  void step(Tape& tape) {
    switch (tape.byte() % 8) {
      case 0:
      case 1: return allocate(tape);
      case 2:
        if (reference_.count() > 0) {
          const IovaRange r = reference_.at(tape.byte() % reference_.count());
          check(allocator_->free(r).has_value(), "a live interval is not freed");
          reference_.remove(r);
        }
        return;
      case 3: {
        const IovaRange r = some_range(tape);
        const bool may = reference_.usable(r) && !reference_.overlap(r);
        check(allocator_->claim(r).has_value() == may, "claim differs");
        if (may) reference_.add(r);
        return;
      }
      case 4: {
        IovaRange r = some_range(tape);
        r.start.value += tape.byte() % 3;  // mostly not whole granules
        if (reference_.has(r)) return;
        check(!allocator_->free(r), "something that is not live was freed");
        return;
      }
      case 5: {
        const Iova a{some_page(tape) * page + tape.byte()};
        check(allocator_->find(a) == reference_.find(a), "find differs");
        return;
      }
      case 6: return narrow(tape);
      default: allocator_->trim(); return;
    }
  }

  void allocate(Tape& tape) {
    const std::uint64_t length = (1 + tape.byte() % 20) * page;
    AllocateOptions options;
    const std::uint64_t wish = tape.byte();
    if ((wish & 3) == 1) options.align = Bytes{page << ((wish >> 2) % 7)};
    if ((wish & 3) == 2) options.ceiling = Iova{some_page(tape) * page + 5};
    const auto got = allocator_->allocate(Bytes{length}, options);
    if (!got) {
      check(got.error().code == Errc::iova_exhausted, "allocate fails strangely");
      check(!reference_.fits(length, options.align.value, options.ceiling), "there was room");
      return;
    }
    check(got->length().value == length && got->last <= options.ceiling, "not what was asked for");
    check(got->start.value % std::max(options.align.value, page) == 0, "not aligned");
    check(reference_.usable(*got) && !reference_.overlap(*got), "not free or not usable");
    reference_.add(*got);
  }

  // Other windows for a while: what is live outside of them is reported and stays.
  void narrow(Tape& tape) {
    std::vector<IovaRange> windows = windows_;
    const std::uint64_t dice = tape.byte();
    if ((dice & 1) != 0) windows.erase(windows.begin() + static_cast<long>((dice >> 1) % windows.size()));
    if ((dice & 64) != 0 && !windows.empty() && windows.back().span() > 8 * page) windows.back().last.value -= 8 * page;
    const auto stranded = allocator_->set_usable(windows);
    check(stranded.has_value(), "windows are refused");
    reference_.set_windows(windows);
    std::vector<IovaRange> expected;
    for (const IovaRange& r : reference_.all())
      if (!reference_.usable(r)) expected.push_back(r);
    check(*stranded == expected, "what is stranded differs");
  }

  std::vector<IovaRange> windows_;
  std::unique_ptr<IntervalAllocator> allocator_;
  test::ReferenceIntervals reference_{page};
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static std::array<std::unique_ptr<World>, 16> worlds;
  Tape tape{{data, size}};
  const std::uint64_t which = tape.byte() % worlds.size();
  if (!worlds[which])
    worlds[which] = std::make_unique<World>(
        window_sets()[which % 4], (which & 4) != 0 ? Direction::bottom_up : Direction::top_down, (which & 8) == 0);
  worlds[which]->run(tape);
  return 0;
}
