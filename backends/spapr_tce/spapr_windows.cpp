// The control plane of a sPAPR space: devices, windows, and what the kernel charges for them.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>

#include "backends/kernel_error.hpp"
#include "backends/spapr_tce/spapr_space.hpp"
#include "backends/uapi/vfio.hpp"
#include "base/checked_math.hpp"
#include "base/error_text.hpp"

namespace iovane::backends::spapr {
namespace {

namespace uapi = backends::uapi::vfio;

unsigned long iommu_type(Interface interface) noexcept {
  return interface == Interface::spapr_v1 ? uapi::spapr_tce_iommu : uapi::spapr_tce_v2_iommu;
}

/// The difference that a call made; other threads' locks may be in it, so it is for reports only.
class LockedDifference {
 public:
  explicit LockedDifference(Kernel& kernel) : kernel_{kernel}, before_{kernel.memlock().locked.value} {}
  Bytes now() {
    const std::uint64_t after = kernel_.memlock().locked.value;
    return Bytes{after > before_ ? after - before_ : 0};
  }

 private:
  Kernel& kernel_;
  std::uint64_t before_;
};

/// How large the pieces of a table are that has its levels' bits shared out evenly, as a power of two.
unsigned piece_shift(std::uint64_t entries, std::uint32_t levels, std::uint64_t os_page) noexcept {
  const auto bits = static_cast<unsigned>(std::countr_zero(entries));
  return std::max((bits + levels - 1) / levels + 3, static_cast<unsigned>(std::countr_zero(os_page)));
}

/// Linux on powernv makes no table whose levels translate 55 bits or more, although small ones round up to OS pages.
bool levels_fit(const SpaprWindowRequest& request, std::uint32_t levels, std::uint64_t os_page) noexcept {
  const std::uint64_t entries = request.length.value / request.page.value;
  const auto page_shift = static_cast<unsigned>(std::countr_zero(request.page.value));
  return (piece_shift(entries, levels, os_page) - 3) * levels + page_shift < 55;
}

/// What the kernel can be trusted to find in one piece. A create that fails stays charged to the process's locked
/// memory until its end (seen on Linux 6.12), so trying is not free.
constexpr unsigned piece_shift_max = 23;

std::uint32_t fewest_levels(const SpaprWindowRequest& request, std::uint32_t levels_max,
                            std::uint64_t os_page) noexcept {
  for (std::uint32_t levels = 1; levels <= levels_max; ++levels)
    if (piece_shift(request.length.value / request.page.value, levels, os_page) <= piece_shift_max) return levels;
  return std::max(levels_max, 1U);
}

class OwnPage {
 public:
  explicit OwnPage(std::uint64_t bytes) noexcept
      : bytes_{bytes}, memory_{::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)} {}
  OwnPage(const OwnPage&) = delete;
  OwnPage& operator=(const OwnPage&) = delete;
  ~OwnPage() {
    if (memory_ != MAP_FAILED) ::munmap(memory_, bytes_);
  }
  /// 0 when there is none.
  std::uint64_t address() const noexcept {
    return memory_ == MAP_FAILED ? 0 : reinterpret_cast<std::uintptr_t>(memory_);
  }

 private:
  std::uint64_t bytes_;
  void* memory_;
};

}  // namespace

SpaprSpace::SpaprSpace(Kernel& kernel, KernelFd container, Interface interface, ProcessMemory& process,
                       const SpaceOptions& options)
    : kernel_{kernel},
      container_{std::move(container)},
      eeh_{kernel, container_.get()},
      groups_{kernel, container_.get(), iommu_type(interface)},
      memory_{kernel, container_.get(), process},
      os_page_{static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE))} {
  static_cast<void>(options);  // TCEs have the window's page size; devices' writes are not recorded
  facts_.interface = interface;
  facts_.capabilities =
      Capability::cut_on_unmap | Capability::replace_in_place | Capability::parallel_map | Capability::span_unmap;
  if (interface == Interface::spapr_v2)
    facts_.capabilities = facts_.capabilities | Capability::explicit_pin | Capability::choose_window;
}

SpaprSpace::~SpaprSpace() {
  // Also on a container that was handed in and lives on: nothing of this space may stay on it.
  disconnect();
  groups_.leave_all();
}

