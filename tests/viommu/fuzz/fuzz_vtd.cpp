// Root tables, page tables and descriptors of any content, in a RAM so small that pointers meet each other: cycles,
// self references, tables that are their own queue. Between notifications the guest rewrites some of it.
#include "fuzz_world.hpp"
#include "viommu/vtd.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace iovane;
  using namespace iovane::viommu;
  constexpr std::uint64_t ram_bytes = 64U << 10;
  static const GuestRam ram{ram_bytes};
  std::memset(ram.at(0), 0, ram_bytes);
  GuestMemory memory;
  if (!memory.add(ram.config())) std::abort();
  Tape tape{{data, size}};
  const auto setup = tape.take<std::uint8_t>();
  const bool scalable = (setup & 1) != 0;
  VtdConfig config;
  config.capabilities.second_levels_mask = 7U << 3;
  config.capabilities.guest_address_width = 57;
  config.capabilities.scalable = scalable;
  config.capabilities.first_level = scalable;
  config.capabilities.first_5_level = scalable;
  config.domain.nodes_max = 16;
  config.domain.exact = (setup & 2) != 0;
  config.domains_max = 3;
  config.work_per_call = 1U << 11;
  VtdEvents events;
  RecordingTarget host;
  Vtd unit{memory, config, events};
  // Words of the tape as table entries: most point into RAM, so that walks go somewhere.
  const auto write_words = [&](unsigned count) {
    for (unsigned i = 0; i < count && !tape.empty(); ++i) {
      const std::uint64_t at = (tape.take<std::uint16_t>() * 8ULL) % ram_bytes;
      const auto flags = tape.take<std::uint16_t>();
      std::uint64_t word = 0;
      switch (flags >> 13) {
        case 0: word = tape.take<std::uint64_t>(); break;
        case 1: word = ~std::uint64_t{0}; break;
        default: word = std::uint64_t{flags & 0xfU} << 12 | (flags >> 4 & 0xffU); break;
      }
      if ((flags & 0x1000U) != 0) {  // a whole table of it
        for (std::uint64_t p = at & ~0xfffULL, j = 0; j < 512; ++j)
          ram.store(p + j * 8, word + (j % 3 == 0 ? 0 : j << 12));
      } else {
        ram.store(at, word);
      }
    }
  };
  write_words(48);
  // A way in that works, unless the tape has overwritten it: device 8, a four-level table at 0x3000 or a PASID table.
  if ((setup & 4) != 0) {
    ram.store(0x1000, 0x2001);
    ram.store(0x2000 + 8 * (scalable ? 32 : 16), scalable ? 0x4001 : 0x3001);
    if (!scalable) ram.store(0x2008 + 8 * 16, 2 | 1 << 8);
    ram.store(0x4000, 0x5001);
    if (scalable) ram.store(0x5000, 1 | 1 << 6), ram.store(0x5008, 1), ram.store(0x5010, 0x3000);
  }
  unit.set_queue(0xf000 | ((setup & 8) != 0 && scalable ? 0x800U : 0U));
  unit.set_root_table(0x1000 | (scalable ? 0x400U : 0U));
  unit.set_translation(true);
  static_cast<void>(unit.add_endpoint(8, std::nullopt, &host));
  std::uint64_t tail = 0;
  for (int rounds = 0; !tape.empty() && rounds < 12; ++rounds) {
    write_words(tape.take<std::uint8_t>() % 8);
    const unsigned count = tape.take<std::uint8_t>() % 6;
    for (unsigned i = 0; i < count; ++i) {
      const auto kind = tape.take<std::uint8_t>();
      std::uint64_t low = 0;
      std::uint64_t high = 0;
      switch (kind % 8) {
        case 0: low = tape.take<std::uint64_t>(), high = tape.take<std::uint64_t>(); break;
        case 1: low = 0x32 | 1U << 16, high = tape.address() & ~0xfc0ULL; break;
        case 2: low = 0x22 | 1U << 16; break;
        case 3: low = 0x12; break;
        case 4: low = 0x11 | (kind & 0x20U); break;
        case 5: low = 0x25 | 7ULL << 32, high = tape.address() & ~3ULL; break;
        case 6: low = 0x36 | 1U << 16, high = tape.address() & ~0xfc0ULL; break;
        default: low = 0x37; break;
      }
      ram.store(0xf000 + tail, low);
      ram.store(0xf008 + tail, high);
      tail = (tail + 16) % 4096;
    }
    unit.write_tail((setup & 16) != 0 ? tape.take<std::uint32_t>() : tail);
    int calls = 0;
    while (unit.advance() == Progress::pending)
      if (++calls > 100000) fuzz_failed("a notification has no end");
    if (const auto* domain = unit.domain_of(8, std::nullopt); domain != nullptr) {
      check_mirrored(*domain, host);
    } else if (!host.held().empty()) {
      fuzz_failed("a blocked device's host holds mappings");
    }
    static_cast<void>(unit.fault_of(8, std::nullopt, tape.address(), (setup & 32) != 0));
    unit.clear_queue_error();
    unit.finish();
  }
  static_cast<void>(unit.remove_endpoint(8, std::nullopt));
  if (!host.held().empty()) fuzz_failed("something is left on the host");
  return 0;
}
