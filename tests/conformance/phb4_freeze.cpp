// POWER9's host bridge (PHB4) has, for each partitionable endpoint (PE), a bit in the error vector (PEEV) and two state
// words (PEST A: registers, PEST B: DMA). On an error the bridge sets them; firmware reads them when the kernel asks
// for a state and clears them to unfreeze. QEMU's bridge keeps what is written there and never sets anything itself, so
// this does: through the bridge's registers, at the address that the device tree names, by /dev/mem.
#include "conformance/phb4_freeze.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>

namespace iovane::test {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t registers_length = 0x1000;
constexpr std::size_t reg_table_select = 0x220;
constexpr std::size_t reg_table_data = 0x228;
constexpr std::uint64_t table_pest_a = 7;
constexpr std::uint64_t table_pest_b = 8;
constexpr std::uint64_t table_peev = 20;
constexpr std::uint64_t frozen = std::uint64_t{1} << 63;

std::uint64_t big_endian(std::uint64_t value) {
  return std::endian::native == std::endian::big ? value : __builtin_bswap64(value);
}

std::string contents(const fs::path& path) {
  std::ifstream file{path, std::ios::binary};
  return {std::istreambuf_iterator<char>{file}, {}};
}

/// The property's first 64-bit number.
std::optional<std::uint64_t> number(const fs::path& property) {
  const std::string bytes = contents(property);
  std::uint64_t value = 0;
  if (bytes.size() < sizeof value) return std::nullopt;
  std::memcpy(&value, bytes.data(), sizeof value);
  return big_endian(value);
}

/// Where the registers of PCI domain `domain` are, in physical memory.
std::optional<std::uint64_t> registers_of(std::uint64_t domain) {
  std::error_code ignored;
  for (const auto& node : fs::directory_iterator{"/proc/device-tree", ignored}) {
    if (number(node.path() / "ibm,opal-phbid") != domain) continue;
    if (contents(node.path() / "compatible").find("ibm,ioda3-phb") != std::string::npos)
      return number(node.path() / "reg");
  }
  return std::nullopt;
}

class Phb4 {
 public:
  explicit Phb4(std::uint64_t at) {
    const int memory = ::open("/dev/mem", O_RDWR | O_SYNC | O_CLOEXEC);
    if (memory < 0) return;
    const auto protection = PROT_READ | PROT_WRITE;
    void* const mapped = ::mmap(nullptr, registers_length, protection, MAP_SHARED, memory, static_cast<off_t>(at));
    ::close(memory);
    if (mapped != MAP_FAILED) registers_ = static_cast<volatile std::byte*>(mapped);
  }
  Phb4(const Phb4&) = delete;
  Phb4& operator=(const Phb4&) = delete;
  ~Phb4() {
    if (registers_ != nullptr) ::munmap(const_cast<std::byte*>(registers_), registers_length);
  }
  bool ok() const { return registers_ != nullptr; }

  void set(std::uint64_t table, std::uint64_t index, std::uint64_t value) {
    store(reg_table_select, table << 48 | index);
    store(reg_table_data, value);
  }

 private:
  void store(std::size_t at, std::uint64_t value) {
    *reinterpret_cast<volatile std::uint64_t*>(registers_ + at) = big_endian(value);
    __sync_synchronize();  // the second store selects what the first one named
  }
  volatile std::byte* registers_ = nullptr;
};

}  // namespace

bool freeze_in_phb4(const std::string& address) {
  const std::string endpoint = contents(fs::path{"/sys/bus/pci/devices"} / address / "eeh_pe_config_addr");
  const auto at = registers_of(std::strtoull(address.c_str(), nullptr, 16));
  if (endpoint.empty() || !at) return false;
  Phb4 bridge{*at};
  if (!bridge.ok()) return false;
  const std::uint64_t pe = std::strtoull(endpoint.c_str(), nullptr, 16);
  bridge.set(table_pest_a, pe, frozen);
  bridge.set(table_pest_b, pe, frozen);
  bridge.set(table_peev, pe / 64, frozen >> (pe % 64));
  return true;
}

}  // namespace iovane::test
