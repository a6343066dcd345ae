#include "engine/ring_post.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <new>
#include <string>
#include <string_view>

#include "base/error_text.hpp"

namespace iovane::engine {

namespace {

/// False when it certainly is not; without /proc nobody can tell before the first message.
bool may_be_a_ring(int fd) noexcept {
  std::array<char, 64> target{};
  const std::string link = fmt::format("/proc/self/fd/{}", fd);
  const ssize_t length = ::readlink(link.c_str(), target.data(), target.size());
  if (length < 0) return ::access("/proc/self/fd", F_OK) != 0;
  return std::string_view{target.data(), static_cast<std::size_t>(length)} == "anon_inode:[io_uring]";
}

bool can_send(io_uring& ring) noexcept {
  io_uring_probe* const probe = io_uring_get_probe_ring(&ring);
  if (probe == nullptr) return false;
  const bool can = io_uring_opcode_supported(probe, IORING_OP_MSG_RING) != 0;
  io_uring_free_probe(probe);
  return can;
}

}  // namespace

Result<std::unique_ptr<RingPost>> RingPost::create(int ring_fd, std::uint64_t user_data) {
  if (!may_be_a_ring(ring_fd))
    return base::fail(Errc::invalid_argument, Stage::open, 0,
                      "descriptor {} is not an io_uring; pass the ring's ring_fd", ring_fd);
  std::unique_ptr<RingPost> post{new (std::nothrow) RingPost{ring_fd, user_data}};
  if (!post) return make_error(Errc::out_of_memory, Stage::open, "no memory to post into a ring");
  if (const int made = io_uring_queue_init(2, &post->uring_, 0); made < 0)
    return base::fail(Errc::unsupported, Stage::open, -made,
                      "this process may not have an io_uring of its own to send messages from: hidden by seccomp, "
                      "switched off by sysctl kernel.io_uring_disabled, or over a limit");
  post->open_ = true;
  if (!can_send(post->uring_))
    return make_error(Errc::unsupported, Stage::open,
                      "the kernel has no messages between rings (IORING_OP_MSG_RING); it needs Linux 5.18");
  return post;
}

RingPost::~RingPost() {
  if (open_) io_uring_queue_exit(&uring_);
}

bool RingPost::post(std::uint32_t count) noexcept {
  // One that is there already is this one: a thread ended before it could send it.
  if (io_uring_sq_ready(&uring_) == 0) {
    io_uring_sqe* const sqe = io_uring_get_sqe(&uring_);
    if (sqe == nullptr) return false;
    io_uring_prep_msg_ring(sqe, ring_fd_, count, user_data_, 0);
  }
  if (io_uring_submit_and_wait(&uring_, 1) < 0) return false;
  io_uring_cqe* cqe = nullptr;
  if (io_uring_peek_cqe(&uring_, &cqe) != 0) return false;
  const bool posted = cqe->res >= 0;
  io_uring_cqe_seen(&uring_, cqe);
  return posted;
}

}  // namespace iovane::engine
