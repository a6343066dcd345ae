// Every TCE hypercall of a real guest's boot and disk I/O, as QEMU logged it, through the PAPR front end and the sPAPR
// backend into the real kernel's table; samples of the translations that its devices made are repeated by DMA.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <string_view>

#include "backends/open.hpp"
#include "backends/system_kernel.hpp"
#include "conformance/edu_witness.hpp"
#include "viommu/backend_target.hpp"
#include "viommu/papr.hpp"

namespace iovane::test {
namespace {

using namespace viommu;

constexpr std::size_t ram_bytes = 768U << 20;  // the recorded guest's highest entry is below
constexpr std::uint64_t buid = 0x8000'0000'2000'0000;

std::uint64_t number_after(std::string_view line, std::string_view key) {
  const std::size_t found = line.find(key);
  return found == std::string_view::npos
             ? 0
             : std::strtoull(std::string{line.substr(found + key.size(), 20)}.c_str(), nullptr, 0);
}

TEST(PaprReplayLab, the_kernels_table_is_what_the_guest_asked_for) {
  std::ifstream log{"/viommu/papr-nvme-a.log"};
  if (!log) GTEST_SKIP() << "/viommu/papr-nvme-a.log is not here: give it to tools/lab, unpacked, with --file";
  auto* const ram =
      static_cast<std::byte*>(::mmap(nullptr, ram_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(ram, MAP_FAILED);
  for (std::uint64_t i = 0; i < ram_bytes; i += 4096) std::memcpy(ram + i, &i, sizeof i);  // a page knows its place
  GuestMemory memory;
  ASSERT_TRUE(memory.add({.gpa = 0, .length = Bytes{ram_bytes}, .address = ram}));
  backends::SystemKernel kernel;
  auto backend = backends::open_backend(kernel, {.name = "spapr", .descriptor = {}});
  ASSERT_TRUE(backend) << backend.error().message();
  auto space = (*backend)->create_space({});
  ASSERT_TRUE(space) << space.error().message();
  std::string first{std::getenv("IOVANE_LAB_DEVICES")};
  first.resize(std::min(first.size(), first.find(',')));
  const auto device = (*space)->attach({.pci_address = first});
  ASSERT_TRUE(device) << device.error().message();
  auto witness = make_edu_witness(kernel, **space, *device);
  ASSERT_NE(witness, nullptr);
  {
    BackendTarget target{"container", **space};
    for (const Region& region : memory.regions()) {
      const auto added = target.add_region(region);
      ASSERT_TRUE(added) << added.error().message();
    }
    PaprTce papr{memory, nullptr};
    PhbConfig phb;
    phb.buid = buid;
    ASSERT_TRUE(papr.add_phb(phb));
    const auto added = papr.add_device(buid, &target);
    ASSERT_TRUE(added) << added.error().message();
    std::size_t calls = 0, wrong = 0, translations = 0, transfers = 0;
    std::map<std::uint64_t, std::uint64_t> entries;  // by bus page, where the log has the entry itself
    for (std::string text; std::getline(log, text);) {
      const std::string_view line{text};
      const std::uint64_t bus = number_after(line, "ioba=");
      const std::uint64_t liobn = number_after(line, "liobn=");
      if (line.substr(0, 19) == "spapr_iommu_pci_put") {
        const std::uint64_t tce = number_after(line, "tce=");
        const auto answer = papr.call_and_wait(hcall::put_tce, std::array<std::uint64_t, 4>{liobn, bus, tce, 0});
        wrong += answer.status != static_cast<std::int64_t>(number_after(line, "ret=")) ? 1 : 0;
        entries[bus] = tce;
        ++calls;
      } else if (line.substr(0, 21) == "spapr_iommu_pci_stuff") {
        const std::uint64_t count = number_after(line, "npages=");
        const std::uint64_t start = bus - count * 4096;  // the log has the address that was reached
        const auto answer = papr.call_and_wait(
            hcall::stuff_tce, std::array<std::uint64_t, 4>{liobn, start, number_after(line, "tcevalue="), count});
        wrong += answer.status != 0 ? 1 : 0;
        entries.erase(entries.lower_bound(start), entries.lower_bound(start + count * 4096));
        ++calls;
      } else if (line.substr(0, 24) == "spapr_iommu_pci_indirect") {
        const std::uint64_t list = number_after(line, "tcelist=");
        const std::uint64_t last = number_after(line, "iobaN=");
        const std::uint64_t tce = number_after(line, "tceN=");  // of the list, only its last entry was logged
        for (std::uint64_t i = 0; i <= last; ++i) {
          const std::uint64_t entry = __builtin_bswap64(tce - (last - i) * 4096);
          std::memcpy(ram + list + 8 * i, &entry, sizeof entry);
          entries.erase(bus + i * 4096);
        }
        entries[bus + last * 4096] = tce;
        const auto answer =
            papr.call_and_wait(hcall::put_tce_indirect, std::array<std::uint64_t, 4>{liobn, bus, list, last + 1});
        wrong += answer.status != 0 ? 1 : 0;
        ++calls;
        std::memcpy(ram + list, &list, sizeof list);
      } else if (line.substr(0, 17) == "spapr_iommu_xlate") {
        const std::size_t space_at = line.find(' ', line.find("liobn="));
        const std::uint64_t address = std::strtoull(text.c_str() + space_at + 1, nullptr, 16);
        const auto entry = entries.find(address & ~0xfffULL);
        ++translations;
        if (translations % 2000 != 0 || entry == entries.end() || (entry->second & 1U) == 0) continue;
        std::uint64_t place = 0;
        const auto got = witness->read(Iova{address & ~0xfffULL}, sizeof place);
        std::memcpy(&place, got.data(), sizeof place);
        EXPECT_EQ(place, number_after(line, "-> ") & ~0xfffULL) << text;
        ++transfers;
      }
    }
    EXPECT_EQ(wrong, 0U);
    EXPECT_EQ(calls, 19146U);
    EXPECT_GT(transfers, 5U);
    std::printf("%zu hypercalls, %zu translations, %zu of them by DMA\n", calls, translations, transfers);
    EXPECT_TRUE(papr.remove_device(buid, &target));
  }
  witness.reset();
  space->reset();
  ::munmap(ram, ram_bytes);
}

}  // namespace
}  // namespace iovane::test
