#include "base/memory_source.hpp"

#include <new>

#include "base/fault_point.hpp"

namespace iovane::base {
namespace {

class HeapMemory final : public MemorySource {
 public:
  void* allocate(std::size_t bytes, std::size_t alignment) noexcept override {
    if (fault_now(FaultKind::allocation)) return nullptr;
    return ::operator new (bytes, std::align_val_t{alignment}, std::nothrow);
  }
  void release(void* memory, std::size_t bytes, std::size_t alignment) noexcept override {
    ::operator delete (memory, bytes, std::align_val_t{alignment});
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
