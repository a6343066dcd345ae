// Requests of any shape and content, several per notification, with a host that fails now and then.
#include <array>
#include <vector>

#include "fuzz_world.hpp"
#include "viommu/virtio_iommu.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace iovane;
  using namespace iovane::viommu;
  static const GuestRam ram{1U << 20};
  GuestMemory memory;
  if (!memory.add(ram.config())) std::abort();
  Tape tape{{data, size}};
  const auto setup = tape.take<std::uint8_t>();
  RecordingTarget host;
  RecordingTarget other{"other"};
  VirtioIommuConfig config;
  config.bypass_at_boot = (setup & 1) != 0;
  if ((setup & 2) != 0) config.input_range = {Iova{0}, Iova{0xff'ffff'ffff}};
  config.domain.nodes_max = 32;
  config.domains_max = 4;
  config.requests_max = 16;
  VirtioIommu device{memory, config};
  device.set_features(device.features());
  static_cast<void>(device.add_endpoint(0, &host, {{{Iova{0x8000}, Iova{0x8fff}}, true}}));
  static_cast<void>(device.add_endpoint(1, &other, {}));
  static_cast<void>(device.add_endpoint(2, &host, {}));
  unsigned operations = 0;
  if ((setup & 4) != 0)
    other.fault = [&](const HostOp& op) {
      return op.kind != HostOp::Kind::unmap && ++operations % 5 == 0 ? make_error(Errc::entry_limit, Stage::map, "full")
                                                                     : Error{};
    };
  std::array<std::array<std::byte, 600>, 8> out{};
  std::array<std::vector<std::byte>, 8> in;
  for (int rounds = 0; !tape.empty() && rounds < 64; ++rounds) {
    std::vector<VirtioIommu::Request> requests;
    const std::size_t count = 1 + tape.take<std::uint8_t>() % in.size();
    for (std::size_t i = 0; i < count; ++i) {
      auto& bytes = in[i];
      bytes.clear();
      const auto shape = tape.take<std::uint8_t>();
      const auto put = [&](std::uint64_t value, std::size_t n) {
        for (std::size_t b = 0; b < n; ++b) bytes.push_back(static_cast<std::byte>(b < 8 ? value >> (8 * b) : 0));
      };
      if (shape >= 0xf0) {
        for (const std::uint8_t b : tape.take_bytes(shape & 0x7fU)) bytes.push_back(static_cast<std::byte>(b));
      } else {
        put(1 + shape % 5, 4);
        switch (1 + shape % 5) {
          case 1:
            put(shape >> 4 & 3U, 4), put(tape.take<std::uint8_t>() & 3U, 4), put((shape & 0x80U) != 0, 4), put(0, 4);
            break;
          case 2: put(shape >> 4 & 3U, 4), put(tape.take<std::uint8_t>() & 3U, 4), put(0, 8); break;
          case 3: {
            const std::uint64_t start = tape.address() & ~0xfffULL;
            put(shape >> 4 & 3U, 4), put(start, 8), put(start + (tape.address() | 0xfff), 8),
                put(tape.address() & ~0xfffULL, 8);
            put(tape.take<std::uint8_t>() & 7U, 4);
            break;
          }
          case 4: {
            const std::uint64_t start = tape.address();
            put(shape >> 4 & 3U, 4), put(start, 8), put(start + tape.address(), 8), put(0, 4);
            break;
          }
          default: put(tape.take<std::uint8_t>() & 3U, 4), put(0, 64); break;
        }
      }
      requests.push_back({bytes, std::span{out[i]}.first(bytes.size() == 72 ? 516 : 4), i});
    }
    if (device.handle(requests) != requests.size()) fuzz_failed("a notification that fits was not taken");
    device.finish();
    std::array<VirtioIommu::Answer, 8> answers{};
    if (device.take_answers(answers) != requests.size()) fuzz_failed("an answer is missing");
    for (const auto* target : {&host, &other}) {
      const ShadowDomain* holder = nullptr;
      for (std::uint32_t id = 0; id < 4; ++id)
        if (const auto* d = device.domain(id); d != nullptr && d->attached(*target)) holder = d;
      if (holder != nullptr) check_mirrored(*holder, *target);
      if (holder == nullptr && !config.bypass_at_boot && !target->held().empty())
        fuzz_failed("a detached endpoint's host holds mappings");
    }
  }
  for (std::uint32_t id = 0; id < 3; ++id) static_cast<void>(device.remove_endpoint(id));
  if (!host.held().empty() || !other.held().empty()) fuzz_failed("something is left on the host");
  return 0;
}
