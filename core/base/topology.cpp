#include "base/topology.hpp"

#include <hwloc.h>
#include <sched.h>

#include <cerrno>
#include <utility>

#include "base/error_text.hpp"
#include "base/os_error.hpp"

namespace iovane::base {

struct Topology::Handle {
  Handle() = default;
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() {
    if (topology != nullptr) hwloc_topology_destroy(topology);
  }
  hwloc_obj_t node(unsigned number) const noexcept {
    return hwloc_get_obj_by_type(topology, HWLOC_OBJ_NUMANODE, number);
  }

  hwloc_topology_t topology = nullptr;
};

Topology::Topology() = default;
Topology::Topology(Topology&&) noexcept = default;
Topology& Topology::operator=(Topology&&) noexcept = default;
Topology::~Topology() = default;

Topology::Topology(std::unique_ptr<Handle> handle) : handle_{std::move(handle)} {
  const int count = hwloc_get_nbobjs_by_type(handle_->topology, HWLOC_OBJ_NUMANODE);
  for (int number = 0; number < count; ++number) {
    const hwloc_obj_t object = handle_->node(static_cast<unsigned>(number));
    Node node{object->os_index, {}};
    for (int cpu = hwloc_bitmap_first(object->cpuset); cpu >= 0; cpu = hwloc_bitmap_next(object->cpuset, cpu)) {
      const auto n = static_cast<unsigned>(cpu);
      node.cpus.push_back(n);
      if (n >= node_of_cpu_.size()) node_of_cpu_.resize(n + 1, node_count());
      // Nodes may share CPUs (ordinary and high-bandwidth memory): hwloc lists the one the kernel prefers first.
      if (node_of_cpu_[n] == node_count() || node_of_cpu_[n] > static_cast<unsigned>(number)) {
        node_of_cpu_[n] = static_cast<unsigned>(number);
      }
    }
    nodes_.push_back(std::move(node));
  }
}

Topology Topology::load() {
  auto handle = std::make_unique<Handle>();
  if (hwloc_topology_init(&handle->topology) != 0) return flat();
  // Nodes and CPUs are always kept; caches and packages are not needed.
  hwloc_topology_set_all_types_filter(handle->topology, HWLOC_TYPE_FILTER_KEEP_NONE);
  if (hwloc_topology_load(handle->topology) != 0) return flat();
  Topology topology{std::move(handle)};
  return topology.node_count() == 0 ? flat() : std::move(topology);
}

Topology Topology::flat() {
  Topology topology;
  Node node;
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    for (unsigned cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &set)) node.cpus.push_back(cpu);
    }
  }
  if (node.cpus.empty()) node.cpus.push_back(current_cpu());  // more CPUs than the set holds, or no answer
  topology.nodes_.push_back(std::move(node));
  return topology;
}

Result<Topology> Topology::synthetic(const std::string& description) {
  auto handle = std::make_unique<Handle>();
  if (hwloc_topology_init(&handle->topology) != 0) {
    return fail(Errc::out_of_memory, Stage::query, errno, "hwloc could not make a topology");
  }
  if (hwloc_topology_set_synthetic(handle->topology, description.c_str()) != 0 ||
      hwloc_topology_load(handle->topology) != 0) {
    return fail(Errc::invalid_argument, Stage::query, errno,
                "\"{}\" is not a synthetic topology as hwloc(7) describes them, like \"NUMANode:2 Core:4 PU:1\"",
                description);
  }
  return Topology{std::move(handle)};
}

unsigned Topology::current_cpu() noexcept {
  const int cpu = sched_getcpu();
  return cpu < 0 ? 0 : static_cast<unsigned>(cpu);
}

Result<void> Topology::check_node(unsigned node) const {
  if (node < node_count()) return {};
  return fail(Errc::not_found, Stage::query, 0, "there is no node {}: nodes are 0 to {}", node, node_count() - 1);
}

Result<void> Topology::pin_this_thread(unsigned node) const {
  if (const auto known = check_node(node); !known) return known.error();
  if (cpus_of(node).empty()) {
    return fail(Errc::not_found, Stage::query, 0, "node {} (the kernel's {}) has no CPU that this process may use",
                node, os_number(node));
  }
  if (handle_ == nullptr) return {};
  if (hwloc_set_cpubind(handle_->topology, handle_->node(node)->cpuset, HWLOC_CPUBIND_THREAD) != 0) {
    const int number = errno;
    return fail(errc_from_errno(number), Stage::query, number, "could not pin the thread to the {} CPUs of node {}",
                cpus_of(node).size(), node);
  }
  return {};
}

Result<void> Topology::bind_memory(void* address, Bytes length, unsigned node) const {
  if (const auto known = check_node(node); !known) return known.error();
  // With one node there is nothing to choose, and kernels without NUMA answer ENOSYS.
  if (node_count() == 1) return {};
  // Without HWLOC_MEMBIND_STRICT this is a preference: metadata on a far node is better than none.
  if (hwloc_set_area_membind(handle_->topology, address, length.value, handle_->node(node)->nodeset, HWLOC_MEMBIND_BIND,
                             HWLOC_MEMBIND_BYNODESET) != 0) {
    const int number = errno;
    return fail(errc_from_errno(number), Stage::query, number, "could not bind {} bytes to node {} (the kernel's {})",
                length.value, node, os_number(node));
  }
  return {};
}

}  // namespace iovane::base
