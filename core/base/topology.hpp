// The machine as far as placement is concerned: NUMA nodes, their CPUs, and putting threads and memory on them.
// hwloc stays behind this header.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "iovane/result.hpp"
#include "iovane/types.hpp"

namespace iovane::base {

/// A snapshot of the CPUs and nodes that this process may use, taken at load(). Nodes are numbered 0 to
/// node_count() - 1, whatever the kernel calls them. Immutable, hence any thread. Never without a node.
class Topology {
 public:
  /// Asks hwloc (milliseconds); flat() when it finds nothing. Honours hwloc's environment variables.
  static Topology load();
  /// One node with the CPUs that the calling thread may run on; binding does nothing.
  static Topology flat();
  /// A made-up machine in hwloc's notation ("NUMANode:2 Core:4 PU:1"), to test placement where there is one node.
  /// Binding succeeds and does nothing. Errors: invalid_argument.
  static Result<Topology> synthetic(const std::string& description);

  Topology(Topology&&) noexcept;
  Topology& operator=(Topology&&) noexcept;
  ~Topology();

  unsigned node_count() const noexcept { return static_cast<unsigned>(nodes_.size()); }
  /// The kernel's CPU numbers, ascending; empty for a node of memory only. Precondition: node < node_count().
  std::span<const unsigned> cpus_of(unsigned node) const noexcept { return nodes_[node].cpus; }
  /// The kernel's number of a node, for texts and for asking the kernel. Precondition: node < node_count().
  unsigned os_number(unsigned node) const noexcept { return nodes_[node].os_number; }
  /// The node nearest to a CPU; 0 for a CPU that is not in the snapshot.
  unsigned node_of_cpu(unsigned cpu) const noexcept { return cpu < node_of_cpu_.size() ? node_of_cpu_[cpu] : 0; }

  /// The CPU this thread runs on: a hint that may be old when it arrives. No system call where the kernel offers rseq
  /// or the vDSO.
  static unsigned current_cpu() noexcept;
  unsigned current_node() const noexcept { return node_of_cpu(current_cpu()); }

  /// Lets the calling thread run on the CPUs of `node` only. Errors: not_found (no such node, or none of its CPUs is
  /// ours), permission, and what else the kernel says.
  Result<void> pin_this_thread(unsigned node) const;
  /// Asks that the pages of [address, address + length), both multiples of the page size, come from `node`, where they
  /// are not there yet; from elsewhere when it is full. Errors: as above; EPERM is usual in containers.
  Result<void> bind_memory(void* address, Bytes length, unsigned node) const;

 private:
  struct Node {
    unsigned os_number = 0;
    std::vector<unsigned> cpus;
  };
  struct Handle;  // hwloc's

  Topology();
  explicit Topology(std::unique_ptr<Handle> handle);
  Result<void> check_node(unsigned node) const;

  std::unique_ptr<Handle> handle_;  // none: flat
  std::vector<Node> nodes_;
  std::vector<unsigned> node_of_cpu_;  // by the kernel's CPU number
};

}  // namespace iovane::base
