// StatsPage: the counters of a process's address spaces in a file that other processes map and read (iovane top).
//
// Written by the process that created it, read by others at any time: each counter by itself is whole (an aligned
// 64-bit word), a row of them is of roughly one moment. A slot's `state` is set last when it is taken and first when it
// is given back; a reader that finds it changed discards the row.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "base/unique_fd.hpp"
#include "engine/space_counters.hpp"
#include "iovane/result.hpp"

namespace iovane::engine {

struct StatsPageHeader {
  static constexpr std::uint64_t magic_value = 0x7374'656e'6176'6f69;  // "iovanets"
  static constexpr std::uint32_t version_value = 1;

  std::uint64_t magic = magic_value;
  std::uint32_t version = version_value;
  std::uint32_t slots = 0;
  std::uint32_t slot_bytes = 0;
  std::uint32_t process = 0;  // the creator's id
};

struct StatsSlot {
  std::atomic<std::uint32_t> state{0};  // 0: free; otherwise grows with each tenant
  std::array<char, 48> name{};          // ends with a zero
  std::array<char, 16> backend{};
  SpaceCounters counters;
};

/// The writer's side. Any thread.
class StatsPage {
 public:
  static constexpr std::uint32_t slots_max = 64;
  static constexpr std::size_t header_bytes = 64;
  static constexpr std::size_t file_bytes = header_bytes + slots_max * sizeof(StatsSlot);
  static constexpr std::string_view folder = "/dev/shm";
  static constexpr std::string_view prefix = "iovane.";

  /// Creates the file, readable by its owner; "auto" stands for /dev/shm/iovane.<process id>.<number>. Errors: of the
  /// file system; a file that exists is not touched. Throws std::bad_alloc.
  static Result<std::unique_ptr<StatsPage>> create(const std::string& path);
  /// Unmaps and removes the file.
  ~StatsPage();
  StatsPage(const StatsPage&) = delete;
  StatsPage& operator=(const StatsPage&) = delete;

  /// A slot of zeros for an address space, or null when all are taken. Give it back with release().
  StatsSlot* acquire(std::string_view name, std::string_view backend) noexcept;
  void release(StatsSlot* slot) noexcept;
  const std::string& path() const noexcept { return path_; }

 private:
  explicit StatsPage(std::string path) noexcept : path_{std::move(path)} {}
  StatsSlot* slot(std::uint32_t index) const noexcept;

  std::string path_;
  void* memory_ = nullptr;  // null: the file has not been made
  std::array<std::atomic<bool>, slots_max> taken_{};
  std::array<std::uint32_t, slots_max> tenants_{};
};

}  // namespace iovane::engine
