#include "backends/stage1/invalidation.hpp"

#include <array>

#include "backends/kernel_call.hpp"
#include "backends/uapi/iommufd.hpp"

namespace iovane::backends::stage1 {
namespace {

namespace uapi = backends::uapi::iommufd;

constexpr int attempts_max = 4;  // calls in a row that get nowhere

/// Hands the array over, again from where the kernel stopped.
bool issue(Kernel& kernel, int fd, std::uint32_t object, std::uint32_t type, const void* entries,
           std::uint32_t entry_bytes, std::uint32_t count) noexcept {
  const auto* next = static_cast<const std::byte*>(entries);
  for (int attempt = 0; attempt < attempts_max;) {
    uapi::HwptInvalidate call_{.hwpt_id = object,
                               .data_uptr = reinterpret_cast<std::uintptr_t>(next),
                               .data_type = type,
                               .entry_len = entry_bytes,
                               .entry_num = count};
    const int why = call(kernel, fd, call_);
    if (why == 0 && call_.entry_num == count) return true;
    // An error found before the first entry leaves the number as it was: then nothing is known to be done.
    const std::uint32_t done = call_.entry_num < count ? call_.entry_num : 0;
    attempt = done == 0 ? attempt + 1 : 0;
    next += std::size_t{done} * entry_bytes;
    count -= done;
  }
  return false;
}

bool invalidate_smmuv3(Kernel& kernel, int fd, const InvalidationTarget& target, std::span<const IovaRange> spans,
                       bool everything, bool leaf) noexcept {
  std::array<smmuv3::Command, commands_max> commands;
  std::size_t count = 0;
  everything = everything || spans.size() >= commands.size();
  for (const IovaRange& span : spans) {
    if (everything) break;
    const std::size_t more = smmuv3::commands_for(span, target.asid, target.range_invalidation, leaf, &commands[count],
                                                  commands.size() - count);
    everything = more == 0 || (count += more) == commands.size();
  }
  if (everything) {
    commands[0] = smmuv3::tlbi_asid(target.asid);
    count = 1;
  }
  return issue(kernel, fd, target.object, uapi::viommu_invalidate_data_arm_smmuv3, commands.data(), sizeof commands[0],
               static_cast<std::uint32_t>(count));
}

bool invalidate_vtd(Kernel& kernel, int fd, const InvalidationTarget& target, std::span<const IovaRange> spans,
                    bool everything, bool leaf) noexcept {
  std::array<uapi::HwptVtdS1Invalidate, commands_max> entries{};
  std::size_t count = 0;
  everything = everything || spans.size() > entries.size();
  if (everything) {
    entries[count++] = {.addr = 0, .npages = ~std::uint64_t{0}, .flags = leaf ? uapi::vtd_inv_flags_leaf : 0};
  } else {
    for (const IovaRange& span : spans)
      entries[count++] = {
          .addr = span.start.value, .npages = (span.span() >> 12) + 1, .flags = leaf ? uapi::vtd_inv_flags_leaf : 0};
  }
  return issue(kernel, fd, target.object, uapi::hwpt_invalidate_data_vtd_s1, entries.data(), sizeof entries[0],
               static_cast<std::uint32_t>(count));
}

}  // namespace

bool invalidate(Kernel& kernel, int fd, const InvalidationTarget& target, std::span<const IovaRange> spans,
                bool everything, bool leaf) noexcept {
  if (target.architecture == Architecture::vtd) return invalidate_vtd(kernel, fd, target, spans, everything, leaf);
  return invalidate_smmuv3(kernel, fd, target, spans, everything, leaf);
}

}  // namespace iovane::backends::stage1
