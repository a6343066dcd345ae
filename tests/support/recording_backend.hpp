// A backend for exact tests of the engine: records every operation, keeps the mappings a kernel would have, and fails
// when told to. Its unmap is as iommufd's: a failing span unmap may have removed some of its mappings.
#pragma once

#include <cerrno>
#include <cstdint>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "backends/backend.hpp"

namespace iovane::testing {

class RecordingSpace final : public backends::BackendSpace {
 public:
  using Op = backends::BackendOp;
  struct Live {
    IovaRange range;
    std::uint64_t memory;
    Access access;
    backends::RegionId region{};
  };

  RecordingSpace() { facts_.capabilities = backends::Capability::span_unmap | backends::Capability::unmap_all; }

  backends::SpaceFacts facts_;
  std::vector<std::vector<Op>> batches;  ///< what execute() was given, call by call
  std::map<std::uint64_t, Live> live;    ///< by first address
  std::vector<IovaRange> usable{{Iova{0x1000}, Iova{0xfedf'ffff}}, {Iova{0xfef0'0000}, Iova{0xffff'ffff'ffff}}};
  /// Decides whether an operation fails; ok() lets it pass.
  std::function<Error(const Op&)> fail = [](const Op&) { return Error{}; };
  std::function<void()> before_batch = [] {};
  std::uint32_t regions_live = 0;
  std::uint32_t regions_dropped_early = 0;  ///< mappings that lived when their region was unregistered

  const backends::SpaceFacts& facts() const noexcept override { return facts_; }

  void execute(std::span<const Op> ops, std::span<backends::BackendOpResult> results) noexcept override {
    before_batch();
    batches.emplace_back(ops.begin(), ops.end());
    for (std::size_t i = 0; i < ops.size(); ++i) results[i] = run(ops[i]);
  }
  Result<Bytes> unmap_all() noexcept override {
    if (const Error error = fail({backends::OpKind::unmap, Access::none, {}, IovaRange::everything(), 0})) return error;
    std::uint64_t bytes = 0;
    for (const auto& [start, mapping] : live) bytes += mapping.range.length().value;
    live.clear();
    return Bytes{bytes};
  }
  Result<backends::RegionId> register_memory(const backends::MemoryRange&) override {
    ++regions_live;
    return backends::RegionId{++last_region_};
  }
  Result<void> unregister_memory(backends::RegionId region) override {
    --regions_live;
    for (const auto& [start, mapping] : live) regions_dropped_early += mapping.region == region ? 1 : 0;
    return {};
  }
  Result<backends::AttachedDevice> attach(const backends::DeviceSource& source) override {
    backends::AttachedDevice device;
    device.id = {1};
    device.name = source.pci_address;
    return device;
  }
  Result<void> detach(backends::DeviceId) override { return {}; }
  Result<std::vector<IovaRange>> usable_ranges() override { return usable; }
  Result<void> promise(std::span<const IovaRange>) override {
    return make_error(Errc::unsupported, Stage::reserve, "not here");
  }
  backends::Headroom headroom() noexcept override { return {}; }

 private:
  backends::BackendOpResult run(const Op& op) {
    if (op.kind == backends::OpKind::unmap) return unmap(op);
    if (const Error error = fail(op)) return {error, {}};
    if (op.kind == backends::OpKind::replace) live.erase(op.range.start.value);
    for (const auto& [start, mapping] : live)
      if (mapping.range.overlaps(op.range))
        return {make_error(Errc::iova_busy, Stage::map, EEXIST, "live in the backend"), {}};
    live[op.range.start.value] = {op.range, op.memory, op.access, op.region};
    return {{}, op.range.length()};
  }
  // Removes mapping by mapping in address order, and stops at the first that is told to fail.
  backends::BackendOpResult unmap(const Op& op) {
    std::uint64_t bytes = 0;
    for (auto it = live.lower_bound(op.range.start.value); it != live.end() && op.range.contains(it->second.range);) {
      Op part = op;
      part.range = it->second.range;
      if (const Error error = fail(part)) return {error, Bytes{bytes}};
      bytes += it->second.range.length().value;
      it = live.erase(it);
    }
    if (bytes == 0) return {make_error(Errc::not_found, Stage::unmap, ENOENT, "nothing there"), {}};
    return {{}, Bytes{bytes}};
  }

  std::uint32_t last_region_ = 0;
};

/// Hands out one RecordingSpace that the test keeps a pointer to (valid until the address space closes).
class RecordingBackend final : public backends::Backend {
 public:
  explicit RecordingBackend(RecordingSpace*& out) : space_{std::make_unique<RecordingSpace>()} { out = space_.get(); }
  backends::Interface interface() const noexcept override { return backends::Interface::iommufd; }
  Result<std::unique_ptr<backends::BackendSpace>> create_space(const backends::SpaceOptions&) override {
    if (!space_) return make_error(Errc::limit_reached, Stage::open, "one space only");
    return std::unique_ptr<backends::BackendSpace>{std::move(space_)};
  }
  Result<backends::AttachedDevice> move_device(backends::BackendSpace&, backends::DeviceId,
                                               backends::BackendSpace&) override {
    return make_error(Errc::unsupported, Stage::attach, "not here");
  }

 private:
  std::unique_ptr<RecordingSpace> space_;
};

}  // namespace iovane::testing
