// A file descriptor with one owner.
#pragma once

#include <utility>

#include "iovane/result.hpp"

namespace iovane::base {

/// Owns a descriptor and closes it. Move-only; -1 means none.
class UniqueFd {
 public:
  UniqueFd() noexcept = default;
  explicit UniqueFd(int fd) noexcept : fd_{fd} {}
  UniqueFd(UniqueFd&& o) noexcept : fd_{std::exchange(o.fd_, -1)} {}
  UniqueFd& operator=(UniqueFd&& o) noexcept {
    if (this != &o) {
      reset();
      fd_ = std::exchange(o.fd_, -1);
    }
    return *this;
  }
  UniqueFd(const UniqueFd&) = delete;
  UniqueFd& operator=(const UniqueFd&) = delete;
  ~UniqueFd() { reset(); }

  int get() const noexcept { return fd_; }
  explicit operator bool() const noexcept { return fd_ >= 0; }
  /// Gives the descriptor to the caller.
  int release() noexcept { return std::exchange(fd_, -1); }
  void reset() noexcept;

  /// open(2) with O_CLOEXEC. The error's detail names the path and what usually helps.
  static Result<UniqueFd> open(const char* path, int flags);
  /// A duplicate (F_DUPFD_CLOEXEC) of a descriptor that stays the caller's.
  static Result<UniqueFd> duplicate(int fd);

 private:
  int fd_ = -1;
};

}  // namespace iovane::base
