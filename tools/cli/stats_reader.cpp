#include "cli/stats_reader.hpp"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <limits>
#include <memory>
#include <utility>

#include "base/error_text.hpp"
#include "base/os_error.hpp"
#include "base/unique_fd.hpp"
#include "engine/stats_page.hpp"

namespace iovane::cli {
namespace {

using engine::StatsPage;
using engine::StatsPageHeader;
using engine::StatsSlot;

/// Anybody may have written it: what is not printable ASCII is shown as question marks.
template <std::size_t size>
std::string text_of(const std::array<char, size>& field) {
  std::string text{field.data(), ::strnlen(field.data(), size)};
  for (char& c : text)
    if (c < ' ' || c > '~') c = '?';
  return text;
}

/// Reads, where a mapping of a file that its owner cuts off meanwhile would end this process.
bool read_at(const base::UniqueFd& file, std::size_t offset, void* into, std::size_t bytes) noexcept {
  return ::pread(file.get(), into, bytes, static_cast<off_t>(offset)) == static_cast<ssize_t>(bytes);
}

/// Whether the process that wrote the page is there; true also for one that may not be asked.
bool is_running(std::uint32_t process) noexcept {
  return process != 0 && process <= std::numeric_limits<pid_t>::max() &&
         (::kill(static_cast<pid_t>(process), 0) == 0 || errno != ESRCH);
}

}  // namespace

std::vector<std::string> find_pages(std::uint32_t process) {
  std::vector<std::string> pages;
  std::error_code ignored;  // no such folder: no pages
  for (std::filesystem::directory_iterator at{StatsPage::folder, ignored}, end; at != end; at.increment(ignored)) {
    const auto& entry = *at;
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
  // Not blocking: somebody may have put a FIFO there.
  const base::UniqueFd file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (!file)
    return base::fail(base::errc_from_errno(errno), Stage::open, errno, "cannot open {}: {}", path,
                      std::strerror(errno));
  struct stat about {};
  if (::fstat(file.get(), &about) != 0 || !S_ISREG(about.st_mode) ||
      static_cast<std::size_t>(about.st_size) < StatsPage::file_bytes)
    return base::fail(Errc::bad_format, Stage::open, 0,
                      "{} is no statistics page of this version of iovane: too short, or not a file", path);
  StatsPageHeader header;
  if (!read_at(file, 0, &header, sizeof header) || header.magic != StatsPageHeader::magic_value ||
      header.version != StatsPageHeader::version_value || header.slots != StatsPage::slots_max ||
      header.slot_bytes != sizeof(StatsSlot))
    return base::fail(Errc::bad_format, Stage::open, 0,
                      "{} is no statistics page of this version of iovane; look with the iovane that the process was "
                      "built with",
                      path);
  const bool running = is_running(header.process);
  std::vector<SpaceStats> rows;
  const auto slot = std::make_unique<StatsSlot>();
  for (std::uint32_t i = 0; i < header.slots; ++i) {
    const std::size_t at = StatsPage::header_bytes + i * sizeof(StatsSlot);
    if (!read_at(file, at, static_cast<void*>(slot.get()), sizeof(StatsSlot))) break;
    // relaxed, here and below: the copy is this thread's alone.
    const std::uint32_t tenant = slot->state.load(std::memory_order_relaxed);
    if (tenant == 0) continue;
    SpaceStats row{path,
                   header.process,
                   running,
                   text_of(slot->name),
                   text_of(slot->backend),
                   tenant,
                   i,
                   engine::stats_of(slot->counters)};
    // A row that changed hands meanwhile is left out, at worst one of mixed values is shown once.
    std::uint32_t still = 0;
    if (read_at(file, at + offsetof(StatsSlot, state), &still, sizeof still) && still == tenant)
      rows.push_back(std::move(row));
  }
  return rows;
}

}  // namespace iovane::cli
