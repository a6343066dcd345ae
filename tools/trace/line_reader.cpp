#include "trace/line_reader.hpp"

#include <unistd.h>
#include <zstd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <vector>

#include "base/error_text.hpp"
#include "base/os_error.hpp"
#include "base/unique_fd.hpp"
#include "trace/event.hpp"
#include "trace/input_file.hpp"

namespace iovane::trace {
namespace {

constexpr std::size_t block_bytes = 1U << 17;
constexpr std::array<unsigned char, 4> zstd_magic{0x28, 0xb5, 0x2f, 0xfd};

struct FreeDecompressor {
  void operator()(ZSTD_DStream* stream) const noexcept { ZSTD_freeDStream(stream); }
};

}  // namespace

struct LineReader::State {
  std::string path;
  base::UniqueFd file;
  std::uint64_t bytes_total = 0;
  std::uint64_t bytes_read = 0;
  std::uint64_t line = 0;
  std::vector<char> input = std::vector<char>(block_bytes);  // as stored in the file
  std::size_t input_at = 0, input_size = 0;
  std::vector<char> text = std::vector<char>(block_bytes);  // what lines are cut from
  std::size_t text_at = 0, text_size = 0;
  bool file_ended = false;
  std::unique_ptr<ZSTD_DStream, FreeDecompressor> zstd;  // null: the file is plain text
  std::size_t frame_bytes_wanted = 0;                    // 0: between two frames

  Result<void> fill_input();
  Result<void> fill_text();
};

Result<void> LineReader::State::fill_input() {
  if (input_at < input_size || file_ended) return {};
  ssize_t got = 0;
  do {
    got = ::read(file.get(), input.data(), input.size());
  } while (got < 0 && errno == EINTR);
  if (got < 0) {
    const int number = errno;
    return base::fail(base::errc_from_errno(number), Stage::query, number, "{}: reading failed after line {}: {}", path,
                      line, std::strerror(number));  // NOLINT(concurrency-mt-unsafe): glibc's is thread-local
  }
  input_at = 0;
  input_size = static_cast<std::size_t>(got);
  bytes_read += input_size;
  file_ended = got == 0;
  return {};
}

/// Appends decoded bytes to `text`, after moving what is left to its front.
Result<void> LineReader::State::fill_text() {
  std::memmove(text.data(), text.data() + text_at, text_size - text_at);
  text_size -= text_at;
  text_at = 0;
  while (text_size < text.size()) {
    if (const auto filled = fill_input(); !filled) return filled;
    if (input_at == input_size) {
      if (frame_bytes_wanted != 0)
        return base::fail(Errc::bad_format, Stage::query, 0,
                          "{}: the zstd data stop in the middle, after line {}: the file is truncated; copy it again",
                          path, line);
      return {};
    }
    if (!zstd) {
      const std::size_t count = std::min(text.size() - text_size, input_size - input_at);
      std::memcpy(text.data() + text_size, input.data() + input_at, count);
      text_size += count;
      input_at += count;
      return {};
    }
    ZSTD_inBuffer in{input.data(), input_size, input_at};
    ZSTD_outBuffer out{text.data(), text.size(), text_size};
    const std::size_t wanted = ZSTD_decompressStream(zstd.get(), &out, &in);
    if (ZSTD_isError(wanted) != 0)
      return base::fail(Errc::bad_format, Stage::query, 0,
                        "{}: damaged zstd data after line {} ({}): the file is corrupted; copy it again", path, line,
                        ZSTD_getErrorName(wanted));
    const bool progressed = out.pos > text_size;
    frame_bytes_wanted = wanted;
    input_at = in.pos;
    text_size = out.pos;
    if (progressed) return {};
  }
  return {};
}

LineReader::LineReader(std::unique_ptr<State> state) noexcept : state_{std::move(state)} {}
LineReader::LineReader(LineReader&&) noexcept = default;
LineReader& LineReader::operator=(LineReader&&) noexcept = default;
LineReader::~LineReader() = default;

Result<LineReader> LineReader::open(const std::string& path) {
  auto file = open_input(path);
  if (!file) return file.error();
  auto state = std::make_unique<State>();
  state->path = path;
  state->file = std::move(file->fd);
  state->bytes_total = file->bytes;
  if (const auto filled = state->fill_input(); !filled) return filled.error();
  if (state->input_size >= zstd_magic.size() &&
      std::memcmp(state->input.data(), zstd_magic.data(), zstd_magic.size()) == 0) {
    state->zstd.reset(ZSTD_createDStream());
    if (!state->zstd) return base::fail(Errc::out_of_memory, Stage::open, ENOMEM, "{}: no memory to decompress", path);
  }
  return LineReader{std::move(state)};
}

Result<std::optional<std::string_view>> LineReader::next() {
  State& s = *state_;
  std::size_t searched = 0;
  for (;;) {
    const char* const start = s.text.data() + s.text_at;
    const std::size_t available = s.text_size - s.text_at;
    const void* const newline = std::memchr(start + searched, '\n', available - searched);
    const std::size_t length =
        newline != nullptr ? static_cast<std::size_t>(static_cast<const char*>(newline) - start) : available;
    if (length > line_bytes_max)
      return base::fail(Errc::bad_format, Stage::query, 0,
                        "{}:{}: line of more than {} bytes: this is no ftrace text (expected the kernel's "
                        "iommu:map and iommu:unmap events, one per line)",
                        s.path, s.line + 1, line_bytes_max);
    if (newline != nullptr) {
      s.text_at += length + 1;
      ++s.line;
      return std::optional{std::string_view{start, length}};
    }
    searched = available;
    if (const auto filled = s.fill_text(); !filled) return filled.error();
    if (s.text_size - s.text_at == available) {  // the end of the file; a last line may lack its newline
      if (available == 0) return std::optional<std::string_view>{};
      const std::string_view last{s.text.data() + s.text_at, available};
      s.text_at = s.text_size;
      ++s.line;
      return std::optional{last};
    }
  }
}

std::uint64_t LineReader::line_number() const noexcept { return state_->line; }
std::uint64_t LineReader::bytes_read() const noexcept { return state_->bytes_read; }
std::uint64_t LineReader::bytes_total() const noexcept { return state_->bytes_total; }

}  // namespace iovane::trace
