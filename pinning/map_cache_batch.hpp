// The pieces that one miss is about to pin. Private to the map cache.
#pragma once

#include "pinning/map_cache.hpp"

namespace iovane::pinning {

struct MapCache::PinBatch {
  struct Piece {
    MemoryRange range{};
    std::size_t flight = 0;  // its place in in_flight_
    std::uint8_t node = 0;
    bool watched = false;
    std::uint64_t charged = 0;
  };

  MemoryRange wanted;
  Access access;
  /// How much beside what is wanted. Given up step by step when the neighbourhood cannot be pinned or paid for.
  enum class Margin : std::uint8_t { none, chunk, stream };
  Margin margin = Margin::stream;
  std::uint64_t step = 0;  // how far a sequential user has grown with this

  std::array<Piece, pieces_max> pieces{};
  std::array<PinRequest, pieces_max> requests{};
  std::array<PinOutcome, pieces_max> outcomes{};
  std::size_t count = 0;
  bool whole = false;  // the pieces are all that is missing of `wanted`, as of plan()
  std::size_t published = 0;
  Error error{};  // the first that concerns `wanted`
};

}  // namespace iovane::pinning
