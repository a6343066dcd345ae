// Result and Error: how every iovane call says what happened.
//
// `Result<T>` has the method subset of C++23's std::expected (absent from g++ 12 in C++20 mode) with one fixed
// error type, so call sites survive a later move to it. `Error` is eight bytes and trivially copyable: it travels
// in completions without allocation. Its text for people lives beside it, see Error::detail().
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>

namespace iovane {

/// What went wrong, in iovane's words. to_errno() gives the errno that the C ABI returns for it.
enum class Errc : std::uint8_t {
  ok = 0,
  invalid_argument,  ///< EINVAL: malformed request: zero length, misaligned, no access right, unknown value
  overflow,          ///< EOVERFLOW: an address or a sum does not fit
  iova_busy,         ///< EEXIST: the range overlaps a live mapping or a reservation
  iova_reserved,     ///< EINVAL: the range touches an IOVA that the host keeps for itself or cannot translate
  iova_exhausted,    ///< ENOSPC: no free range of that size and alignment
  would_bisect,      ///< EINVAL: the unmap would cut a mapping in two; nothing was unmapped
  not_found,         ///< ENOENT: no such mapping, region, device or file
  stale_handle,      ///< ESTALE: the handle's object is gone
  memlock_exceeded,  ///< ENOMEM: pinning it would pass RLIMIT_MEMLOCK; the detail has limit, use and need
  out_of_memory,     ///< ENOMEM: no memory for metadata or in the kernel
  entry_limit,       ///< ENOSPC: the backend accepts no further mappings
  bad_memory,        ///< EFAULT: the memory is not mapped in this process, or its kind cannot be pinned
  permission,        ///< EPERM: the process may not do this
  busy,              ///< EBUSY: in use
  unsupported,       ///< EOPNOTSUPP: this host, kernel or backend has no such feature
  no_device,         ///< ENODEV: no such device, or it cannot be used
  io_error,          ///< EIO: the kernel failed in a way that has no better name; os_errno has its number
  quarantined,       ///< EIO: an unmap failed earlier; the range is never used again
  cancelled,         ///< ECANCELED: an operation that this one was linked to failed
  timed_out,         ///< ETIME: the wait ran out
  closed,            ///< ESHUTDOWN: the object is being taken down
  bad_format,        ///< EBADMSG: a file or a message is damaged or not what it says it is
  limit_reached,     ///< E2BIG: a configured bound of iovane itself
};

/// Where in the life of an operation it failed: the order of life is reserve, pin, map, publish, complete.
enum class Stage : std::uint8_t {
  none = 0,
  open,      ///< opening an engine, a backend, a file
  validate,  ///< checking the request; nothing had been done
  reserve,   ///< taking the IOVA
  pin,       ///< holding the memory
  map,       ///< making it reachable
  publish,   ///< entering it into the index
  unmap,     ///< making it unreachable
  unpin,     ///< letting the memory go
  release,   ///< giving the IOVA back
  attach,    ///< bringing a device into an address space
  detach,    ///< taking it out
  query,     ///< asking the host
};

/// A failure, or its absence (`Errc::ok`). Eight bytes, trivially copyable, owns nothing.
struct Error {
  Errc code = Errc::ok;
  Stage stage = Stage::none;
  std::uint16_t os_errno = 0;   ///< the kernel's errno, 0 when the kernel was not asked
  std::uint32_t detail_id = 0;  ///< which text belongs to it, 0 for none

  constexpr bool ok() const noexcept { return code == Errc::ok; }
  constexpr explicit operator bool() const noexcept { return code != Errc::ok; }
  constexpr bool operator==(const Error& e) const noexcept { return code == e.code && stage == e.stage; }

