#include "pinning/uring_provider.hpp"

#include <sys/mman.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "base/error_text.hpp"
#include "base/os_error.hpp"
#include "pinning/memlock.hpp"

namespace iovane::pinning {
namespace {

// Elements per system call: the arrays live on the stack.
constexpr std::size_t batch_max = 64;

}  // namespace

UringProvider::RingOwner::~RingOwner() {
  if (ring.ring_fd > 0) io_uring_queue_exit(&ring);
}

UringProvider::UringProvider(std::unique_ptr<RingOwner> own, io_uring* ring, std::uint32_t buffers)
    : own_{std::move(own)},
      ring_{ring},
      traits_{.name = "io_uring", .pins_max = buffers, .files = true},
      used_(buffers, false) {}

Result<std::unique_ptr<UringProvider>> UringProvider::open(const Config& config) {
  if (config.buffers == 0 || config.buffers > buffers_max)
    return base::fail(Errc::invalid_argument, Stage::open, 0, "{} buffers: a ring's table has 1 to {}", config.buffers,
                      buffers_max);
  std::unique_ptr<RingOwner> own;
  io_uring* ring = config.ring;
  if (ring == nullptr) {
    own = std::make_unique<RingOwner>();
    ring = &own->ring;
    if (const int r = io_uring_queue_init(8, ring, 0); r < 0) {
      ring->ring_fd = 0;
      const Errc code = r == -ENOSYS ? Errc::unsupported : base::errc_from_errno(-r);
      return base::fail(code, Stage::open, -r,
                        "io_uring is not available to this process: not in the kernel, hidden by seccomp, switched off "
                        "by sysctl kernel.io_uring_disabled, or over RLIMIT_MEMLOCK");
    }
  }
  if (const int r = io_uring_register_buffers_sparse(ring, config.buffers); r < 0) {
    if (r == -EBUSY)
      return base::fail(Errc::busy, Stage::open, EBUSY,
                        "the ring has registered buffers already; give the provider a ring without");
    return base::fail(r == -EINVAL ? Errc::unsupported : base::errc_from_errno(-r), Stage::open, -r,
                      "a sparse table of {} buffers was refused; it needs Linux 5.19", config.buffers);
  }
  return std::unique_ptr<UringProvider>{new UringProvider{std::move(own), ring, config.buffers}};
}

UringProvider::~UringProvider() { io_uring_unregister_buffers(ring_); }

std::uint32_t UringProvider::take_run(std::uint32_t want, std::uint32_t& first) noexcept {
  const std::lock_guard held{lock_};
  const auto size = static_cast<std::uint32_t>(used_.size());
  for (std::uint32_t looked = 0; looked < size; ++looked, next_ = (next_ + 1) % size) {
    if (used_[next_]) continue;
    first = next_;
    std::uint32_t count = 0;
    while (count < want && next_ < size && !used_[next_]) {
      used_[next_++] = true;
      ++count;
    }
    next_ %= size;
    return count;
  }
  return 0;
}

void UringProvider::give_back(std::uint32_t first, std::uint32_t count) noexcept {
  const std::lock_guard held{lock_};
  for (std::uint32_t i = first; i < first + count; ++i) used_[i] = false;
}

Result<void*> UringProvider::map_file(const PinRequest& request) noexcept {
  // Writable whatever the access: io_uring pins for writing (FOLL_WRITE), and nothing else.
  void* at = mmap(nullptr, request.range.length().value, PROT_READ | PROT_WRITE, MAP_SHARED, request.fd,
                  static_cast<off_t>(request.offset));
  if (at != MAP_FAILED) return at;
  return base::fail(base::errc_from_errno(errno), Stage::pin, errno,
                    "file descriptor {} cannot be mapped for reading and writing at offset {:#x} for {} bytes",
                    request.fd, request.offset, request.range.length().value);
}

Error UringProvider::pin_error(int error, const PinRequest& request) const noexcept {
  const std::uint64_t need = request.range.length().value;
  if (error == ENOMEM) {
    const auto state = read_memlock_state();
    if (state && !state->exempt)
      return base::fail(
          Errc::memlock_exceeded, Stage::pin, error,
          "io_uring could not pin {} bytes: RLIMIT_MEMLOCK is {} bytes, this process has {} pinned and {} "
          "locked, and all io_uring and iommufd pins of this user count together; raise it (ulimit -l, "
          "LimitMEMLOCK=) or grant CAP_IPC_LOCK",
          need, state->soft_limit, state->pinned, state->locked);
    return base::fail(Errc::out_of_memory, Stage::pin, error, "io_uring had no memory to pin {} bytes", need);
  }
  if (error == EFAULT)
    return base::fail(Errc::bad_memory, Stage::pin, error,
                      "memory [{:#x}, {:#x}] is not mapped, not writable, or not of a kind that can be pinned for long",
                      request.range.start, request.range.last);
  if (error == EEXIST)
    return base::fail(Errc::busy, Stage::pin, error,
                      "the ring takes registrations from its own thread only (IORING_SETUP_SINGLE_ISSUER)");
  return base::fail(base::errc_from_errno(error), Stage::pin, error, "io_uring refused to register [{:#x}, {:#x}]",
                    request.range.start, request.range.last);
}

// One call for all; the kernel stops at the first that fails and says how many it did.
void UringProvider::pin_run(std::span<const PinRequest> requests, std::span<PinOutcome> outcomes,
                            std::uint32_t first) noexcept {
  std::array<iovec, batch_max> vectors;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    void* at = reinterpret_cast<void*>(requests[i].range.start);
    outcomes[i] = {};
    if (requests[i].fd >= 0) {
      auto mapped = map_file(requests[i]);
      if (!mapped) outcomes[i].error = mapped.error();
      at = mapped ? *mapped : nullptr;
    }
    vectors[i] = {at, requests[i].range.length().value};
  }
  for (std::size_t done = 0; done < requests.size();) {
    if (outcomes[done].error) {
      give_back(first + static_cast<std::uint32_t>(done++), 1);
      continue;
    }
    std::size_t stop = done;
    while (stop < requests.size() && !outcomes[stop].error) ++stop;
    const int r = io_uring_register_buffers_update_tag(ring_, first + static_cast<unsigned>(done), &vectors[done],
                                                       nullptr, static_cast<unsigned>(stop - done));
    const std::size_t pinned = r > 0 ? static_cast<std::size_t>(r) : 0;
    for (std::size_t i = done; i < done + pinned; ++i)
      outcomes[i].handle = {reinterpret_cast<std::uint64_t>(vectors[i].iov_base), first + i};
    done += pinned;
    if (done < stop) {
      // The next one is what failed; a count instead of an error hides why, so ask for it alone.
      const int why = r < 0 && pinned == 0
                          ? r
                          : io_uring_register_buffers_update_tag(ring_, first + static_cast<unsigned>(done),
                                                                 &vectors[done], nullptr, 1);
      if (why == 1) {
        outcomes[done].handle = {reinterpret_cast<std::uint64_t>(vectors[done].iov_base), first + done};
      } else {
        outcomes[done].error = pin_error(-why, requests[done]);
        if (requests[done].fd >= 0) munmap(vectors[done].iov_base, vectors[done].iov_len);
        give_back(first + static_cast<std::uint32_t>(done), 1);
      }
      ++done;
    }
  }
}

