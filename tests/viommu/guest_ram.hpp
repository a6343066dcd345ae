// Guest RAM for tests: sparse anonymous memory, and the seed of random tests.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>

#include "viommu/guest_memory.hpp"

namespace iovane::viommu {

/// Anonymous memory that costs only what is touched, as one region of a GuestMemory.
class GuestRam {
 public:
  explicit GuestRam(std::uint64_t length, std::uint64_t gpa = 0) : gpa_{gpa}, length_{length} {
    void* mapped = ::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    base_ = mapped == MAP_FAILED ? nullptr : static_cast<std::byte*>(mapped);
  }
  GuestRam(const GuestRam&) = delete;
  GuestRam& operator=(const GuestRam&) = delete;
  ~GuestRam() {
    if (base_ != nullptr) ::munmap(base_, length_);
  }
  RegionConfig config() const { return {gpa_, {length_}, base_, -1, 0, false}; }
  std::byte* at(std::uint64_t gpa) const { return base_ + (gpa - gpa_); }
  /// As a guest's processor stores: another thread may be reading.
  void store(std::uint64_t gpa, std::uint64_t value) const {
    __atomic_store_n(reinterpret_cast<std::uint64_t*>(at(gpa)), value, __ATOMIC_RELEASE);
  }
  std::uint64_t load(std::uint64_t gpa) const {
    return __atomic_load_n(reinterpret_cast<const std::uint64_t*>(at(gpa)), __ATOMIC_RELAXED);
  }

 private:
  std::uint64_t gpa_;
  std::uint64_t length_;
  std::byte* base_ = nullptr;
};

/// A random test's seed: printed, and taken back from IOVANE_SEED.
inline std::uint64_t test_seed() {
  const char* given = std::getenv("IOVANE_SEED");  // NOLINT(concurrency-mt-unsafe): before any thread
  const std::uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 0) : std::random_device{}();
  ::testing::Test::RecordProperty("seed", std::to_string(seed));
  std::fprintf(stderr, "IOVANE_SEED=%llu\n", static_cast<unsigned long long>(seed));
  return seed;
}

}  // namespace iovane::viommu
