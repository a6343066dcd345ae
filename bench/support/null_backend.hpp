// A backend that does nothing: what is measured on it is the engine alone.
#pragma once

#include <memory>

#include "backends/backend.hpp"

namespace iovane::bench {

class NullSpace final : public backends::BackendSpace {
 public:
  NullSpace() noexcept { facts_.capabilities = backends::Capability::span_unmap | backends::Capability::unmap_all; }
  const backends::SpaceFacts& facts() const noexcept override { return facts_; }
  /// Claims success. The bytes of an unmap are its span, which is right where a benchmark leaves no holes.
  void execute(std::span<const backends::BackendOp> ops,
               std::span<backends::BackendOpResult> results) noexcept override {
    for (std::size_t i = 0; i < ops.size(); ++i) results[i] = {{}, ops[i].range.length()};
  }
  Result<Bytes> unmap_all() noexcept override { return Bytes{0}; }
  Result<backends::RegionId> register_memory(const backends::MemoryRange&) override {
    return backends::RegionId{++regions_};
  }
  Result<void> unregister_memory(backends::RegionId) override { return {}; }
  Result<backends::AttachedDevice> attach(const backends::DeviceSource&) override { return backends::AttachedDevice{}; }
  Result<void> detach(backends::DeviceId) override { return {}; }
  Result<std::vector<IovaRange>> usable_ranges() override {
    return std::vector<IovaRange>{{Iova{0}, Iova{(std::uint64_t{1} << 48) - 1}}};
  }
  Result<void> promise(std::span<const IovaRange>) override { return {}; }
  backends::Headroom headroom() noexcept override { return {}; }

 private:
  backends::SpaceFacts facts_;
  std::uint32_t regions_ = 0;
};

class NullBackend final : public backends::Backend {
 public:
  backends::Interface interface() const noexcept override { return backends::Interface::iommufd; }
  Result<std::unique_ptr<backends::BackendSpace>> create_space(const backends::SpaceOptions&) override {
    return std::unique_ptr<backends::BackendSpace>{std::make_unique<NullSpace>()};
  }
  Result<backends::AttachedDevice> move_device(backends::BackendSpace&, backends::DeviceId,
                                               backends::BackendSpace&) override {
    return make_error(Errc::unsupported, Stage::attach, "there are no devices here");
  }
};

}  // namespace iovane::bench
