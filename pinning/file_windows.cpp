#include "pinning/file_windows.hpp"

#include "base/error_text.hpp"

namespace iovane::pinning {

Result<MemoryRange> FileWindows::add(int fd, Bytes length) noexcept {
  auto own = base::UniqueFd::duplicate(fd);
  if (!own) return own.error();
  return take(*std::move(own), 0, length);
}

Result<MemoryRange> FileWindows::add_named(std::uint64_t memory, Bytes length) noexcept {
  return take({}, memory, length);
}

Result<MemoryRange> FileWindows::take(base::UniqueFd fd, std::uint64_t memory, Bytes length) noexcept {
  const std::uint64_t units = length.value / unit_bytes + (length.value % unit_bytes != 0 ? 1 : 0);
  if (length.value == 0 || length.value % granule_bytes != 0)
    return base::fail(Errc::invalid_argument, Stage::validate, 0,
                      "memory of {} bytes cannot be registered: expected a non-zero multiple of {}", length.value,
                      granule_bytes);
  const std::lock_guard held{lock_};
  std::size_t run = 0;
  for (std::size_t i = 0; i < units_max; ++i) {
    run = units_[i].used ? 0 : run + 1;
    if (run < units) continue;
    const std::size_t first = i + 1 - run;
    for (std::size_t u = first; u <= i; ++u) {
      units_[u].used = true;
      units_[u].first_unit = static_cast<std::uint32_t>(first);
    }
    units_[first].fd = std::move(fd);
    units_[first].memory = memory;
    units_[first].length = length.value;
    const std::uint64_t start = file_key_first + first * unit_bytes;
    return MemoryRange{start, start + length.value - 1};
  }
  return base::fail(Errc::limit_reached, Stage::validate, 0,
                    "no window for memory of {} bytes: {} units of 512 GiB are all there is", length.value, units_max);
}

bool FileWindows::remove(const MemoryRange& window) noexcept {
  if (!window.is_file() || (window.start - file_key_first) % unit_bytes != 0) return false;
  const std::size_t first = (window.start - file_key_first) / unit_bytes;
  const std::lock_guard held{lock_};
  if (first >= units_max || units_[first].length == 0 || units_[first].length != window.length().value) return false;
  for (std::size_t u = first; u < units_max && units_[u].used && units_[u].first_unit == first; ++u)
    units_[u].used = false;
  units_[first].fd.reset();
  units_[first].length = 0;
  return true;
}

std::optional<FileWindows::Place> FileWindows::find(std::uint64_t key) const noexcept {
  if (key < file_key_first) return std::nullopt;
  const std::size_t unit = (key - file_key_first) / unit_bytes;
  const std::lock_guard held{lock_};
  if (unit >= units_max || !units_[unit].used) return std::nullopt;
  const std::uint32_t first = units_[unit].first_unit;
  const std::uint64_t start = file_key_first + first * unit_bytes;
  const std::uint64_t offset = key - start;
  if (offset >= units_[first].length) return std::nullopt;
  return Place{units_[first].fd.get(), offset, start + units_[first].length - 1, units_[first].memory};
}

}  // namespace iovane::pinning
