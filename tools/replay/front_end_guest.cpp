#include "replay/front_end_guest.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>
#include <vector>

#include "base/error_text.hpp"
#include "viommu/papr.hpp"
#include "viommu/virtio_iommu.hpp"
#include "viommu/vtd.hpp"

namespace iovane::replay {

Result<std::unique_ptr<GuestTables>> GuestTables::create() {
  void* const mapped =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED)
    return base::fail(Errc::out_of_memory, Stage::open, errno, "no address space for {} bytes of guest tables", bytes);
  return std::unique_ptr<GuestTables>{new GuestTables{static_cast<std::byte*>(mapped)}};
}

GuestTables::~GuestTables() { ::munmap(data_, bytes); }

namespace {

constexpr std::uint64_t page = 4096;

// virtio-iommu: a MAP or UNMAP request per event, one notification per batch.
class VirtioIommuGuest final : public FrontEndGuest {
 public:
  VirtioIommuGuest(const viommu::GuestMemory& memory, std::size_t batch_max) : unit_{memory, config(batch_max)} {
    unit_.set_features(unit_.features());
  }

  bool batches() const noexcept override { return true; }

  Result<void> attach(viommu::ShadowTarget& target) override {
    if (auto added = unit_.add_endpoint(endpoint, &target, {}); !added) return added;
    Buffer& buffer = buffers_[0];
    buffer.put_head(viommu::virtio::RequestType::attach);
    buffer.put(8, std::uint64_t{endpoint});
    buffer.put(16, std::uint32_t{0});
    buffer.bytes = viommu::virtio::attach_bytes;
    hand_over(1);
    send(1);
    return buffer.ok() ? Result<void>{} : refused(buffer);
  }
  Result<void> detach(viommu::ShadowTarget&) override {
    attached_ = false;
    return unit_.remove_endpoint(endpoint);
  }

  void write(std::span<const Operation> batch) noexcept override {
    for (std::size_t i = 0; i < batch.size(); ++i) {
      const Operation& op = batch[i];
      Buffer& buffer = buffers_[i];
      const bool map = op.kind == trace::EventKind::map;
      buffer.put_head(map ? viommu::virtio::RequestType::map : viommu::virtio::RequestType::unmap);
      buffer.put(8, op.range.start.value);
      buffer.put(16, op.range.last.value);
      buffer.put(24, map ? guest_ram_start + op.memory : 0);
      buffer.put(32, viommu::virtio::map_read | viommu::virtio::map_write);
      buffer.bytes = map ? viommu::virtio::map_bytes : viommu::virtio::unmap_bytes;
    }
    hand_over(batch.size());
  }
  void notify(std::span<const Operation> batch, std::span<Verdict> verdicts) noexcept override {
    send(batch.size());
    for (std::size_t i = 0; i < batch.size(); ++i)
      verdicts[i] = {buffers_[i].ok() ? Error{} : refused(buffers_[i]), batch[i].range.length()};
  }

 private:
  static constexpr std::uint32_t endpoint = 1;
  static constexpr std::uint32_t domain = 1;
  static constexpr std::size_t at_once = 64;

  struct Buffer {
    alignas(8) std::array<std::byte, viommu::virtio::map_bytes> in{};
    std::array<std::byte, viommu::virtio::tail_bytes> out{};
    std::size_t bytes = 0;
    // As a driver does it: one store for each field, little endian.
    template <typename Word>
    void put(std::size_t at, Word value) noexcept {
      if constexpr (std::endian::native == std::endian::big)
        value = sizeof value == 8 ? static_cast<Word>(__builtin_bswap64(value))
                                  : static_cast<Word>(__builtin_bswap32(static_cast<std::uint32_t>(value)));
      std::memcpy(in.data() + at, &value, sizeof value);
    }
    void put_head(viommu::virtio::RequestType type) noexcept {
      put(0, static_cast<std::uint64_t>(type) | std::uint64_t{domain} << 32);
    }
    bool ok() const noexcept { return out[0] == std::byte{0}; }
  };

  static viommu::VirtioIommuConfig config(std::size_t batch_max) {
    viommu::VirtioIommuConfig out;
    out.bypass_at_boot = false;
    out.requests_max = static_cast<std::uint32_t>(std::max(batch_max, at_once));
    return out;
  }
  static Error refused(const Buffer& buffer) {
    return base::fail(Errc::io_error, Stage::map, 0, "virtio-iommu answered with status {}",
                      static_cast<unsigned>(buffer.out[0]));
  }
  // Puts the buffers into the queue, as their descriptors would.
  void hand_over(std::size_t count) noexcept {
    for (std::size_t i = 0; i < count; ++i) {
      buffers_[i].out[0] = std::byte{0xff};
      requests_[i] = {std::span{buffers_[i].in}.first(buffers_[i].bytes), buffers_[i].out, i};
    }
  }
  void send(std::size_t count) noexcept {
    static_cast<void>(unit_.handle(std::span{requests_}.first(count)));
    unit_.finish();
    static_cast<void>(unit_.take_answers(answers_));
  }

