// NodeResources: what an engine has per NUMA node: a worker, and memory for metadata.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "base/memory_source.hpp"
#include "base/node_memory.hpp"
#include "base/topology.hpp"
#include "engine/worker.hpp"
#include "iovane/config.hpp"
#include "iovane/result.hpp"

namespace iovane::engine {

/// Everything is made when it is first asked for: a caller who needs no worker gets none. Any thread; control plane.
class NodeResources {
 public:
  explicit NodeResources(WorkerConfig config) : config_{std::move(config)} {}

  /// The node of the calling thread.
  unsigned here();
  /// The worker of a node, started if need be; it lives as long as this object. Errors: unsupported (switched off by
  /// WorkerConfig::enabled), and those of starting a thread.
  Result<Worker*> worker(unsigned node);
  /// For those who wait for a lane: takes over the lanes that workers held whose threads have ended. Not while a worker
  /// is started in the same call.
  void inherit_from_dead() noexcept;
  /// Memory that prefers the node; plain heap where there is only one.
  base::MemorySource& memory(unsigned node);

 private:
  const base::Topology& topology();

  const WorkerConfig config_;
  std::mutex lock_;
  std::optional<base::Topology> topology_;
  std::vector<std::unique_ptr<base::NodeMemory>> memories_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

}  // namespace iovane::engine
