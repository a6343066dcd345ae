#include "engine/stats_page.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/error_text.hpp"
#include "base/os_error.hpp"

namespace iovane::engine {

static_assert(std::atomic<std::uint32_t>::is_always_lock_free);
static_assert(sizeof(StatsPageHeader) <= StatsPage::header_bytes && sizeof(StatsSlot) % 8 == 0);

namespace {

std::string automatic_path() {
  static std::atomic<std::uint32_t> pages{0};
  // relaxed: only the number matters.
  return fmt::format("{}/{}{}.{}", StatsPage::folder, StatsPage::prefix, ::getpid(),
                     pages.fetch_add(1, std::memory_order_relaxed));
}

template <std::size_t size>
void put(std::array<char, size>& field, std::string_view text) noexcept {
  field = {};
  std::copy_n(text.begin(), std::min(text.size(), size - 1), field.begin());
}

}  // namespace

Result<std::unique_ptr<StatsPage>> StatsPage::create(const std::string& path) {
  const bool automatic = path == "auto";
  std::unique_ptr<StatsPage> page{new StatsPage{automatic ? automatic_path() : path}};  // before the file is made
  std::string& name = page->path_;
  const auto make = [&] { return ::open(name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600); };
  base::UniqueFd file{make()};
  // Pages of an earlier process of the same number, which was killed, are passed over.
  for (int left = 64; !file && automatic && errno == EEXIST && left != 0; --left) {
    name = automatic_path();
    file = base::UniqueFd{make()};
  }
  const auto refused = [&](const char* what) {
    const int why = errno;
    if (file) ::unlink(name.c_str());
    return base::fail(base::errc_from_errno(why), Stage::open, why,
                      "cannot {} the statistics page {}; name another path or leave EngineConfig::stats_page empty",
                      what, name);
  };
  if (!file) return refused("create");
  // All of it now: a store to a page that a full file system cannot give would be a signal.
  errno = ::posix_fallocate(file.get(), 0, static_cast<off_t>(file_bytes));
  if (errno != 0) return refused("size");
  void* const memory = ::mmap(nullptr, file_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
  if (memory == MAP_FAILED) return refused("map");
  page->memory_ = memory;
  auto* const header = new (memory) StatsPageHeader{};
  header->slots = slots_max;
  header->slot_bytes = sizeof(StatsSlot);
  header->process = static_cast<std::uint32_t>(::getpid());
  return page;
}

StatsPage::~StatsPage() {
  if (memory_ == nullptr) return;
  ::munmap(memory_, file_bytes);
  ::unlink(path_.c_str());
}

StatsSlot* StatsPage::slot(std::uint32_t index) const noexcept {
  return reinterpret_cast<StatsSlot*>(static_cast<std::byte*>(memory_) + header_bytes) + index;
}

StatsSlot* StatsPage::acquire(std::string_view name, std::string_view backend) noexcept {
  for (std::uint32_t i = 0; i < slots_max; ++i) {
    // acquire: pairs with release(), the slot's last tenant is through with it.
    if (taken_[i].exchange(true, std::memory_order_acquire)) continue;
    StatsSlot* const mine = new (slot(i)) StatsSlot{};
    put(mine->name, name);
    put(mine->backend, backend);
    // release: a reader that sees the state sees name and zeros.
    mine->state.store(++tenants_[i], std::memory_order_release);
    return mine;
  }
  return nullptr;
}

void StatsPage::release(StatsSlot* mine) noexcept {
  // relaxed: a reader that still sees the old state reads the old tenant's last values.
  mine->state.store(0, std::memory_order_relaxed);
  // release: pairs with acquire().
  taken_[static_cast<std::size_t>(mine - slot(0))].store(false, std::memory_order_release);
}

}  // namespace iovane::engine