  viommu::VirtioIommu unit_;
  std::array<Buffer, at_once> buffers_{};
  std::array<viommu::VirtioIommu::Request, at_once> requests_{};
  std::array<viommu::VirtioIommu::Answer, at_once> answers_{};
  bool attached_ = false;
};

// VT-d: for each event page table entries, an invalidation of the smallest block that holds them, and a wait, as Linux
// does it. All of a batch are in the queue when the unit looks, as those of a guest with many processors are; or
// (`each`) the unit looks after every one, as for a guest with one.
class VtdGuest final : public FrontEndGuest {
 public:
  VtdGuest(const viommu::GuestMemory& memory, const GuestTables& tables, bool each)
      : tables_{tables}, each_{each}, unit_{memory, config(), events_} {}

  bool batches() const noexcept override { return !each_; }

  Result<void> attach(viommu::ShadowTarget& target) override {
    tables_.store(root, context | 1);
    tables_.store(context + source * 16 + 8, 2 | std::uint64_t{domain} << 8);  // four levels
    tables_.store(context + source * 16, top | 1);
    if (!unit_.set_queue(queue)) return make_error(Errc::io_error, Stage::open, "VT-d refused its queue");
    static_cast<void>(unit_.set_root_table(root));
    static_cast<void>(unit_.set_translation(true));
    unit_.finish();
    return unit_.add_endpoint(source, std::nullopt, &target);
  }
  Result<void> detach(viommu::ShadowTarget&) override { return unit_.remove_endpoint(source, std::nullopt); }

  void write(std::span<const Operation> batch) noexcept override {
    for (const Operation& op : batch) {
      const bool map = op.kind == trace::EventKind::map;
      write_entries(op.range, map ? guest_ram_start + op.memory : 0, map ? 3 : 0);
      invalidate(op.range);
      enqueue(wait_with_status | ++waited_ << 32, status);
    }
  }
  void notify(std::span<const Operation> batch, std::span<Verdict> verdicts) noexcept override {
    events_.error = {};
    if (unit_.write_tail(tail_ * 16) != viommu::Progress::done) unit_.finish();
    Error error = events_.error;
    if (error.ok() && static_cast<std::uint32_t>(tables_.load(status)) != static_cast<std::uint32_t>(waited_))
      error = make_error(Errc::io_error, Stage::map, "VT-d did not complete a wait descriptor");
    for (std::size_t i = 0; i < batch.size(); ++i) verdicts[i] = {error, batch[i].range.length()};
  }

 private:
  static constexpr std::uint16_t source = 0x08;
  static constexpr std::uint16_t domain = 1;
  static constexpr std::uint64_t root = 0x1000;
  static constexpr std::uint64_t context = 0x2000;
  static constexpr std::uint64_t top = 0x3000;
  static constexpr std::uint64_t status = 0x4000;
  static constexpr std::uint64_t queue = 0x1'0000;  // one page
  static constexpr std::uint64_t queue_entries = 256;
  static constexpr std::uint64_t first_table = 0x10'0000;
  static constexpr std::uint64_t wait_with_status = 0x25;
  static constexpr unsigned mask_max = 18;

  struct Events final : viommu::VtdEvents {
    Error error{};
    void shadow_failed(std::uint16_t, const Error& e) noexcept override { error = e; }
    void queue_error(std::uint64_t) noexcept override {
      error = make_error(Errc::io_error, Stage::map, "VT-d refused a descriptor");
    }
  };

  static viommu::VtdConfig config() {
    viommu::VtdConfig out;
    out.capabilities.second_levels_mask = 7U << 3;
    out.capabilities.guest_address_width = 48;
    return out;
  }