/// Everything out of the container while its IOMMU is still there.
void SpaprSpace::disconnect() noexcept {
  static_cast<void>(unmap_all());
  books_.clear();
  for (Region& region : regions_) {
    region.held.clear();
    region.registered = false;
  }
  memory_.drop_all();
  if (version_1() && !groups_.empty()) kernel_.ioctl_value(container_.get(), uapi::spapr_disable, 0);
  facts_of_windows();
}

Error SpaprSpace::attach_error(const Error& error, const std::string& device) const noexcept {
  const bool refused = error.os_errno == EBUSY || error.os_errno == EPERM || error.os_errno == EINVAL;
  if (!refused || error.stage != Stage::attach) return error;
  const char* const why =
      groups_.empty() ? "the group is in use elsewhere, or this kernel's platform code cannot hand its windows over"
      : version_1()   ? "a version 1 container takes one group"
                      : "its group cannot have the same windows as those that are attached (another kind of bridge, or "
                        "on pseries another bridge)";
  return base::fail(error.code == Errc::iova_reserved ? Errc::unsupported : error.code, Stage::attach, error.os_errno,
                    "{} cannot join the container: {}; give it a space of its own (VFIO_GROUP_SET_CONTAINER or "
                    "VFIO_SET_IOMMU: errno {})",
                    device, why, error.os_errno);
}

Result<AttachedDevice> SpaprSpace::attach(const DeviceSource& source) {
  const bool first = groups_.empty();
  const auto added = groups_.add(source);
  if (!added) {
    if (!first) static_cast<void>(enter_again());  // its group may have been in for a moment
    return attach_error(added.error(), source.pci_address);
  }
  type1::GroupDevice& device = **added;
  if (first) {
    if (const auto ready = connected(device.name); !ready) {
      const DeviceId id = device.id;
      disconnect();
      (void)groups_.remove(id).has_value();
      return ready.error();
    }
  }
  return AttachedDevice{.id = device.id,
                        .name = device.name,
                        .device_fd = device.fd.get(),
                        .reserved = device.reserved,
                        .iommu = "sPAPR TCE",
                        .dirty_tracking = false};
}

/// The container has its IOMMU: enable it, learn its windows, register what waited.
Result<void> SpaprSpace::connected(const std::string& device) {
  LockedDifference locked{kernel_};
  has_eeh_ = kernel_.ioctl_value(container_.get(), uapi::check_extension, uapi::eeh) == 1;
  if (version_1()) {
    if (const int why = errno_of(kernel_.ioctl_value(container_.get(), uapi::spapr_enable, 0)); why != 0) {
      const auto known = limits();
      const Bytes need = known ? known->default_window.length() : Bytes{};
      if (why == ENOMEM)
        return explain_no_memory(kernel_, MemlockAccount::process_locked, Stage::attach,
                                 "VFIO_IOMMU_ENABLE (charges the whole default window)", need);
      return base::fail(Errc::busy, Stage::attach, why, "{}: the container cannot be enabled", device);
    }
  }
  if (const auto window = open_default_window(); !window) return window;
  if (!books_.empty()) books_.front().set_charge(locked.now());
  return hold_regions();
}

Result<void> SpaprSpace::hold_regions() {
  if (version_1()) return {};
  for (Region& region : regions_) {
    if (region.length == 0) continue;
    auto held = memory_.hold(region.address, region.length);
    if (!held) return held.error();
    region.held = *std::move(held);
    region.registered = true;
  }
  return {};
}

Result<SpaprLimits> SpaprSpace::limits() {
  if (groups_.empty())
    return base::fail(Errc::no_device, Stage::query, 0,
                      "a sPAPR container knows its windows once a device is attached");
  uapi::SpaprTceInfo info;
  if (const int why = call(kernel_, container_.get(), info); why != 0)
    return explain_call(Stage::query, "VFIO_IOMMU_SPAPR_TCE_GET_INFO", why);
  SpaprLimits limits;
  const auto window = IovaRange::from_length(Iova{info.dma32_window_start}, Bytes{info.dma32_window_size});
  limits.default_window = window.value_or(IovaRange{Iova{1}, Iova{0}});
  limits.windows_max = window ? 1 : 0;
  if ((info.flags & uapi::spapr_info_ddw) != 0) {
    limits.page_sizes = info.ddw.pgsizes;
    limits.windows_max = info.ddw.max_dynamic_windows_supported;
    limits.levels_max = info.ddw.levels;
  }
  return limits;
}

