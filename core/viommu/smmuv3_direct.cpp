#include "viommu/smmuv3_direct.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

namespace iovane::viommu {
namespace {

namespace smmuv3 = backends::stage1::smmuv3;

constexpr std::uint64_t address_mask = 0x000f'ffff'ffff'ffff;
constexpr std::size_t batch_max = 256;
// Commands, Arm IHI 0070, 4.
constexpr std::uint64_t op_prefetch_config = 0x01, op_prefetch_address = 0x02, op_stream_entry = 0x03,
                        op_stream_entries = 0x04, op_context = 0x05, op_contexts = 0x06, op_tlbi_nh_vaa = 0x13,
                        op_tlbi_nsnh_all = 0x30, op_device_tlb = 0x40, op_sync = 0x46;
// Stream table entries, 5.2.
constexpr std::uint64_t entry_bytes = 64;
constexpr std::uint64_t config_abort = 0, config_bypass = 4, config_first_stage = 5;

constexpr std::uint32_t stream_of(const smmuv3::Command& command) noexcept {
  return static_cast<std::uint32_t>(command.words[0] >> 32);
}

}  // namespace

Smmuv3Direct::Ring Smmuv3Direct::ring_of(std::uint64_t base) noexcept {
  // At most 2^19 entries; the queue is aligned to its size, or to 32 bytes.
  return {base & address_mask & ~std::uint64_t{31}, static_cast<unsigned>(std::min<std::uint64_t>(base & 31, 19))};
}

void Smmuv3Direct::set_stream_table(std::uint64_t base, std::uint32_t config) noexcept {
  table_log2_ = std::min(config & 63U, 32U);
  table_split_ = config >> 6 & 31;
  two_level_ = (config >> 16 & 3) == 1;
  table_base_ = base & address_mask & ~std::uint64_t{63};
  if (enabled_) apply_all();
}

void Smmuv3Direct::set_command_queue(std::uint64_t base) noexcept {
  commands_ = ring_of(base);
  command_cons_ = 0;
}

void Smmuv3Direct::set_event_queue(std::uint64_t base) noexcept {
  events_ = ring_of(base);
  event_prod_ = 0;
  overflow_ = false;
}

Result<void> Smmuv3Direct::add_endpoint(std::uint32_t stream, backends::DeviceId device) {
  endpoints_[stream] = device;
  if (!enabled_) return host_.pass_through(device);
  const auto view = memory_.view();
  apply(view, stream, device);
  return {};
}

Result<void> Smmuv3Direct::set_enabled(bool enabled) {
  if (enabled == enabled_) return {};
  enabled_ = enabled;
  if (enabled) {
    apply_all();
    return {};
  }
  Result<void> worst;
  for (const auto& [stream, device] : endpoints_)
    if (const auto passed = host_.pass_through(device); !passed) worst = passed;
  return worst;
}

bool Smmuv3Direct::read_entry(const GuestMemory::View& view, std::uint32_t stream,
                              std::uint64_t (&words)[2]) const noexcept {
  if (table_log2_ < 32 && stream >> table_log2_ != 0) return false;
  std::uint64_t at = table_base_ + std::uint64_t{stream} * entry_bytes;
  if (two_level_) {
    const auto descriptor = view.read_le64(table_base_ + (std::uint64_t{stream} >> table_split_) * 8);
    if (!descriptor) return false;
    const std::uint64_t span = *descriptor & 31;
    const std::uint64_t index = stream & ((std::uint64_t{1} << table_split_) - 1);
    if (span == 0 || span > 11 || index >> (span - 1) != 0) return false;
    at = (*descriptor & address_mask & ~std::uint64_t{63}) + index * entry_bytes;
  }
  for (unsigned i = 0; i < 2; ++i) {
    const auto word = view.read_le64(at + i * 8);
    if (!word) return false;
    words[i] = *word;
  }
  return true;
}

// An entry that nobody can put into effect blocks the device: it must not go on with what it had.
void Smmuv3Direct::apply(const GuestMemory::View& view, std::uint32_t stream, backends::DeviceId device) noexcept {
  try {
    std::uint64_t words[2] = {};
    const bool valid = read_entry(view, stream, words) && (words[0] & 1) != 0;
    const std::uint64_t config = words[0] >> 1 & 7;
    Result<void> done = make_error(Errc::unsupported, Stage::attach, "");
    if (!valid || config == config_abort)
      done = host_.block(device);
    else if (config == config_bypass)
      done = host_.pass_through(device);
    else if (config == config_first_stage)
      done = host_.use_stream_entry(device, words[0], words[1]);
    if (done) {
      ++stats_.stream_entries;
      return;
    }
  } catch (...) {  // no memory for a table's record
  }
  ++stats_.refused_entries;
  try {
    (void)host_.block(device);
  } catch (...) {
  }
}

void Smmuv3Direct::apply_all() noexcept {
  const auto view = memory_.view();
  for (const auto& [stream, device] : endpoints_) apply(view, stream, device);
}

bool Smmuv3Direct::flush() noexcept {
  if (batch_.empty()) return true;
  const std::size_t taken = host_.invalidate(batch_);
  stats_.forwarded += taken;
  ++stats_.arrays;
  const bool all = taken == batch_.size();
  batch_.clear();
  return all;
}

Smmuv3Direct::CommandError Smmuv3Direct::execute(const GuestMemory::View& view, const Command& command,
                                                 CommandsDone& done) noexcept {
  const auto forward = [&] {
    try {
      batch_.push_back(command);
    } catch (...) {
      return CommandError::abort;
    }
    return batch_.size() < batch_max || flush() ? CommandError::none : CommandError::abort;
  };
  switch (command.words[0] & 0xff) {
    case op_prefetch_config:
    case op_prefetch_address: return CommandError::none;  // hints
    case op_stream_entry:
    case op_stream_entries: {
      // What was invalidated before the new entry is invalidated in the old one.
      if (!flush()) return CommandError::abort;
      if (!enabled_) return CommandError::none;
      const bool one = (command.words[0] & 0xff) == op_stream_entry;
      // 2^(Range + 1) streams; 31 is all of them.
      const auto range = one ? 0U : static_cast<unsigned>(command.words[1] & 31) + 1;
      const std::uint64_t first = range >= 32 ? 0 : std::uint64_t{stream_of(command)} >> range << range;
      const std::uint64_t last = first + ((std::uint64_t{1} << range) - 1);
      for (auto at = endpoints_.lower_bound(static_cast<std::uint32_t>(first));
           at != endpoints_.end() && at->first <= last; ++at)
        apply(view, at->first, at->second);
      return CommandError::none;
    }
    case op_context:
    case op_contexts:
    case op_device_tlb:
      // The host knows these streams only.
      return endpoints_.count(stream_of(command)) != 0 ? forward() : CommandError::none;
    case smmuv3::op_tlbi_nh_all:
    case smmuv3::op_tlbi_nh_asid:
    case smmuv3::op_tlbi_nh_va:
    case op_tlbi_nh_vaa:
    case op_tlbi_nsnh_all: return forward();
    case op_sync: {
      if (!flush()) return CommandError::abort;
      const std::uint64_t signal = command.words[0] >> 12 & 3;  // CS
      if (signal == 1) ++done.interrupts;
      if (signal == 2 && (command.words[1] & address_mask & ~std::uint64_t{3}) != 0)
        view.write_le32(command.words[1] & address_mask & ~std::uint64_t{3},
                        static_cast<std::uint32_t>(command.words[0] >> 32));
      return CommandError::none;
    }
    default: return CommandError::illegal;
  }
}

Smmuv3Direct::CommandsDone Smmuv3Direct::write_command_tail(std::uint32_t prod) noexcept {
  CommandsDone done;
  const std::uint32_t tail = commands_.pointer(prod);
  const auto view = memory_.view();
  // At most a full queue.
  for (std::uint32_t left = commands_.mask() + 1; command_cons_ != tail && left != 0; --left) {
    const std::uint64_t at = commands_.base + std::uint64_t{commands_.index(command_cons_)} * sizeof(Command);
    const auto low = view.read_le64(at), high = view.read_le64(at + 8);
    done.error = low && high ? execute(view, {{*low, *high}}, done) : CommandError::abort;
    if (done.error != CommandError::none) break;
    ++stats_.commands;
    command_cons_ = commands_.next(command_cons_);
  }
  // A queue that ends without CMD_SYNC has promised nothing yet; it is not left lying all the same.
  if (!flush() && done.error == CommandError::none) done.error = CommandError::abort;
  done.cons = command_cons_;
  return done;
}

Result<std::uint32_t> Smmuv3Direct::deliver_events(std::uint32_t cons) noexcept {
  const auto view = memory_.view();
  const auto lose = [&](std::uint32_t count) {
    if (count == 0) return;
    stats_.lost_events += count;
    overflow_ = !overflow_;
  };
  while (true) {
    backends::stage1::GuestEvent event;
    std::uint32_t lost = 0;
    const auto got = host_.read_events({&event, 1}, lost);
    if (!got) return got.error();
    lose(lost);
    if (*got == 0) break;
    if (events_.base == 0 || events_.full(event_prod_, cons)) {
      lose(1);
      continue;
    }
    std::array<std::byte, sizeof event.words> bytes;
    std::memcpy(bytes.data(), event.words.data(), bytes.size());
    if (!view.write(events_.base + std::uint64_t{events_.index(event_prod_)} * bytes.size(), bytes)) {
      lose(1);
      continue;
    }
    event_prod_ = events_.next(event_prod_);
    ++stats_.events;
  }
  return event_prod_ | (overflow_ ? 1U << 31 : 0);
}

}  // namespace iovane::viommu
