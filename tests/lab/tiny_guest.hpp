// A guest of a dozen instructions for KVM on POWER: it makes one hypercall as often as it is told, and then stops.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>

namespace iovane::test {

/// Real mode, little endian, one vCPU, its code at guest physical 0x1000. Calls on one thread.
class TinyGuest {
 public:
  /// Guest RAM begins at guest physical 0. Empty error text: it is ready.
  TinyGuest(std::byte* ram, std::size_t bytes);
  TinyGuest(const TinyGuest&) = delete;
  TinyGuest& operator=(const TinyGuest&) = delete;
  ~TinyGuest();

  const char* error() const { return error_; }  ///< null: ready
  int vm() const { return vm_; }

  struct Outcome {
    std::int64_t status = 0;        ///< r3 of the last call
    std::uint64_t exits = 0;        ///< hypercalls that came to userspace
    std::uint64_t nanoseconds = 0;  ///< of the whole run
    bool ok = false;
  };
  using Answer = std::function<std::int64_t(std::uint64_t number, const std::array<std::uint64_t, 4>& arguments)>;
  /// Makes hypercall `number` `times` times; whatever leaves the kernel is answered by `answer`. The third argument
  /// alternates between itself and itself ^ `alternate`.
  Outcome call(std::uint64_t number, const std::array<std::uint64_t, 4>& arguments, std::uint64_t times,
               const Answer& answer, std::uint64_t alternate = 0);

 private:
  int kvm_ = -1;
  int vm_ = -1;
  int vcpu_ = -1;
  void* run_ = nullptr;
  std::size_t run_bytes_ = 0;
  const char* error_ = "";
};

}  // namespace iovane::test