  /// A sentence for people: what was wrong, what was expected, what to do. Texts are kept in a ring of fixed size,
  /// so that an error costs no allocation; when more than `error_details_kept` newer ones have been made since, only
  /// the general description of the code is left. Any thread; allocates the returned string.
  std::string detail() const;
  /// "map: iova_busy (File exists): <detail>".
  std::string message() const;
};
static_assert(sizeof(Error) == 8 && std::is_trivially_copyable_v<Error>);

inline constexpr std::size_t error_details_kept = 512;
inline constexpr std::size_t error_detail_bytes_max = 504;

/// The name of a code or stage as it is spelled above; never null.
std::string_view to_string(Errc code) noexcept;
std::string_view to_string(Stage stage) noexcept;
/// The positive errno that stands for a code in the C ABI; 0 for ok.
int to_errno(Errc code) noexcept;

/// An error with a text (cut after error_detail_bytes_max bytes). Any thread, lock-free, does not allocate.
Error make_error(Errc code, Stage stage, int os_errno, std::string_view detail) noexcept;
inline Error make_error(Errc code, Stage stage, std::string_view detail) noexcept {
  return make_error(code, stage, 0, detail);
}

namespace detail {

/// Where a Result keeps what it has. Plain values stand beside their error, so that the compiler can keep both in
/// registers, which it does not with a variant; others share a place with it.
template <typename T>
class ResultState {
 public:
  constexpr ResultState(T value) noexcept(std::is_nothrow_move_constructible_v<T>) : state_{std::move(value)} {}
  constexpr ResultState(Error error) noexcept : state_{error} {}
  constexpr bool has_value() const noexcept { return state_.index() == 0; }
  constexpr T* value() noexcept { return std::get_if<0>(&state_); }
  constexpr const T* value() const noexcept { return std::get_if<0>(&state_); }
  constexpr Error error() const noexcept { return has_value() ? Error{} : *std::get_if<1>(&state_); }

 private:
  std::variant<T, Error> state_;
};

template <typename T>
requires(std::is_trivially_copyable_v<T>&& std::is_nothrow_default_constructible_v<T>) class ResultState<T> {
 public:
  constexpr ResultState(T value) noexcept : value_{value} {}
  constexpr ResultState(Error error) noexcept : error_{error} {}
  constexpr bool has_value() const noexcept { return error_.ok(); }
  constexpr T* value() noexcept { return &value_; }
  constexpr const T* value() const noexcept { return &value_; }
  constexpr Error error() const noexcept { return error_; }

 private:
  T value_{};
  Error error_{};
};

}  // namespace detail

/// A value or an Error. The methods mean what they mean in std::expected<T, Error>.
template <typename T>
class [[nodiscard]] Result {
 public:
  using value_type = T;

  constexpr Result(T value) noexcept(std::is_nothrow_move_constructible_v<T>) : state_{std::move(value)} {}
  constexpr Result(Error error) noexcept : state_{error} {}

  constexpr bool has_value() const noexcept { return state_.has_value(); }
  constexpr explicit operator bool() const noexcept { return has_value(); }

  /// Precondition of the five below, as in std::expected: there is a value.
  constexpr T& operator*() & noexcept { return *state_.value(); }
  constexpr const T& operator*() const& noexcept { return *state_.value(); }
  constexpr T&& operator*() && noexcept { return std::move(*state_.value()); }
  constexpr T* operator->() noexcept { return state_.value(); }
  constexpr const T* operator->() const noexcept { return state_.value(); }
  /// The error; `Errc::ok` when there is a value.
  constexpr Error error() const noexcept { return state_.error(); }

  template <typename U>
  constexpr T value_or(U&& other) const& {
    return has_value() ? **this : static_cast<T>(std::forward<U>(other));
  }
  template <typename U>
  constexpr T value_or(U&& other) && {
    return has_value() ? *std::move(*this) : static_cast<T>(std::forward<U>(other));
  }

  template <typename F>
  constexpr auto and_then(F&& f) && -> std::invoke_result_t<F, T&&> {
    if (has_value()) return std::invoke(std::forward<F>(f), *std::move(*this));
    return error();
  }
  template <typename F>
  constexpr auto transform(F&& f) && -> Result<std::invoke_result_t<F, T&&>> {
    if (has_value()) return std::invoke(std::forward<F>(f), *std::move(*this));
    return error();
  }
  template <typename F>
  constexpr Result or_else(F&& f) && {
    if (has_value()) return std::move(*this);
    return std::invoke(std::forward<F>(f), error());
  }

 private:
  detail::ResultState<T> state_;
};
static_assert(sizeof(Result<std::uint64_t>) == 16 && std::is_trivially_copyable_v<Result<std::uint64_t>>);

/// Success or an Error.
template <>
class [[nodiscard]] Result<void> {
 public:
  using value_type = void;
  constexpr Result() noexcept = default;
  constexpr Result(Error error) noexcept : error_{error} {}
  constexpr bool has_value() const noexcept { return error_.ok(); }
  constexpr explicit operator bool() const noexcept { return has_value(); }
  constexpr Error error() const noexcept { return error_; }
  template <typename F>
  constexpr auto and_then(F&& f) const -> std::invoke_result_t<F> {
    if (has_value()) return std::invoke(std::forward<F>(f));
    return error_;
  }

 private:
  Error error_{};
};

}  // namespace iovane
