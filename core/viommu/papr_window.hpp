// Inside PaprTce: a window with its table, and a PHB with its windows.
#pragma once

#include <sys/mman.h>

#include <array>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "viommu/papr.hpp"

namespace iovane::viommu {

inline constexpr std::uint64_t tce_access_bits = 3;  ///< of a TCE: iovane::Access

/// Entries in memory of our own, zero at first; costs what is touched.
class UserTable {
 public:
  UserTable() noexcept = default;
  UserTable(UserTable&& o) noexcept : entries_{std::exchange(o.entries_, {})} {}
  UserTable& operator=(UserTable&& o) noexcept {
    std::swap(entries_, o.entries_);
    return *this;
  }
  ~UserTable() {
    if (!entries_.empty()) ::munmap(entries_.data(), entries_.size_bytes());
  }
  static std::optional<UserTable> make(std::uint64_t entries) noexcept {
    void* mapped =
        ::mmap(nullptr, entries * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return std::nullopt;
    UserTable out;
    out.entries_ = {static_cast<std::uint64_t*>(mapped), entries};
    return out;
  }
  std::span<std::uint64_t> entries() const noexcept { return entries_; }

 private:
  std::span<std::uint64_t> entries_;
};

struct PaprTce::Window : TceWindow {
  Phb* phb = nullptr;
  UserTable user;                    // where the entries are, unless
  std::unique_ptr<KvmTceTable> kvm;  // they are here
  std::span<std::uint64_t> table;    // of whichever it is; empty: no window

  bool enabled() const noexcept { return !table.empty(); }
  std::uint64_t load(std::uint64_t index) const noexcept {
    // relaxed: an entry stands for itself.
    return __atomic_load_n(&table[index], __ATOMIC_RELAXED);
  }
  void store(std::uint64_t index, std::uint64_t tce) const noexcept {
    // relaxed: as above; translate() on other threads sees the old or the new entry.
    __atomic_store_n(&table[index], tce, __ATOMIC_RELAXED);
  }
  std::optional<std::uint64_t> index_of(std::uint64_t bus_address) const noexcept {
    if (bus_address < address) return std::nullopt;
    const std::uint64_t index = (bus_address - address) >> page_shift;
    if (index >= table.size()) return std::nullopt;
    return index;
  }
};

struct PaprTce::Phb {
  explicit Phb(const PhbConfig& with, const DomainConfig& domain) : config{with}, shadow{domain} {}
  PhbConfig config;
  ShadowDomain shadow;
  std::array<Window, 2> windows;
  struct Device {
    ShadowTarget* target = nullptr;
    std::uint32_t count = 0;
  };
  std::vector<Device> devices;
};

}  // namespace iovane::viommu
