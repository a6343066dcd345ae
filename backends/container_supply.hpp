// ContainerSupply: VFIO containers for one address space after the other.
#pragma once

#include "backends/backend.hpp"
#include "backends/kernel_call.hpp"

namespace iovane::backends {

/// What type1 and sPAPR have in common: a container is one address space, and one that was handed in is the only one.
class ContainerSupply {
 public:
  /// Opens `path`, or takes the descriptor of `source`, and checks that it speaks VFIO's container interface.
  static Result<ContainerSupply> open(Kernel& kernel, const char* path, const DescriptorSource& source);

  /// The descriptor that open() checked serves the first space; later ones get their own.
  Result<KernelFd> next();
  /// The first one, before next().
  int fd() const noexcept { return first_.get(); }

 private:
  ContainerSupply(Kernel& kernel, const char* path, KernelFd first, bool handed_in) noexcept
      : kernel_{&kernel}, path_{path}, first_{std::move(first)}, handed_in_{handed_in} {}

  Kernel* kernel_;
  const char* path_;
  KernelFd first_;
  bool handed_in_;
};

/// What move_device() answers on both.
Error cannot_move_between_containers() noexcept;

}  // namespace iovane::backends
