#include "pinning/memlock.hpp"

#include <fcntl.h>
#include <linux/capability.h>
#include <sys/resource.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <string_view>

#include "base/error_text.hpp"
#include "base/unique_fd.hpp"

namespace iovane::pinning {
namespace {

std::uint64_t field(std::string_view text, std::string_view name, int base) noexcept {
  const std::size_t at = text.find(name);
  if (at == std::string_view::npos) return 0;
  text.remove_prefix(at + name.size());
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
  std::uint64_t value = 0;
  std::from_chars(text.data(), text.data() + text.size(), value, base);
  return value;
}

}  // namespace

Result<MemlockState> read_memlock_state() noexcept {
  MemlockState state;
  rlimit limit{};
  if (getrlimit(RLIMIT_MEMLOCK, &limit) != 0)
    return base::fail(Errc::io_error, Stage::query, errno, "getrlimit(RLIMIT_MEMLOCK) failed");
  if (limit.rlim_cur != RLIM_INFINITY) state.soft_limit = limit.rlim_cur;
  if (limit.rlim_max != RLIM_INFINITY) state.hard_limit = limit.rlim_max;

  auto file = base::UniqueFd::open("/proc/self/status", O_RDONLY);
  if (!file) return file.error();
  std::array<char, 8192> text;
  std::size_t size = 0;
  while (size < text.size()) {
    const ssize_t got = read(file->get(), text.data() + size, text.size() - size);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return base::fail(Errc::io_error, Stage::query, errno, "reading /proc/self/status failed");
    if (got == 0) break;
    size += static_cast<std::size_t>(got);
  }
  const std::string_view status{text.data(), size};
  state.locked = field(status, "VmLck:", 10) * 1024;
  state.pinned = field(status, "VmPin:", 10) * 1024;
  state.exempt = ((field(status, "CapEff:", 16) >> CAP_IPC_LOCK) & 1U) != 0;
  return state;
}

}  // namespace iovane::pinning