  std::uint64_t level_1_table(std::uint64_t iova) noexcept {
    std::uint64_t table = top;
    for (unsigned level = 4; level > 1; --level) {
      const std::uint64_t slot = table + (iova >> (12 + 9 * (level - 1)) & 511) * 8;
      if (tables_.load(slot) == 0) {
        tables_.store(slot, next_table_ | 3);
        next_table_ += page;
      }
      table = tables_.load(slot) & ~(page - 1);
    }
    return table;
  }
  void write_entries(const IovaRange& range, std::uint64_t gpa, std::uint64_t access) noexcept {
    std::uint64_t table = 0;
    for (std::uint64_t at = range.start.value;; at += page, gpa += page) {
      if (table == 0 || (at & 0x1f'ffff) == 0) table = level_1_table(at);
      tables_.store(table + (at >> 12 & 511) * 8, access == 0 ? 0 : gpa | access);
      if (range.last.value - at < page) break;
    }
  }
  void invalidate(const IovaRange& range) noexcept {
    const auto order = static_cast<unsigned>(std::bit_width((range.start.value ^ range.last.value) >> 12));
    if (order > mask_max) {
      enqueue(0x22 | std::uint64_t{domain} << 16, 0);
    } else {
      enqueue(0x32 | std::uint64_t{domain} << 16, (range.start.value & ~(page - 1)) | order);
    }
  }
  void enqueue(std::uint64_t low, std::uint64_t high) noexcept {
    tables_.store(queue + tail_ * 16, low);
    tables_.store(queue + tail_ * 16 + 8, high);
    tail_ = (tail_ + 1) % queue_entries;
  }

  const GuestTables& tables_;
  bool each_;
  Events events_;
  viommu::Vtd unit_;
  std::uint64_t next_table_ = first_table;
  std::uint64_t tail_ = 0;
  std::uint64_t waited_ = 0;
};

// PAPR: H_PUT_TCE for one page, H_PUT_TCE_INDIRECT with lists of up to 512 for more, H_STUFF_TCE to unmap.
class PaprGuest final : public FrontEndGuest {
 public:
  PaprGuest(const viommu::GuestMemory& memory, const GuestTables& tables) : tables_{tables}, unit_{memory, nullptr} {}

  bool batches() const noexcept override { return false; }

  Result<void> attach(viommu::ShadowTarget& target) override {
    viommu::PhbConfig phb;
    phb.liobn = liobn;
    phb.dma32_bytes = window_bytes;
    if (auto added = unit_.add_phb(phb); !added) return added;
    return unit_.add_device(phb.buid, &target);
  }
  Result<void> detach(viommu::ShadowTarget& target) override { return unit_.remove_device(0, &target); }

  // The list of the first hypercall of a batch, which is one operation.
  void write(std::span<const Operation> batch) noexcept override {
    listed_ = !batch.empty() && batch[0].kind == trace::EventKind::map;
    if (listed_) write_list(guest_ram_start + batch[0].memory, (batch[0].range.span() >> 12) + 1);
  }
  void notify(std::span<const Operation> batch, std::span<Verdict> verdicts) noexcept override {
    for (std::size_t i = 0; i < batch.size(); ++i) verdicts[i] = {call_for(batch[i]), batch[i].range.length()};
  }

 private:
  static constexpr std::uint32_t liobn = 0x8000'0000;
  static constexpr std::uint64_t window_bytes = std::uint64_t{1} << 32;
  static constexpr std::uint64_t list = 0x1'0000;

  void write_list(std::uint64_t gpa, std::uint64_t pages) const noexcept {
    for (std::uint64_t i = 0; i < std::min(pages, viommu::hcall::indirect_entries_max); ++i)
      tables_.store(list + i * 8, __builtin_bswap64((gpa + i * page) | 3));
  }
  Error call_for(const Operation& op) noexcept {
    const std::uint64_t pages = (op.range.span() >> 12) + 1;
    if (op.range.last.value >= window_bytes)
      return make_error(Errc::unsupported, Stage::map, "the trace uses addresses beyond the PAPR window");
    return op.kind == trace::EventKind::map ? put(op.range.start.value, guest_ram_start + op.memory, pages)
                                            : call(viommu::hcall::stuff_tce, {liobn, op.range.start.value, 0, pages});
  }
  Error put(std::uint64_t at, std::uint64_t gpa, std::uint64_t pages) noexcept {
    if (pages == 1) return call(viommu::hcall::put_tce, {liobn, at, gpa | 3, 0});
    while (pages != 0) {
      const std::uint64_t now = std::min(pages, viommu::hcall::indirect_entries_max);
      if (!std::exchange(listed_, false)) write_list(gpa, now);
      if (const Error error = call(viommu::hcall::put_tce_indirect, {liobn, at, list, now}); !error.ok()) return error;
      at += now * page, gpa += now * page, pages -= now;
    }
    return {};
  }
  Error call(std::uint64_t number, const std::array<std::uint64_t, 4>& arguments) noexcept {
    const auto answer = unit_.call_and_wait(number, arguments);
    if (answer.status == viommu::hcall::success) return {};
    return base::fail(Errc::io_error, Stage::map, 0, "hypercall {:#x} returned {}", number, answer.status);
  }

  const GuestTables& tables_;
  bool listed_ = false;  // the next list is written already
  viommu::PaprTce unit_;
};

}  // namespace

std::unique_ptr<FrontEndGuest> make_virtio_iommu_guest(const viommu::GuestMemory& memory, std::size_t batch_max) {
  return std::make_unique<VirtioIommuGuest>(memory, batch_max);
}
std::unique_ptr<FrontEndGuest> make_vtd_guest(const viommu::GuestMemory& memory, const GuestTables& tables, bool each) {
  return std::make_unique<VtdGuest>(memory, tables, each);
}
std::unique_ptr<FrontEndGuest> make_papr_guest(const viommu::GuestMemory& memory, const GuestTables& tables) {
  return std::make_unique<PaprGuest>(memory, tables);
}

}  // namespace iovane::replay
