// A Kernel whose answers a test writes down: for the paths that neither a real kernel nor the software IOMMU takes at
// will.
#pragma once

#include <cerrno>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "backends/kernel.hpp"

namespace iovane::test {

class ScriptedKernel final : public backends::Kernel {
 public:
  /// Answers every call of Argument's ioctl; the result is 0, a positive answer or -errno. Replaces an earlier one.
  template <typename Argument, typename F>
  void on(F&& answer) {
    handlers_[Argument::request] = [f = std::forward<F>(answer)](void* argument) mutable -> long {
      return f(*static_cast<Argument*>(argument));
    };
  }
  /// The same for an ioctl without a structure.
  void on_number(unsigned long request, std::function<long(unsigned long)> answer) {
    numbers_[request] = std::move(answer);
  }
  /// Opening `path` fails with `os_errno`; everything else opens.
  void deny(const std::string& path, int os_errno) { denied_[path] = os_errno; }

  std::vector<backends::PciDevice> devices;
  backends::MemlockUse memlock_use;
  int open_count = 0;
  std::vector<unsigned long> calls;  ///< every ioctl, in order

  int open(const char* path, int) noexcept override {
    if (const auto at = denied_.find(path); at != denied_.end()) return -at->second;
    ++open_count;
    return next_fd_++;
  }
  int close(int) noexcept override {
    --open_count;
    return 0;
  }
  int duplicate(int) noexcept override {
    ++open_count;
    return next_fd_++;
  }
  long ioctl(int, unsigned long request, void* argument) noexcept override {
    calls.push_back(request);
    const auto at = handlers_.find(request);
    return at != handlers_.end() ? at->second(argument) : -ENOTTY;
  }
  long ioctl_value(int, unsigned long request, unsigned long value) noexcept override {
    calls.push_back(request);
    const auto at = numbers_.find(request);
    return at != numbers_.end() ? at->second(value) : -ENOTTY;
  }
  Result<void*> map_memory(int, std::uint64_t, std::size_t, bool) noexcept override {
    return make_error(Errc::unsupported, Stage::open, "no memory behind a scripted kernel");
  }
  void unmap_memory(void*, std::size_t) noexcept override {}
  Result<std::vector<backends::PciDevice>> pci_devices() override { return devices; }
  backends::MemlockUse memlock() noexcept override { return memlock_use; }
  std::string description() override { return "scripted"; }

 private:
  int next_fd_ = 100;
  std::map<unsigned long, std::function<long(void*)>> handlers_;
  std::map<unsigned long, std::function<long(unsigned long)>> numbers_;
  std::map<std::string, int> denied_;
};

}  // namespace iovane::test
