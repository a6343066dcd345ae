// Hypercalls and window calls with any arguments.
#include <array>

#include "fuzz_world.hpp"
#include "viommu/papr.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace iovane;
  using namespace iovane::viommu;
  static const GuestRam ram{1U << 20};
  GuestMemory memory;
  if (!memory.add(ram.config())) std::abort();
  Tape tape{{data, size}};
  const auto setup = tape.take<std::uint8_t>();
  PaprTce papr{memory, nullptr};
  PhbConfig config;
  config.dma32_bytes = 1U << 24;
  config.domain.nodes_max = 48;
  config.domain.exact = (setup & 1) != 0;
  config.table_bytes_max = 1U << 24;
  if (!papr.add_phb(config)) std::abort();
  RecordingTarget host;
  host.may_cut = (setup & 2) != 0;
  if (!papr.add_device(0, &host)) std::abort();
  unsigned operations = 0;
  if ((setup & 4) != 0)
    host.fault = [&](const HostOp& op) {
      return op.kind == HostOp::Kind::map && ++operations % 7 == 0 ? make_error(Errc::entry_limit, Stage::map, "full")
                                                                   : Error{};
    };
  for (int calls = 0; !tape.empty() && calls < 128; ++calls) {
    const auto kind = tape.take<std::uint8_t>();
    std::uint32_t liobn = config.liobn + (kind >> 4 & 1U);
    if (kind >= 0xf8) liobn = tape.take<std::uint32_t>();
    const std::uint64_t base = (kind & 0x10U) != 0 ? config.dma64_address : 0;
    switch (kind % 8) {
      case 0:
      case 1:
        papr.call_and_wait(hcall::put_tce, std::array<std::uint64_t, 4>{liobn, base + tape.address(),
                                                                        tape.address() | (kind >> 5 & 3U), 0});
        break;
      case 2: {
        const std::uint64_t list = tape.address();
        for (std::uint64_t i = 0; i < 8; ++i)
          if (list < (1U << 20) - 64 && (list & 7) == 0) ram.store(list + i * 8, __builtin_bswap64(tape.address() | 3));
        papr.call_and_wait(hcall::put_tce_indirect, std::array<std::uint64_t, 4>{liobn, base + tape.address(), list,
                                                                                 tape.take<std::uint16_t>()});
        break;
      }
      case 3:
        papr.call_and_wait(hcall::stuff_tce,
                           std::array<std::uint64_t, 4>{liobn, base + tape.address(), tape.take<std::uint8_t>(),
                                                        tape.take<std::uint16_t>()});
        break;
      case 4: {
        const auto answer =
            papr.call_and_wait(hcall::get_tce, std::array<std::uint64_t, 4>{liobn, base + tape.address(), 0, 0});
        if (answer.status != hcall::success && answer.value != 0) fuzz_failed("a refused read has a value");
        break;
      }
      case 5: papr.create_window(0, tape.take<std::uint8_t>() % 40, tape.take<std::uint8_t>() % 70); break;
      case 6: papr.remove_window(liobn); break;
      default:
        if ((kind & 0x20U) != 0) papr.reset_windows(0);
        papr.call_and_wait(tape.take<std::uint16_t>(),
                           std::array<std::uint64_t, 4>{liobn, tape.address(), tape.address(), tape.address()});
        break;
    }
    if (calls % 8 == 7) check_mirrored(*papr.domain(0), host);
  }
  check_mirrored(*papr.domain(0), host);
  static_cast<void>(papr.remove_device(0, &host));
  if (!host.held().empty()) fuzz_failed("something is left on the host");
  return 0;
}
