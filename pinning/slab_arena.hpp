// Memory for the index: small objects of one size, from the kernel directly.
#pragma once

#include <cstddef>
#include <cstdint>

namespace iovane::pinning {

inline constexpr std::size_t huge_page_bytes = 2 * 1024 * 1024;

/// Anonymous zeroed memory of a whole number of OS pages, or null. `huge` asks for transparent huge pages.
void* map_zeroed(std::size_t bytes, std::size_t alignment, bool huge) noexcept;
void unmap(void* memory, std::size_t bytes) noexcept;

/// Objects of `object_bytes` (a power of two from 64 to 4096), aligned to their size, zeroed when fresh.
///
/// Never calls malloc: the staleness monitor must be able to take the cache's lock while another thread sits inside
/// munmap() of memory that malloc gave out, and that thread must not be waiting for us with the lock held. Returned
/// objects are kept for reuse; everything goes back to the kernel with the arena. One thread at a time.
class SlabArena {
 public:
  explicit SlabArena(std::size_t object_bytes) noexcept : object_bytes_{object_bytes} {}
  SlabArena(const SlabArena&) = delete;
  SlabArena& operator=(const SlabArena&) = delete;
  ~SlabArena();

  /// Null when the kernel gives no more. A reused object comes back as it was put().
  void* take() noexcept;
  /// The object's first eight bytes are overwritten.
  void put(void* object) noexcept;
  std::size_t mapped_bytes() const noexcept { return mapped_bytes_; }

 private:
  static constexpr std::size_t chunk_bytes_first = 64 * 1024;
  static constexpr std::size_t chunk_bytes = huge_page_bytes;
  static constexpr std::size_t header_bytes = 16;  // at a chunk's start: the previous chunk and its size

  struct ChunkHeader {
    ChunkHeader* previous;
    std::size_t bytes;
  };
  struct FreeObject {
    FreeObject* next;
  };

  std::size_t object_bytes_;
  ChunkHeader* chunk_ = nullptr;
  std::byte* next_ = nullptr;
  std::byte* chunk_limit_ = nullptr;
  FreeObject* free_ = nullptr;
  std::size_t mapped_bytes_ = 0;
};

}  // namespace iovane::pinning
