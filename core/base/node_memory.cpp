#include "base/node_memory.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <utility>

#include "base/checked_math.hpp"
#include "base/error_text.hpp"
#include "base/fault_point.hpp"

// jemalloc's own interface (jemalloc(3), versions 4 and 5), if some part of the process brought it. Declared here
// because its header also redeclares malloc.
extern "C" {
[[gnu::weak]] void* mallocx(std::size_t size, int flags);
[[gnu::weak]] void dallocx(void* memory, int flags);
[[gnu::weak]] int mallctl(const char* name, void* old_value, std::size_t* old_length, void* new_value,
                          std::size_t new_length);
}

namespace iovane::base {
namespace {

constexpr std::size_t huge_page = std::size_t{2} << 20;

bool has_jemalloc() noexcept { return &mallocx != nullptr && &dallocx != nullptr && &mallctl != nullptr; }

// MALLOCX_ARENA, MALLOCX_TCACHE_NONE and MALLOCX_LG_ALIGN of jemalloc.h. Without a thread cache, memory of one node
// cannot be handed out by another.
constexpr int arena_flags(unsigned arena) noexcept { return static_cast<int>(((arena + 1) << 20) | (1U << 8)); }
int alignment_flag(std::size_t alignment) noexcept { return std::countr_zero(alignment); }

std::size_t page_bytes() noexcept {
  static const auto bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}
std::size_t whole_pages(std::size_t bytes) noexcept {
  return align_up(bytes, page_bytes()).value_or(~(page_bytes() - 1));
}
// Large pieces are aligned for huge pages.
std::size_t effective_alignment(std::size_t bytes, std::size_t alignment) noexcept {
  return std::max({alignment, page_bytes(), bytes >= huge_page ? huge_page : std::size_t{1}});
}

// `length` bytes at a multiple of `alignment`, both multiples of the page size: takes more and gives the rest back.
void* map_aligned(std::size_t length, std::size_t alignment) noexcept {
  const auto taken = checked_add<std::size_t>(length, alignment - page_bytes());
  if (!taken) return nullptr;
  void* const memory = mmap(nullptr, *taken, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  const auto first = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t start = (first + alignment - 1) & ~(alignment - 1);
  const std::size_t before = start - first;
  const std::size_t after = *taken - before - length;
  if (before != 0) munmap(memory, before);
  if (after != 0) munmap(static_cast<std::byte*>(memory) + before + length, after);
  return static_cast<std::byte*>(memory) + before;
}

}  // namespace

Result<NodeMemory> NodeMemory::create(const Topology& topology, unsigned node, Provider provider) {
  if (node >= topology.node_count()) {
    return fail(Errc::not_found, Stage::query, 0, "there is no node {}: nodes are 0 to {}", node,
                topology.node_count() - 1);
  }
  if (provider == Provider::mmap || (provider == Provider::automatic && !has_jemalloc())) {
    return NodeMemory{topology, node, no_arena};
  }
  if (!has_jemalloc()) {
    return fail(Errc::unsupported, Stage::query, 0,
                "no jemalloc in this process: link or preload it, or use the mmap provider");
  }
  unsigned arena = 0;
  std::size_t length = sizeof(arena);
  if (const int number = mallctl("arenas.create", &arena, &length, nullptr, 0); number != 0) {
    return fail(Errc::out_of_memory, Stage::query, number, "jemalloc could not make an arena for node {}", node);
  }
  return NodeMemory{topology, node, arena};
}

NodeMemory::NodeMemory(NodeMemory&& o) noexcept
    : topology_{o.topology_}, node_{o.node_}, arena_{std::exchange(o.arena_, no_arena)} {}

NodeMemory::~NodeMemory() {
  if (arena_ == no_arena) return;
  std::array<char, 32> name{};
  std::snprintf(name.data(), name.size(), "arena.%u.destroy", arena_);
  mallctl(name.data(), nullptr, nullptr, nullptr, 0);
}

void* NodeMemory::allocate(std::size_t bytes, std::size_t alignment) noexcept {
  if (fault_now(FaultKind::allocation)) return nullptr;
  const std::size_t length = whole_pages(bytes);
  alignment = effective_alignment(bytes, alignment);
  void* const memory = arena_ != no_arena ? mallocx(length, arena_flags(arena_) | alignment_flag(alignment))
                                          : map_aligned(length, alignment);
  if (memory == nullptr) return nullptr;
  // Both are advice: where they are refused (containers often forbid binding), memory from elsewhere is used.
  static_cast<void>(topology_->bind_memory(memory, Bytes{length}, node_));
  if (bytes >= huge_page) static_cast<void>(madvise(memory, length, MADV_HUGEPAGE));
  return memory;
}

void NodeMemory::release(void* memory, std::size_t bytes, std::size_t /*alignment*/) noexcept {
  if (arena_ != no_arena) {
    dallocx(memory, arena_flags(arena_));
  } else {
    munmap(memory, whole_pages(bytes));
  }
}

}  // namespace iovane::base
