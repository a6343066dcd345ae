#include "pinning/preflight.hpp"

#include <algorithm>
#include <bit>

#include "base/checked_math.hpp"
#include "base/error_text.hpp"

namespace iovane::pinning {
namespace {

Error too_large() noexcept {
  return base::fail(Errc::overflow, Stage::query, 0, "the plan's charges do not fit into 64 bits");
}

// What creating a window charges for its tables, as pnv_pci_ioda2_get_table_size computes it: every level, twice (one
// copy is the kernel's own). A 64 KiB kernel rounds the lowest table up to its page.
Result<std::uint64_t> table_bytes(const PlannedWindow& window) noexcept {
  constexpr unsigned levels_max = 5;
  constexpr unsigned os_page_shift = 16;
  if (!base::is_power_of_two(window.size.value) || window.levels == 0 || window.levels > levels_max ||
      window.page_shift < 12 || window.page_shift > 34 || (window.size.value >> window.page_shift) == 0)
    return base::fail(Errc::invalid_argument, Stage::query, 0,
                      "window of {:#x} bytes with pages of 2^{} and {} levels: expected a power of two of at least one "
                      "page and 1 to {} levels",
                      window.size.value, window.page_shift, window.levels, levels_max);
  const auto entries_shift = static_cast<unsigned>(std::countr_zero(window.size.value)) - window.page_shift;
  const unsigned direct_shift = std::max((entries_shift + window.levels - 1) / window.levels + 3, os_page_shift);
  const std::uint64_t direct = std::uint64_t{1} << direct_shift;
  std::uint64_t table = std::max(std::uint64_t{4096}, std::uint64_t{1} << (entries_shift + 3));
  std::uint64_t bytes = 0;
  for (unsigned level = 0; level < window.levels; ++level) {
    bytes += (table + direct - 1) & ~(direct - 1);
    table = std::max(table / direct << 3, direct);
  }
  return bytes * 2;
}

}  // namespace

std::string_view to_string(MemlockBook book) noexcept {
  switch (book) {
    case MemlockBook::locked: return "locked memory of the process (VmLck)";
    case MemlockBook::pinned: return "pinned memory of the process (VmPin)";
    case MemlockBook::user: return "locked memory of the user (all its processes)";
  }
  return "unknown";
}

std::string_view to_string(PinningBackend backend) noexcept {
  switch (backend) {
    case PinningBackend::type1: return "VFIO type1";
    case PinningBackend::iommufd: return "iommufd";
    case PinningBackend::iommufd_process_mode: return "iommufd in process mode";
    case PinningBackend::spapr_v1: return "sPAPR v1";
    case PinningBackend::spapr_v2: return "sPAPR v2";
    case PinningBackend::io_uring: return "io_uring";
  }
  return "unknown";
}

Result<PredictedCharge> predict_charge(const PlannedUse& use) noexcept {
  const std::uint64_t memory = use.memory.value;
  switch (use.backend) {
    case PinningBackend::type1:
    case PinningBackend::iommufd:
    case PinningBackend::iommufd_process_mode: {
      const auto bytes = base::checked_multiply<std::uint64_t>(memory, use.spaces);
      if (!bytes) return too_large();
      const MemlockBook book = use.backend == PinningBackend::type1     ? MemlockBook::locked
                               : use.backend == PinningBackend::iommufd ? MemlockBook::user
                                                                        : MemlockBook::pinned;
      return PredictedCharge{book, *bytes};
    }
    case PinningBackend::spapr_v1:
    case PinningBackend::spapr_v2: {
      // v1 charges its window whole when it is enabled, whatever is mapped. v2 charges registered memory once per
      // process (a second container finds it registered) and the tables of every window of every container.
      std::uint64_t bytes = use.backend == PinningBackend::spapr_v2 ? memory : 0;
      for (const PlannedWindow& window : use.windows) {
        const auto each =
            use.backend == PinningBackend::spapr_v2 ? table_bytes(window) : Result<std::uint64_t>{window.size.value};
        if (!each) return each.error();
        const auto all = base::checked_multiply<std::uint64_t>(*each, use.spaces);
        const auto sum = all ? base::checked_add(bytes, *all) : std::nullopt;
        if (!sum) return too_large();
        bytes = *sum;
      }
      return PredictedCharge{MemlockBook::locked, bytes};
    }
    case PinningBackend::io_uring: {
      // Each buffer can start and stop inside a huge page that nothing else of the plan touches.
      const std::uint64_t slack_each = use.os_page.value > 4096 ? 2 * (use.os_page.value - 4096) : 0;
      const auto slack = base::checked_multiply(slack_each, use.buffers);
      const auto bytes = slack ? base::checked_add(memory, *slack) : std::nullopt;
      if (!bytes) return too_large();
      return PredictedCharge{MemlockBook::user, *bytes};
    }
  }
  return base::fail(Errc::invalid_argument, Stage::query, 0, "unknown backend {}", static_cast<unsigned>(use.backend));
}

Result<PreflightReport> preflight_report(std::span<const PlannedUse> uses, const MemlockState& state) noexcept {
  PreflightReport report;
  report.limit = state.soft_limit;
  report.hard_limit = state.hard_limit;
  report.exempt = state.exempt;
  for (const PlannedUse& use : uses) {
    const auto charge = predict_charge(use);
    if (!charge) return charge.error();
    auto& book = report.books[static_cast<std::size_t>(charge->book)];
    const auto sum = base::checked_add(book.need, charge->bytes);
    if (!sum) return too_large();
    book.need = *sum;
  }
  report.books[static_cast<std::size_t>(MemlockBook::locked)].used = state.locked;
  report.books[static_cast<std::size_t>(MemlockBook::pinned)].used = state.pinned;
  // iommufd and io_uring enter what they charge to the user into VmPin as well, so that much is certain.
  report.books[static_cast<std::size_t>(MemlockBook::user)].used = state.pinned;
  for (auto& book : report.books) book.fits = book.need == 0 || state.room_beside(book.used) >= book.need;
  return report;
}

Result<PreflightReport> preflight(std::span<const PlannedUse> uses, const MemlockState& state) noexcept {
  auto report = preflight_report(uses, state);
  if (!report) return report;
  for (std::size_t i = 0; i < report->books.size(); ++i) {
    const auto& book = report->books[i];
    if (book.fits) continue;
    std::string_view dearest = "";
    std::uint64_t most = 0;
    unsigned spaces = 1;
    for (const PlannedUse& use : uses) {
      const auto charge = predict_charge(use);
      if (charge && static_cast<std::size_t>(charge->book) == i && charge->bytes >= most) {
        most = charge->bytes;
        dearest = to_string(use.backend);
        spaces = use.spaces;
      }
    }
    const bool soft_only = state.hard_limit == MemlockState::unlimited || state.hard_limit - book.used >= book.need;
    return base::fail(
        Errc::memlock_exceeded, Stage::query, 0,
        "{}: need {} bytes (most by {}, {} time{} over), limit {}, in use {}{}; {}, or grant CAP_IPC_LOCK{}",
        to_string(static_cast<MemlockBook>(i)), book.need, dearest, spaces, spaces == 1 ? "" : "s", state.soft_limit,
        static_cast<MemlockBook>(i) == MemlockBook::user ? "at least " : "", book.used,
        soft_only ? "raise the soft RLIMIT_MEMLOCK (ulimit -l), which this process may do itself"
                  : "raise RLIMIT_MEMLOCK (LimitMEMLOCK= of systemd, limits.conf, or prlimit by a manager)",
        spaces > 1 ? "; one container, or iommufd with IOAS_COPY, is charged once" : "");
  }
  return report;
}

}  // namespace iovane::pinning
