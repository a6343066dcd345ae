#include "base/memory_source.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <new>

#include "base/fault_point.hpp"

namespace iovane::base {
namespace {

// Large structures that are read at random spend their time in page walks; huge pages make the walks short. Linux gives
// them where the administrator allows it ("madvise" or "always"), else this changes nothing.
constexpr std::size_t huge_page = std::size_t{2} << 20;

class HeapMemory final : public MemorySource {
 public:
  void* allocate(std::size_t bytes, std::size_t alignment) noexcept override {
    if (fault_now(FaultKind::allocation)) return nullptr;
    void* const memory = ::operator new (bytes, std::align_val_t{aligned(bytes, alignment)}, std::nothrow);
    if (memory != nullptr && bytes >= huge_page) static_cast<void>(::madvise(memory, bytes, MADV_HUGEPAGE));
    return memory;
  }
  void release(void* memory, std::size_t bytes, std::size_t alignment) noexcept override {
    ::operator delete (memory, std::align_val_t{aligned(bytes, alignment)});
  }

 private:
  static std::size_t aligned(std::size_t bytes, std::size_t alignment) noexcept {
    return bytes >= huge_page ? std::max(alignment, huge_page) : alignment;
  }
};

}  // namespace

MemorySource& heap_memory() noexcept {
  // Never destroyed: objects with static storage may still give memory back while the process ends.
  alignas(HeapMemory) static std::byte storage[sizeof(HeapMemory)];
  static HeapMemory* const source = new (storage) HeapMemory;
  return *source;
}

}  // namespace iovane::base
