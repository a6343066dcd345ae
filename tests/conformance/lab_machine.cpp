#include "conformance/lab_machine.hpp"

#include <linux/capability.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <sstream>

#include "backends/system_kernel.hpp"
#include "conformance/edu_witness.hpp"
#include "conformance/phb4_freeze.hpp"

namespace iovane::test {
namespace {

using namespace backends;

/// Effective CAP_IPC_LOCK off and a soft memlock limit; both come back.
class MemlockLimit {
 public:
  explicit MemlockLimit(Bytes limit) {
    ok_ = ::getrlimit(RLIMIT_MEMLOCK, &before_) == 0 && set_capability(false);
    rlimit narrow = before_;
    narrow.rlim_cur = limit.value;
    narrow.rlim_max = std::max<rlim_t>(narrow.rlim_max, limit.value);  // root may
    ok_ = ok_ && ::setrlimit(RLIMIT_MEMLOCK, &narrow) == 0;
  }
  MemlockLimit(const MemlockLimit&) = delete;
  MemlockLimit& operator=(const MemlockLimit&) = delete;
  ~MemlockLimit() {
    ::setrlimit(RLIMIT_MEMLOCK, &before_);
    set_capability(true);
  }
  bool ok() const { return ok_; }

 private:
  static bool set_capability(bool on) {
    __user_cap_header_struct header{.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
    __user_cap_data_struct data[2] = {};
    if (::syscall(SYS_capget, &header, data) != 0) return false;
    constexpr std::uint32_t bit = 1U << CAP_IPC_LOCK;
    data[0].effective = on ? data[0].effective | bit : data[0].effective & ~bit;
    return ::syscall(SYS_capset, &header, data) == 0;
  }
  rlimit before_{};
  bool ok_ = false;
};

class LabMachine final : public Machine {
 public:
  explicit LabMachine(std::unique_ptr<MemlockLimit> memlock) : memlock_{std::move(memlock)} {}

  Kernel& kernel() override { return kernel_; }
  std::vector<std::string> devices() override {
    std::vector<std::string> list;
    const char* const text = std::getenv("IOVANE_LAB_DEVICES");
    std::istringstream words{text != nullptr ? text : ""};
    for (std::string word; std::getline(words, word, ',');) list.push_back(word);
    return list;
  }
  std::unique_ptr<Witness> witness(BackendSpace& space, const AttachedDevice& device) override {
    return make_edu_witness(kernel_, space, device);
  }
  bool freeze(BackendSpace&, const AttachedDevice& device) override { return freeze_in_phb4(device.name); }
  bool frozen_device_is_stopped() const override { return false; }

 private:
  std::unique_ptr<MemlockLimit> memlock_;
  SystemKernel kernel_;
};

}  // namespace

std::unique_ptr<Machine> make_lab_machine(const MachineOptions& options) {
  if (!options.memlock) return std::make_unique<LabMachine>(nullptr);
  auto limit = std::make_unique<MemlockLimit>(*options.memlock);
  return limit->ok() ? std::make_unique<LabMachine>(std::move(limit)) : nullptr;
}

}  // namespace iovane::test