/// The kernel makes the default window with the first call that needs it, without a lock: two first maps at once make
/// two, and trip over that (seen on Linux 6.12). An unmap of one page that is not mapped is such a call and changes
/// nothing else; so the window is made here, and charged where a refusal can still be said. The unmap is EPERM until
/// the container is enabled, which on version 2 the first successful REGISTER does: hence a page of our own, registered
/// for a moment.
Result<void> SpaprSpace::open_default_window() {
  const auto known = limits();
  if (!known) return known.error();
  if (!known->default_window.well_formed()) return {};
  if (!version_1()) {
    const OwnPage page{os_page_};
    if (page.address() == 0) return make_error(Errc::out_of_memory, Stage::attach, "no memory for a page");
    const auto held = memory_.hold(page.address(), os_page_);
    if (!held) return held.error();
    memory_.release(*held);
  }
  uapi::Type1DmaUnmap touch{.iova = known->default_window.start.value, .size = 4096};
  if (const int why = call(kernel_, container_.get(), touch); why == ENOMEM) {
    return explain_no_memory(kernel_, MemlockAccount::process_locked, Stage::attach, "the default window's table",
                             spapr_table_bytes_max(known->default_window.length(), Bytes{4096}));
  } else if (why != 0) {
    return explain_call(Stage::attach, "making the default window", why);
  }
  auto book = TceBook::make(
      {.range = known->default_window, .page = Bytes{4096}, .levels = 0, .table = {}, .is_default = true});
  if (!book) return book.error();
  add_book(*std::move(book));
  return {};
}

void SpaprSpace::add_book(TceBook book) {
  const auto at = std::find_if(books_.begin(), books_.end(), [&](const TceBook& other) {
    return book.window().range.start < other.window().range.start;
  });
  books_.insert(at, std::move(book));
  facts_of_windows();
}

void SpaprSpace::facts_of_windows() noexcept {
  facts_.page_sizes = 0;
  for (const TceBook& book : books_) facts_.page_sizes |= book.page();
  facts_.granule = Bytes{facts_.page_sizes == 0 ? 4096 : std::uint64_t{1} << std::countr_zero(facts_.page_sizes)};
  // Of the smallest TCE: between larger ones a hole this wide is none, and each costs a call.
  facts_.unmap_hole_max = Bytes{hole_max * facts_.granule.value};
}

std::vector<SpaprWindow> SpaprSpace::windows() const {
  std::vector<SpaprWindow> list;
  for (const TceBook& book : books_) list.push_back(book.window());
  return list;
}

