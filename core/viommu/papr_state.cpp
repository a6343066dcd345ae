// What a migrating guest's TCE windows and tables are, as bytes.
#include <new>

#include "base/error_text.hpp"
#include "viommu/papr_window.hpp"
#include "viommu/state_bytes.hpp"

namespace iovane::viommu {
namespace {

// Layout after magic and version: u32 host bridges, each {u64 buid, then two windows, each {u32 page shift (0: none),
// u64 address, u64 entries, u64 entries that are not zero, each {u64 index, u64 TCE}}}.
Error bad(std::string_view what) { return base::fail(Errc::bad_format, Stage::validate, 0, "PAPR state: {}", what); }

}  // namespace

std::vector<std::byte> PaprTce::save_state() {
  finish();
  StateWriter out{papr_state_magic, state_version};
  out.put(static_cast<std::uint32_t>(phbs_.size()));
  for (const auto& phb : phbs_) {
    out.put(phb->config.buid);
    for (const Window& window : phb->windows) {
      out.put(window.enabled() ? window.page_shift : 0U);
      if (!window.enabled()) continue;
      out.put(window.address);
      out.put(window.entries);
      const std::size_t count_at = out.size();
      out.put(std::uint64_t{0});
      std::uint64_t count = 0;
      for (std::uint64_t i = 0; i < window.entries; ++i) {
        const std::uint64_t tce = window.load(i);
        if (tce == 0) continue;
        out.put(i);
        out.put(tce);
        ++count;
      }
      out.patch(count_at, count);
    }
  }
  return out.finish();
}

Result<void> PaprTce::restore_state(std::span<const std::byte> bytes) {
  auto in = StateReader::open(bytes, papr_state_magic, state_version);
  if (!in) return bad("not one, damaged, or of a version this program does not know");
  finish();
  if (in->take<std::uint32_t>() != phbs_.size()) return bad("it has other host bridges");
  Result<void> outcome;
  for (const auto& phb : phbs_) {
    if (in->take<std::uint64_t>() != phb->config.buid) {
      outcome = bad("it has other host bridges");
      break;
    }
    outcome = clear_windows(*phb);
    for (std::size_t i = 0; i < phb->windows.size() && outcome; ++i)
      outcome = restore_window(*in, *phb, phb->windows[i]);
    if (!outcome) break;
  }
  if (outcome && !in->ended()) outcome = bad("it goes on after its end");
  if (!outcome)
    for (const auto& phb : phbs_) static_cast<void>(to_default(*phb));
  return outcome;
}

Result<void> PaprTce::restore_window(StateReader& in, Phb& phb, Window& window) {
  const auto page_shift = in.take<std::uint32_t>();
  if (page_shift == 0) return in.ok() ? Result<void>{} : bad("too short");
  const auto address = in.take<std::uint64_t>();
  const auto entries = in.take<std::uint64_t>();
  const auto count = in.take<std::uint64_t>();
  const PhbConfig& config = phb.config;
  const bool known = page_shift < 64 && ((config.page_sizes >> page_shift & 1U) != 0 || page_shift == 12);
  if (!in.ok() || !known || entries == 0 || count > entries || entries > config.window_entries_max ||
      entries > config.table_bytes_max / 8 || entries > iova_max.value >> page_shift ||
      (entries << page_shift) - 1 > iova_max.value - address || (address & ((std::uint64_t{1} << page_shift) - 1)) != 0)
    return bad("a window that this host bridge cannot have");
  const IovaRange range{Iova{address}, Iova{address + ((entries << page_shift) - 1)}};
  for (const Window& other : phb.windows)
    if (other.enabled() && other.range().overlaps(range)) return bad("windows that overlap");
  if (!enable(phb, window, page_shift, address, entries))
    return base::fail(Errc::out_of_memory, Stage::reserve, 0, "PAPR: liobn {:#x}: no memory for its table",
                      window.liobn);
  // A table that is in KVM already takes the entries there; the kernel brings them to the hardware when it is coupled.
  if (window.kvm != nullptr)
    if (auto moved = to_user(phb, window); !moved) return moved;
  const auto view = memory_.view();
  std::uint64_t next = 0;
  for (std::uint64_t i = 0; i < count; ++i) {
    const auto index = in.take<std::uint64_t>();
    const auto tce = in.take<std::uint64_t>();
    if (!in.ok() || index < next || index >= entries || tce == 0 ||
        ((tce & 3) != 0 && (tce & window.page_mask() & ~std::uint64_t{0xfff}) != 0))
      return bad("entries that are out of order, beyond the window, or none");
    next = index + 1;
    window.store(index, tce);
    if (shadow(view, window, index, 1, tce) != hcall::success)
      return base::fail(Errc::limit_reached, Stage::map, 0, "PAPR: liobn {:#x}: not every entry could be shadowed",
                        window.liobn);
  }
  phb.shadow.commit_and_wait();
  if (!phb.shadow.failures().empty()) return phb.shadow.failures().front().error;
  return place(phb, window);
}

}  // namespace iovane::viommu
