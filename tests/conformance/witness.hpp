// A device that can be told to read and write memory by IOVA: the proof that a mapping is what a backend says it is.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "iovane/types.hpp"

namespace iovane::test {

class Witness {
 public:
  virtual ~Witness() = default;
  /// What the device gets when it reads `length` bytes (at most 2048) at `from`. Bytes it cannot reach are unspecified,
  /// never those that lie in memory that is not mapped.
  virtual std::vector<std::byte> read(Iova from, std::size_t length) = 0;
  /// The device writes `bytes` (at most 2048) at `to`; what it cannot reach stays as it is.
  virtual void write(Iova to, std::span<const std::byte> bytes) = 0;
};

}  // namespace iovane::test
