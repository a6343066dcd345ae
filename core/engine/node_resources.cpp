#include "engine/node_resources.hpp"

#include <new>
#include <utility>

#include "base/error_text.hpp"

namespace iovane::engine {

// Called with the lock held.
const base::Topology& NodeResources::topology() {
  if (!topology_) {
    base::Topology machine = base::Topology::load();
    memories_.resize(machine.node_count());
    workers_.resize(machine.node_count());
    topology_.emplace(std::move(machine));  // last: it says that all are there
  }
  return *topology_;
}

unsigned NodeResources::here() {
  const std::lock_guard held{lock_};
  return topology().current_node();
}

Result<Worker*> NodeResources::worker(unsigned node) {
  if (!config_.enabled)
    return make_error(Errc::unsupported, Stage::open,
                      "relaxed unmaps and queues that never block need a worker thread, and WorkerConfig::enabled is "
                      "false");
  const std::lock_guard held{lock_};
  const base::Topology& machine = topology();
  if (!workers_[node]) {
    auto worker = Worker::start(config_, &machine, node, node);
    if (!worker) return worker.error();
    workers_[node] = *std::move(worker);
  }
  return workers_[node].get();
}

base::MemorySource& NodeResources::memory(unsigned node) {
  const std::lock_guard held{lock_};
  const base::Topology& machine = topology();
  if (machine.node_count() == 1) return base::heap_memory();
  if (!memories_[node]) {
    auto made = base::NodeMemory::create(machine, node);
    if (!made) return base::heap_memory();  // slower, not wrong
    memories_[node] = std::make_unique<base::NodeMemory>(*std::move(made));
  }
  return *memories_[node];
}

}  // namespace iovane::engine
