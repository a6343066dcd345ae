// Memory of one NUMA node, for metadata.
#pragma once

#include <cstddef>

#include "base/memory_source.hpp"
#include "base/topology.hpp"
#include "iovane/result.hpp"

namespace iovane::base {

/// Hands out memory bound to a node: from a jemalloc arena of its own where the process has jemalloc (whoever put it
/// there: a library must not replace its host's malloc), else straight from mmap. Both prefer the node and fall back to
/// others when it is full, or when the process may not bind memory at all.
/// Any thread may allocate and release. Sizes are rounded up to pages: for large pieces, see MemorySource.
class NodeMemory final : public MemorySource {
 public:
  /// What serves the allocations.
  enum class Provider { automatic, jemalloc, mmap };

  /// `topology` outlives the result. Errors: not_found (no such node), unsupported (jemalloc was asked for, and the
  /// process has none), out_of_memory.
  static Result<NodeMemory> create(const Topology& topology, unsigned node, Provider provider = Provider::automatic);
  NodeMemory(NodeMemory&& o) noexcept;
  NodeMemory& operator=(NodeMemory&&) = delete;
  /// Precondition: everything was released.
  ~NodeMemory() override;

  void* allocate(std::size_t bytes, std::size_t alignment) noexcept override;
  void release(void* memory, std::size_t bytes, std::size_t alignment) noexcept override;

  unsigned node() const noexcept { return node_; }
  Provider provider() const noexcept { return arena_ == no_arena ? Provider::mmap : Provider::jemalloc; }

 private:
  static constexpr unsigned no_arena = ~0U;
  NodeMemory(const Topology& topology, unsigned node, unsigned arena) noexcept
      : topology_{&topology}, node_{node}, arena_{arena} {}

  const Topology* topology_;
  unsigned node_;
  unsigned arena_;
};

}  // namespace iovane::base
