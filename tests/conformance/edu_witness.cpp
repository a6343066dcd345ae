#include "conformance/edu_witness.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <thread>

#include "backends/kernel_call.hpp"
#include "backends/uapi/vfio.hpp"
#include "conformance/memory.hpp"

namespace iovane::test {
namespace {

namespace vfio = backends::uapi::vfio;
using namespace backends;

constexpr std::uint64_t edu_identification = 0x010000ed;
constexpr std::size_t reg_identification = 0x00;
constexpr std::size_t reg_source = 0x80;
constexpr std::size_t reg_destination = 0x88;
constexpr std::size_t reg_count = 0x90;
constexpr std::size_t reg_command = 0x98;
constexpr std::uint64_t command_start = 1;
constexpr std::uint64_t command_to_memory = 2;
constexpr std::uint64_t edu_buffer = 0x40000;

class EduWitness final : public Witness {
 public:
  EduWitness(Kernel& kernel, BackendSpace& space, volatile std::byte* registers, std::size_t length, bool swapped)
      : kernel_{kernel}, space_{space}, registers_{registers}, length_{length}, swapped_{swapped} {}
  ~EduWitness() override { kernel_.unmap_memory(const_cast<std::byte*>(registers_), length_); }

  std::vector<std::byte> read(Iova from, std::size_t length) override {
    // A known filling first: a transfer that fails must not leave what an earlier one brought.
    scratch_.fill(0xa5);
    with_scratch([&] { transfer(witness_scratch.value, edu_buffer, length, false); });
    transfer(from.value, edu_buffer, length, false);
    scratch_.fill(0);
    with_scratch([&] { transfer(edu_buffer, witness_scratch.value, length, true); });
    const auto bytes = scratch_.bytes().first(length);
    return {bytes.begin(), bytes.end()};
  }

  void write(Iova to, std::span<const std::byte> bytes) override {
    std::memcpy(scratch_.data(), bytes.data(), bytes.size());
    with_scratch([&] { transfer(witness_scratch.value, edu_buffer, bytes.size(), false); });
    transfer(edu_buffer, to.value, bytes.size(), true);
  }

 private:
  template <typename F>
  void with_scratch(F&& f) {
    const auto range = *IovaRange::from_length(witness_scratch, scratch_.length());
    BackendOp op{.kind = OpKind::map, .access = Access::read_write, .range = range, .memory = scratch_.address()};
    BackendOpResult result;
    space_.execute({&op, 1}, {&result, 1});
    ASSERT_TRUE(result.error.ok()) << result.error.message();
    f();
    op.kind = OpKind::unmap;
    space_.execute({&op, 1}, {&result, 1});
    ASSERT_TRUE(result.error.ok()) << result.error.message();
  }

  void set(std::size_t at, std::uint64_t value) {
    *reinterpret_cast<volatile std::uint64_t*>(registers_ + at) = swapped_ ? __builtin_bswap64(value) : value;
  }
  std::uint64_t get(std::size_t at) {
    const std::uint64_t raw = *reinterpret_cast<volatile std::uint64_t*>(registers_ + at);
    return swapped_ ? __builtin_bswap64(raw) : raw;
  }

  void transfer(std::uint64_t source, std::uint64_t destination, std::size_t length, bool to_memory) {
    set(reg_source, source);
    set(reg_destination, destination);
    set(reg_count, length);
    set(reg_command, command_start | (to_memory ? command_to_memory : 0));
    const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds{20};
    // Sleeping first: a transfer takes 100 ms, and the system call keeps later reads of memory behind the device's
    // "done".
    do {
      std::this_thread::sleep_for(std::chrono::milliseconds{2});
      ASSERT_LT(std::chrono::steady_clock::now(), give_up) << "edu does not finish its transfer";
    } while ((get(reg_command) & command_start) != 0);
  }

  Kernel& kernel_;
  BackendSpace& space_;
  volatile std::byte* registers_;
  std::size_t length_;
  bool swapped_;
  Memory scratch_{1};
};

/// Memory decoding and bus mastering: bits 1 and 2 of the PCI command register.
bool enable(Kernel& kernel, int device) {
  vfio::RegionInfo config{.index = vfio::pci_config_region_index};
  if (call(kernel, device, config) != 0) return false;
  std::uint16_t command = 0;
  const auto at = static_cast<off_t>(config.offset + 4);
  if (::pread(device, &command, sizeof command, at) != sizeof command) return false;
  command = static_cast<std::uint16_t>(command | 6U);
  return ::pwrite(device, &command, sizeof command, at) == sizeof command;
}

}  // namespace

std::unique_ptr<Witness> make_edu_witness(Kernel& kernel, BackendSpace& space, const AttachedDevice& device) {
  if (!enable(kernel, device.device_fd)) return nullptr;
  vfio::RegionInfo bar{.index = vfio::pci_bar0_region_index};
  if (call(kernel, device.device_fd, bar) != 0) return nullptr;
  const auto mapped = kernel.map_memory(device.device_fd, bar.offset, bar.size, true);
  if (!mapped) return nullptr;
  auto* const registers = static_cast<volatile std::byte*>(*mapped);
  const std::uint32_t id = *reinterpret_cast<volatile std::uint32_t*>(registers + reg_identification);
  const bool swapped = __builtin_bswap32(id) == edu_identification;
  if (!swapped && id != edu_identification) {
    kernel.unmap_memory(*mapped, bar.size);
    return nullptr;
  }
  return std::make_unique<EduWitness>(kernel, space, registers, bar.size, swapped);
}

}  // namespace iovane::test
