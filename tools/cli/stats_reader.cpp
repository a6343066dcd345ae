#include "cli/stats_reader.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>

#include "base/error_text.hpp"
#include "base/os_error.hpp"
#include "base/unique_fd.hpp"
#include "engine/stats_page.hpp"

namespace iovane::cli {
namespace {

using engine::StatsPage;
using engine::StatsPageHeader;
using engine::StatsSlot;

template <std::size_t size>
std::string text_of(const std::array<char, size>& field) {
  return {field.data(), ::strnlen(field.data(), size)};
}

}  // namespace

std::vector<std::string> find_pages(std::uint32_t process) {
  std::vector<std::string> pages;
  std::error_code ignored;  // no such folder: no pages
  for (const auto& entry : std::filesystem::directory_iterator{StatsPage::folder, ignored}) {
    const std::string name = entry.path().filename();
    if (!name.starts_with(StatsPage::prefix)) continue;
    std::uint32_t owner = 0;
    std::from_chars(name.data() + StatsPage::prefix.size(), name.data() + name.size(), owner);
    if (process == 0 || owner == process) pages.push_back(entry.path());
  }
  std::sort(pages.begin(), pages.end());
  return pages;
}

Result<std::vector<SpaceStats>> read_page(const std::string& path) {
  const base::UniqueFd file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (!file)
    return base::fail(base::errc_from_errno(errno), Stage::open, errno, "cannot open {}: {}", path,
                      std::strerror(errno));
  struct stat about {};
  if (::fstat(file.get(), &about) != 0 || static_cast<std::size_t>(about.st_size) < StatsPage::file_bytes)
    return base::fail(Errc::bad_format, Stage::open, 0, "{} is no statistics page of this version of iovane: too short",
                      path);
  void* const memory = ::mmap(nullptr, StatsPage::file_bytes, PROT_READ, MAP_SHARED, file.get(), 0);
  if (memory == MAP_FAILED) return base::fail(base::errc_from_errno(errno), Stage::open, errno, "cannot map {}", path);
  StatsPageHeader header;
  std::memcpy(&header, memory, sizeof header);
  if (header.magic != StatsPageHeader::magic_value || header.version != StatsPageHeader::version_value ||
      header.slots != StatsPage::slots_max || header.slot_bytes != sizeof(StatsSlot)) {
    ::munmap(memory, StatsPage::file_bytes);
    return base::fail(Errc::bad_format, Stage::open, 0,
                      "{} is no statistics page of this version of iovane; look with the iovane that the process was "
                      "built with",
                      path);
  }
  std::vector<SpaceStats> rows;
  const auto* const slots =
      reinterpret_cast<const StatsSlot*>(static_cast<const std::byte*>(memory) + StatsPage::header_bytes);
  for (std::uint32_t i = 0; i < header.slots; ++i) {
    const StatsSlot& slot = slots[i];
    // acquire: pairs with the release in StatsPage::acquire().
    const std::uint32_t tenant = slot.state.load(std::memory_order_acquire);
    if (tenant == 0) continue;
    SpaceStats row{
        path, header.process, text_of(slot.name), text_of(slot.backend), tenant, i, engine::stats_of(slot.counters)};
    // relaxed: a row that changed hands meanwhile is left out, at worst one of mixed values is shown once.
    if (slot.state.load(std::memory_order_relaxed) == tenant) rows.push_back(std::move(row));
  }
  ::munmap(memory, StatsPage::file_bytes);
  return rows;
}

}  // namespace iovane::cli
