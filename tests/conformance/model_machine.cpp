#include "conformance/model_machine.hpp"

#include <gtest/gtest.h>

#include "backends/model/model_kernel.hpp"
#include "backends/spapr_tce/spapr_control.hpp"

namespace iovane::test {
namespace {

using namespace backends;

class ModelWitness final : public Witness {
 public:
  explicit ModelWitness(model::SimulatedDevice& device) : device_{device} {}

  std::vector<std::byte> read(Iova from, std::size_t length) override {
    std::vector<std::byte> bytes(length, std::byte{0xa5});
    device_.dma_read(from, bytes);
    return bytes;
  }
  void write(Iova to, std::span<const std::byte> bytes) override { device_.dma_write(to, bytes); }

 private:
  model::SimulatedDevice& device_;
};

class ModelMachine final : public Machine {
 public:
  explicit ModelMachine(std::unique_ptr<model::ModelKernel> kernel) : kernel_{std::move(kernel)} {}
  ~ModelMachine() override {
    // Whatever a test did, the host has everything back.
    EXPECT_EQ(kernel_->usage(), model::ModelUsage{});
  }

  Kernel& kernel() override { return *kernel_; }
  std::vector<std::string> devices() override {
    std::vector<std::string> list;
    for (std::size_t i = 0; i < kernel_->device_count(); ++i) list.push_back(kernel_->device(i).address());
    return list;
  }
  std::unique_ptr<Witness> witness(BackendSpace&, const AttachedDevice& device) override {
    auto* const found = kernel_->device(device.name);
    return found != nullptr ? std::make_unique<ModelWitness>(*found) : nullptr;
  }
  bool freeze(BackendSpace& space, const AttachedDevice&) override {
    SpaprEeh* const eeh = space.spapr() != nullptr ? space.spapr()->eeh() : nullptr;
    return eeh != nullptr && eeh->inject({.wide = false, .function = 4, .address = 0, .mask = 0});
  }
  bool frozen_device_is_stopped() const override { return true; }
  void pages_leave(std::span<std::byte> memory) override { kernel_->pages_leave(memory.data(), memory.size()); }

 private:
  std::unique_ptr<model::ModelKernel> kernel_;
};

}  // namespace

std::unique_ptr<Machine> make_model_machine(const MachineOptions& options) {
  model::ModelOptions host;
  host.memlock = {.limit = options.memlock, .ipc_lock = false};
  if (options.interface == Interface::spapr_v1 || options.interface == Interface::spapr_v2) {
    host.iommufd = false;
    host.spapr = model::SpaprOptions{};
    for (model::DeviceOptions& device : host.devices) device.reserved.clear();
  }
  if (options.interface == Interface::stage1) host.iommus.front().nesting = model::Nesting::smmuv3;
  auto kernel = model::ModelKernel::create(host);
  EXPECT_TRUE(kernel) << kernel.error().message();
  return kernel ? std::make_unique<ModelMachine>(std::move(*kernel)) : nullptr;
}

}  // namespace iovane::test
