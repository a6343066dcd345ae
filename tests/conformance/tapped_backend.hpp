// A backend that passes everything on and lets the test keep hold of the space inside: the engine owns what it is
// given, and the witness needs the kernel's space for its scratch page.
#pragma once

#include <memory>
#include <utility>

#include "backends/backend.hpp"

namespace iovane::test {

class TappedSpace final : public backends::BackendSpace {
 public:
  explicit TappedSpace(std::unique_ptr<backends::BackendSpace> inner) : inner_{std::move(inner)} {}
  backends::BackendSpace& inner() { return *inner_; }

  const backends::SpaceFacts& facts() const noexcept override { return inner_->facts(); }
  void execute(std::span<const backends::BackendOp> ops,
               std::span<backends::BackendOpResult> results) noexcept override {
    inner_->execute(ops, results);
  }
  Result<Bytes> unmap_all() noexcept override { return inner_->unmap_all(); }
  Result<backends::RegionId> register_memory(const backends::MemoryRange& memory) override {
    return inner_->register_memory(memory);
  }
  Result<void> unregister_memory(backends::RegionId region) override { return inner_->unregister_memory(region); }
  void memory_changed(std::uint64_t start, std::uint64_t last) noexcept override {
    inner_->memory_changed(start, last);
  }
  backends::SpaprControl* spapr() noexcept override { return inner_->spapr(); }
  Result<backends::AttachedDevice> attach(const backends::DeviceSource& source) override {
    return inner_->attach(source);
  }
  Result<void> detach(backends::DeviceId device) override { return inner_->detach(device); }
  Result<std::vector<IovaRange>> usable_ranges() override { return inner_->usable_ranges(); }
  Result<void> promise(std::span<const IovaRange> ranges) override { return inner_->promise(ranges); }
  backends::Headroom headroom() noexcept override { return inner_->headroom(); }
  Result<void> start_dirty_tracking(backends::DirtyHarvest& harvest) override {
    return inner_->start_dirty_tracking(harvest);
  }
  Result<void> stop_dirty_tracking() override { return inner_->stop_dirty_tracking(); }
  Result<void> read_dirty(const IovaRange& range, std::span<std::uint64_t> bitmap) noexcept override {
    return inner_->read_dirty(range, bitmap);
  }

 private:
  std::unique_ptr<backends::BackendSpace> inner_;
};

class TappedBackend final : public backends::Backend {
 public:
  /// `last` becomes the inner space of the newest address space; valid while that lives.
  TappedBackend(std::unique_ptr<backends::Backend> inner, backends::BackendSpace*& last)
      : inner_{std::move(inner)}, last_{last} {}

  backends::Interface interface() const noexcept override { return inner_->interface(); }
  Result<std::unique_ptr<backends::BackendSpace>> create_space(const backends::SpaceOptions& options) override {
    auto made = inner_->create_space(options);
    if (!made) return made.error();
    auto tapped = std::make_unique<TappedSpace>(*std::move(made));
    last_ = &tapped->inner();
    return std::unique_ptr<backends::BackendSpace>{std::move(tapped)};
  }
  Result<backends::AttachedDevice> move_device(backends::BackendSpace& from, backends::DeviceId device,
                                               backends::BackendSpace& to) override {
    return inner_->move_device(static_cast<TappedSpace&>(from).inner(), device, static_cast<TappedSpace&>(to).inner());
  }
  std::vector<IovaRange> reserved_by(const backends::DeviceSource& source) override {
    return inner_->reserved_by(source);
  }

 private:
  std::unique_ptr<backends::Backend> inner_;
  backends::BackendSpace*& last_;
};

}  // namespace iovane::test
