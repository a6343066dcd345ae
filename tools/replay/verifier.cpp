#include "replay/verifier.hpp"

#include <array>

#include "base/error_text.hpp"
#include "replay/guest_memory.hpp"

namespace iovane::replay {
namespace {

using trace::granule;

template <typename... Args>
Error differs(fmt::format_string<Args...> format, Args&&... args) {
  return base::fail(Errc::io_error, Stage::validate, 0, format, std::forward<Args>(args)...);
}

/// The first and the last granule of a range: what lies between was entered by the same call.
std::array<std::uint64_t, 2> ends_of(IovaRange range) noexcept { return {0, range.span() - (granule - 1)}; }

}  // namespace

Result<void> Verifier::follow(std::span<const Operation> batch, std::span<const Verdict> verdicts) {
  for (std::size_t i = 0; i < batch.size(); ++i) {
    const Operation& op = batch[i];
    if (op.kind == trace::EventKind::map) {
      if (const auto mapped = reference_.map(op.range, op.memory); !mapped) return mapped.error();
      continue;
    }
    const auto removed = reference_.unmap(op.range);
    if (!removed) return removed.error();
    if (*removed != verdicts[i].bytes)
      return differs("unmap of [{:#x}, {:#x}] removed {} bytes, the reference says {}", op.range.start.value,
                     op.range.last.value, verdicts[i].bytes.value, removed->value);
  }
  return {};
}

Result<void> Verifier::compare_index() {
  auto expected = reference_.live().begin();
  const auto stop = reference_.live().end();
  std::uint64_t seen = 0;  // bytes of `expected` that earlier entries were
  Result<void> verdict;
  const bool kept = target_.visit_index([&](IovaRange range, std::uint64_t memory) {
    ++checks_.index_entries;
    if (!verdict) return;
    const bool fits = expected != stop && expected->first.value + seen == range.start.value &&
                      expected->second.memory + seen == memory && range.last <= expected->second.last;
    if (fits && range.last < expected->second.last && target_.may_split()) {
      seen += range.length().value;
      return;
    }
    if (!fits || range.last != expected->second.last)
      verdict = differs("the index has [{:#x}, {:#x}] -> {:#x}, the reference {}", range.start.value, range.last.value,
                        memory,
                        expected == stop ? std::string{"nothing there"}
                                         : fmt::format("[{:#x}, {:#x}] -> {:#x}", expected->first.value,
                                                       expected->second.last.value, expected->second.memory));
    else
      ++expected, seen = 0;
  });
  if (verdict && kept && expected != stop)
    return differs("the index lacks [{:#x}, {:#x}]", expected->first.value, expected->second.last.value);
  return verdict;
}

Result<void> Verifier::read_live(IovaRange range, std::uint64_t memory) {
  for (const std::uint64_t at : ends_of(range)) {
    ++checks_.live_reads;
    const auto seen = host_.read_as_device(Iova{range.start.value + at});
    if (!seen) return differs("the device faults at {:#x}, which is mapped", range.start.value + at);
    if (*seen != GuestMemory::stamp(memory + at))
      return differs("the device reads other memory at {:#x} than offset {:#x}", range.start.value + at, memory + at);
  }
  return {};
}

Result<void> Verifier::read_dead(IovaRange range) {
  for (const std::uint64_t at : ends_of(range)) {
    ++checks_.dead_reads;
    if (host_.read_as_device(Iova{range.start.value + at}))
      return differs("the device still reads at {:#x}, which is unmapped", range.start.value + at);
  }
  return {};
}

Result<void> Verifier::sweep() {
  for (const auto& [start, live] : reference_.live())
    if (const auto read = read_live({start, live.last}, live.memory); !read) return read;
  return {};
}

Result<void> Verifier::check(std::span<const Operation> batch, std::span<const Verdict> verdicts) {
  ++checks_.batches;
  if (const auto followed = follow(batch, verdicts); !followed) return followed;
  if (const auto same = compare_index(); !same) return same;
  if (!host_.can_read_as_device()) return {};
  for (const Operation& op : batch) {
    const auto read = op.kind == trace::EventKind::map ? read_live(op.range, op.memory) : read_dead(op.range);
    if (!read) return read;
  }
  return checks_.batches % sweep_batches == 0 ? sweep() : Result<void>{};
}

Result<void> Verifier::check_end(Bytes removed) {
  if (removed != reference_.live_bytes())
    return differs("unmapping everything removed {} bytes, the reference has {} live", removed.value,
                   reference_.live_bytes().value);
  const trace::Reference was = reference_;
  reference_.clear();
  if (const auto same = compare_index(); !same) return same;
  if (!host_.can_read_as_device()) return {};
  for (const auto& [start, live] : was.live())
    if (const auto read = read_dead({start, live.last}); !read) return read;
  return {};
}

}  // namespace iovane::replay
