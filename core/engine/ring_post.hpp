// RingPost: tells a caller's own io_uring that completions have arrived.
#pragma once

#include <liburing.h>

#include <cstdint>
#include <memory>

#include "iovane/result.hpp"

namespace iovane::engine {

/// Posts completion queue entries into another ring by IORING_OP_MSG_RING (Linux 5.18). One thread at a time.
class RingPost {
 public:
  /// `ring_fd` is borrowed for as long as the object lives. Errors: unsupported (no io_uring for this process, or a
  /// kernel before 5.18), invalid_argument (not a ring).
  static Result<std::unique_ptr<RingPost>> create(int ring_fd, std::uint64_t user_data);
  ~RingPost();
  RingPost(const RingPost&) = delete;
  RingPost& operator=(const RingPost&) = delete;

  /// An entry with the ring's user_data and res = `count`; one system call. A full ring keeps it in the kernel's
  /// overflow list. False when the kernel could not.
  bool post(std::uint32_t count) noexcept;

 private:
  RingPost(int ring_fd, std::uint64_t user_data) noexcept : ring_fd_{ring_fd}, user_data_{user_data} {}

  const int ring_fd_;
  const std::uint64_t user_data_;
  bool open_ = false;
  io_uring uring_{};
};

}  // namespace iovane::engine