Result<SpaprWindow> SpaprSpace::create_window(const SpaprWindowRequest& request) {
  if (version_1())
    return base::fail(Errc::unsupported, Stage::reserve, 0, "version 1 has the default window only; use version 2");
  const auto known = limits();
  if (!known) return known.error();
  if (!base::is_power_of_two(request.page.value) || (known->page_sizes & request.page.value) == 0)
    return base::fail(Errc::unsupported, Stage::reserve, 0,
                      "this platform has no TCEs of {} bytes; the sizes it has, as bits: {:#x}", request.page.value,
                      known->page_sizes);
  if (!base::is_power_of_two(request.length.value) || request.length < request.page)
    return base::fail(Errc::invalid_argument, Stage::reserve, 0,
                      "a window has a power of two of bytes and at least one page; {} is not", request.length.value);
  if (request.levels > known->levels_max)
    return base::fail(Errc::unsupported, Stage::reserve, 0, "tables have at most {} levels here, not {}",
                      known->levels_max, request.levels);
  const std::uint32_t first =
      request.levels != 0 ? request.levels : fewest_levels(request, known->levels_max, os_page_);
  const std::uint32_t last = request.levels != 0 ? request.levels : std::max(known->levels_max, 1U);
  LockedDifference locked{kernel_};
  int why = EINVAL;
  bool no_memory = false;  // at some number of levels: says more than what the last one answered
  for (std::uint32_t levels = first; levels <= last; ++levels) {
    if (!levels_fit(request, levels, os_page_)) continue;
    uapi::SpaprTceCreate create{.page_shift = static_cast<std::uint32_t>(std::countr_zero(request.page.value)),
                                .window_size = request.length.value,
                                .levels = levels};
    why = call(kernel_, container_.get(), create);
    if (why == 0) {
      const auto range = IovaRange::from_length(Iova{create.start_addr}, request.length);
      auto book = TceBook::make({.range = range.value_or(IovaRange{}),
                                 .page = request.page,
                                 .levels = levels,
                                 .table = locked.now(),
                                 .is_default = false});
      if (!book) {
        uapi::SpaprTceRemove remove{.start_addr = create.start_addr};
        call(kernel_, container_.get(), remove);
        return book.error();
      }
      SpaprWindow made = book->window();
      add_book(*std::move(book));
      return made;
    }
    no_memory = no_memory || why == ENOMEM;
    if (why == ENOSPC) break;  // no further window, however deep
  }
  if (why == ENOSPC || why == EBUSY)
    return base::fail(Errc::limit_reached, Stage::reserve, why,
                      "the platform makes no further window ({} exist); remove one", books_.size());
  if (no_memory)
    return explain_no_memory(kernel_, MemlockAccount::process_locked, Stage::reserve, "VFIO_IOMMU_SPAPR_TCE_CREATE",
                             spapr_table_bytes_max(request.length, request.page));
  if (why == EINVAL)
    return base::fail(Errc::unsupported, Stage::reserve, why,
                      "no table of {} to {} levels has room for {} bytes with pages of {} on this platform; ask for "
                      "other levels, a smaller window or larger pages",
                      first, last, request.length.value, request.page.value);
  return base::fail(Errc::io_error, Stage::reserve, why,
                    "VFIO_IOMMU_SPAPR_TCE_CREATE of {} bytes with pages of {} failed at up to {} levels: errno {}",
                    request.length.value, request.page.value, last, why);
}

Result<void> SpaprSpace::remove_window(Iova start) {
  const auto at = std::find_if(books_.begin(), books_.end(),
                               [&](const TceBook& book) { return book.window().range.start == start; });
  if (at == books_.end())
    return base::fail(Errc::not_found, Stage::release, 0, "no window begins at {:#x}", start.value);
  if (version_1()) return base::fail(Errc::unsupported, Stage::release, 0, "version 1 keeps its default window");
  if (at->first_live(at->run_of(at->window().range)))
    return base::fail(Errc::busy, Stage::release, 0, "something is mapped in the window at {:#x}; unmap it first",
                      start.value);
  uapi::SpaprTceRemove remove{.start_addr = start.value};
  if (const int why = call(kernel_, container_.get(), remove); why != 0)
    return explain_call(Stage::release, "VFIO_IOMMU_SPAPR_TCE_REMOVE", why);
  books_.erase(at);
  facts_of_windows();
  return {};
}

/// Linux (since 6.9) clears every TCE of a container when one of its groups leaves, those of the others too: all that
/// the book has is mapped again.
Result<void> SpaprSpace::enter_again() noexcept {
  std::uint64_t lost = 0;
  for (TceBook& book : books_) {
    TceRun rest = book.run_of(book.window().range);
    while (const auto first = book.first_live(rest)) {
      TceRun stretch{*first, *first};
      while (stretch.last < rest.last && book.at(stretch.last + 1).live()) ++stretch.last;
      if (!restore(book, stretch)) lost += stretch.count() * book.page();
      if (stretch.last == rest.last) break;
      rest.first = stretch.last + 1;
    }
  }
  if (lost == 0) return {};
  return base::fail(Errc::io_error, Stage::detach, 0,
                    "the kernel unmapped everything when a group left the container, and {} bytes could not be mapped "
                    "again",
                    lost);
}

Result<void> SpaprSpace::detach(DeviceId device) {
  if (!groups_.contains(device)) return groups_.remove(device);
  if (!groups_.is_last(device)) {
    if (const auto removed = groups_.remove(device); !removed) return removed;
    return enter_again();
  }
  std::uint64_t live = 0;
  for (const TceBook& book : books_) live += book.live_count() * book.page();
  if (live != 0)
    return base::fail(
        Errc::busy, Stage::detach, 0,
        "device {} is the last of its sPAPR container, whose windows go with it, and {} bytes are mapped; "
        "unmap everything or attach another device first",
        device.value, live);
  disconnect();
  return groups_.remove(device);
}

}  // namespace iovane::backends::spapr