void UringProvider::pin(std::span<const PinRequest> requests, std::span<PinOutcome> outcomes) noexcept {
  for (std::size_t done = 0; done < requests.size();) {
    const auto want = static_cast<std::uint32_t>(std::min(requests.size() - done, batch_max));
    std::uint32_t first = 0;
    const std::uint32_t got = take_run(want, first);
    if (got == 0) {
      outcomes[done++] = {
          {},
          base::fail(Errc::entry_limit, Stage::pin, ENOSPC,
                     "all {} entries of the ring's buffer table are in use; pin larger chunks", used_.size())};
      continue;
    }
    pin_run(requests.subspan(done, got), outcomes.subspan(done, got), first);
    done += got;
  }
}

void UringProvider::unpin(std::span<const UnpinRequest> requests, std::span<Error> outcomes) noexcept {
  // Consecutive indices go in one call. Batches were pinned into runs, so requests in order are mostly that.
  for (std::size_t done = 0; done < requests.size();) {
    const auto first = static_cast<std::uint32_t>(requests[done].handle.token);
    std::uint32_t count = 1;
    while (done + count < requests.size() && count < batch_max &&
           requests[done + count].handle.token == std::uint64_t{first} + count)
      ++count;
    std::array<iovec, batch_max> none{};
    const int r = io_uring_register_buffers_update_tag(ring_, first, none.data(), nullptr, count);
    const std::uint32_t unpinned = r > 0 ? static_cast<std::uint32_t>(r) : 0;
    for (std::uint32_t i = 0; i < count; ++i) {
      const UnpinRequest& request = requests[done + i];
      if (i < unpinned) {
        outcomes[done + i] = {};
        if (request.range.is_file())
          munmap(reinterpret_cast<void*>(request.handle.address), request.range.length().value);
      } else {
        outcomes[done + i] = base::fail(Errc::io_error, Stage::unpin, r < 0 ? -r : EIO,
                                        "io_uring refused to clear buffer {}", first + i);
      }
    }
    give_back(first, unpinned);
    done += count;
  }
}

}  // namespace iovane::pinning
