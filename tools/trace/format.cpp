#include "trace/format.hpp"

#include <fcntl.h>
#include <unistd.h>
#include <zstd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "base/checked_math.hpp"
#include "base/error_text.hpp"
#include "base/os_error.hpp"
#include "base/unique_fd.hpp"
#include "trace/byte_stream.hpp"
#include "trace/crc32c.hpp"
#include "trace/input_file.hpp"
#include "trace/reference.hpp"

namespace iovane::trace {
namespace {

constexpr std::array<std::uint8_t, 8> magic{'I', 'O', 'V', 'T', 'R', 'A', 'C', 'E'};
constexpr std::size_t header_bytes = 64;
constexpr std::size_t facts_bytes_max = 4096;
constexpr std::size_t event_bytes_max = 1 + 1 + 4 * 10;  // kind, cpu, and four varints of at most ten bytes
constexpr std::uint64_t file_bytes_max = std::uint64_t{1} << 30;
constexpr int compression_level = 19;

struct Header {
  std::uint32_t version = format_version;
  std::uint32_t header_bytes = trace::header_bytes;
  std::uint64_t events = 0;
  std::uint64_t payload_bytes = 0;  // compressed, behind the facts
  std::uint64_t columns_bytes = 0;  // the payload decompressed
  std::uint32_t facts_bytes = 0;    // behind the header
  std::uint32_t facts_crc = 0;
  std::uint32_t payload_crc = 0;  // of the compressed bytes
  std::uint32_t columns_crc = 0;  // of the decompressed bytes
};

std::vector<std::uint8_t> encode_header(const Header& h) {
  ByteWriter out;
  out.bytes().assign(magic.begin(), magic.end());
  out.fixed(h.version);
  out.fixed(h.header_bytes);
  out.fixed(h.events);
  out.fixed(h.payload_bytes);
  out.fixed(h.columns_bytes);
  out.fixed(h.facts_bytes);
  out.fixed(h.facts_crc);
  out.fixed(h.payload_crc);
  out.fixed(h.columns_crc);
  out.fixed(crc32c(out.bytes()));
  out.fixed(std::uint32_t{0});
  return std::move(out.bytes());
}

/// The counts of the facts in file order: the one list that both directions use.
template <typename Facts, typename Visit>
void for_each_count(Facts& f, Visit visit) {
  visit(f.lines);
  visit(f.maps_read);
  visit(f.unmaps_read);
  visit(f.foreign_lines);
  visit(f.malformed_lines);
  visit(f.lost_events);
  visit(f.unmaps_moved_later);
  visit(f.unmaps_moved_earlier);
  visit(f.unmaps_trimmed);
  visit(f.unmaps_dropped);
  visit(f.maps_dropped);
  visit(f.spaces);
  visit(f.space_stride);
  visit(f.moved_to_space);
}

std::vector<std::uint8_t> encode_facts(const SourceFacts& facts) {
  ByteWriter out;
  out.text(std::string_view{facts.source}.substr(0, 1024));
  for_each_count(facts, [&](std::uint64_t count) { out.varint(count); });
  return std::move(out.bytes());
}

/// Columns, because each of them repeats itself and zstd sees it: kinds, CPUs, time steps, start steps, lengths in
/// granules less one, and for maps the physical address less where the previous map stopped.
std::vector<std::uint8_t> encode_columns(const std::vector<Event>& events) {
  ByteWriter out;
  for (const Event& e : events) out.fixed(static_cast<std::uint8_t>(e.kind));
  for (const Event& e : events) out.fixed(e.cpu);
  std::uint64_t previous = 0;
  for (const Event& e : events) {
    out.difference(e.time_ns, previous);
    previous = e.time_ns;
  }
  previous = 0;
  for (const Event& e : events) {
    out.difference(e.range.start.value / granule, previous);
    previous = e.range.start.value / granule;
  }
  for (const Event& e : events) out.varint(e.range.span() / granule);
  previous = 0;
  for (const Event& e : events) {
    if (e.kind != EventKind::map) continue;
    out.difference(e.physical / granule, previous);
    previous = e.physical / granule + e.range.span() / granule + 1;
  }
  return std::move(out.bytes());
}

bool decode_columns(std::span<const std::uint8_t> bytes, std::vector<Event>& events) {
  ByteReader in{bytes};
  for (Event& e : events) {
    const auto kind = in.fixed<std::uint8_t>();
    if (kind > static_cast<std::uint8_t>(EventKind::unmap)) return false;
    e.kind = static_cast<EventKind>(kind);
  }
  for (Event& e : events) e.cpu = in.fixed<std::uint8_t>();
  std::uint64_t previous = 0;
  for (Event& e : events) e.time_ns = previous = in.difference(previous);
  constexpr std::uint64_t granules_max = ~std::uint64_t{0} / granule;
  previous = 0;
  for (Event& e : events) {
    previous = in.difference(previous);
    if (previous > granules_max) return false;
    e.range.start.value = previous * granule;
  }
  for (Event& e : events) {
    const std::uint64_t further = in.varint();
    if (further > granules_max - e.range.start.value / granule) return false;
    e.range.last.value = e.range.start.value + further * granule + (granule - 1);
  }
  previous = 0;
  for (Event& e : events) {
    if (e.kind != EventKind::map) continue;
    const std::uint64_t first = in.difference(previous);
    const std::uint64_t further = e.range.span() / granule;
    if (first > granules_max || further > granules_max - first) return false;
    e.physical = first * granule;
    previous = first + further + 1;
  }
  return !in.failed() && in.at_end();
}

Error damaged(std::string_view name, std::size_t offset, std::string_view what) {
  return base::fail(Errc::bad_format, Stage::query, 0,
                    "{}: at byte {}: {}: the file is corrupted; copy it again, or import the recording again with "
                    "'iovane trace import'",
                    name, offset, what);
}

Error truncated(std::string_view name, std::uint64_t have, std::uint64_t need) {
  return base::fail(Errc::bad_format, Stage::query, 0,
                    "{}: the file ends after {} of {} bytes: it is truncated; copy it again, or import the recording "
                    "again with 'iovane trace import'",
                    name, have, need);
}

Result<Header> decode_header(std::span<const std::uint8_t> bytes, std::string_view name) {
  const std::size_t comparable = std::min(bytes.size(), magic.size());
  if (comparable == 0 || std::memcmp(bytes.data(), magic.data(), comparable) != 0) {
    const bool ftrace = !bytes.empty() && (bytes[0] == '#' || bytes[0] == ' ' || bytes[0] == 0x28);
    return base::fail(Errc::bad_format, Stage::query, 0,
                      "{}: not a trace file: it begins with other bytes than \"IOVTRACE\"{}", name,
                      ftrace ? "; if it is ftrace text, plain or zstd, convert it first: iovane trace import FILE"
                             : "; expected a file that 'iovane trace import' wrote");
  }
  if (bytes.size() < header_bytes) return truncated(name, bytes.size(), header_bytes);
  ByteReader in{bytes.subspan(magic.size())};
  Header h;
  h.version = in.fixed<std::uint32_t>();
  h.header_bytes = in.fixed<std::uint32_t>();
  h.events = in.fixed<std::uint64_t>();
  h.payload_bytes = in.fixed<std::uint64_t>();
  h.columns_bytes = in.fixed<std::uint64_t>();
  h.facts_bytes = in.fixed<std::uint32_t>();
  h.facts_crc = in.fixed<std::uint32_t>();
  h.payload_crc = in.fixed<std::uint32_t>();
  h.columns_crc = in.fixed<std::uint32_t>();
  // The version comes before the checksum: a later version may check its header in another way.
  if (h.version != format_version)
    return base::fail(Errc::unsupported, Stage::query, 0,
                      "{}: trace format version {}, this iovane reads version {}: import the recording again with "
                      "this iovane, or use the one that wrote the file",
                      name, h.version, format_version);
  constexpr std::size_t crc_at = 56;
  if (ByteReader{bytes.subspan(crc_at)}.fixed<std::uint32_t>() != crc32c(bytes.first(crc_at)))
    return damaged(name, crc_at, "the header's checksum does not match");
  if (h.header_bytes != header_bytes) return damaged(name, 12, "the header's length is not 64");
  if (h.events > events_max || h.facts_bytes > facts_bytes_max || h.payload_bytes > file_bytes_max ||
      h.columns_bytes > h.events * event_bytes_max)
    return damaged(name, 16, "the header promises more than a trace can hold");
  const std::uint64_t need = header_bytes + h.facts_bytes + h.payload_bytes;
  if (bytes.size() < need) return truncated(name, bytes.size(), need);
  if (bytes.size() > need) return damaged(name, need, "there are bytes after the end of the trace");
  return h;
}

}  // namespace

Result<std::vector<std::uint8_t>> encode(const Trace& trace) {
  if (trace.events.size() > events_max)
    return base::fail(Errc::limit_reached, Stage::validate, 0, "{} events, a trace holds at most {}",
                      trace.events.size(), events_max);
  const auto facts = encode_facts(trace.facts);
  const auto columns = encode_columns(trace.events);
  std::vector<std::uint8_t> payload(ZSTD_compressBound(columns.size()));
  const std::size_t packed =
      ZSTD_compress(payload.data(), payload.size(), columns.data(), columns.size(), compression_level);
  if (ZSTD_isError(packed) != 0)
    return base::fail(Errc::out_of_memory, Stage::none, 0, "compressing {} bytes: {}", columns.size(),
                      ZSTD_getErrorName(packed));
  payload.resize(packed);

  Header h;
  h.events = trace.events.size();
  h.payload_bytes = payload.size();
  h.columns_bytes = columns.size();
  h.facts_bytes = static_cast<std::uint32_t>(facts.size());
  h.facts_crc = crc32c(facts);
  h.payload_crc = crc32c(payload);
  h.columns_crc = crc32c(columns);
  auto bytes = encode_header(h);
  bytes.insert(bytes.end(), facts.begin(), facts.end());
  bytes.insert(bytes.end(), payload.begin(), payload.end());
  return bytes;
}

Result<Trace> decode(std::span<const std::uint8_t> bytes, std::string_view name) {
  const auto header = decode_header(bytes, name);
  if (!header) return header.error();
  const auto facts = bytes.subspan(header_bytes, header->facts_bytes);
  const auto payload = bytes.subspan(header_bytes + header->facts_bytes);
  if (crc32c(facts) != header->facts_crc)
    return damaged(name, header_bytes, "the checksum of the source facts does not match");
  const std::size_t payload_at = header_bytes + header->facts_bytes;
  if (crc32c(payload) != header->payload_crc)
    return damaged(name, payload_at, "the checksum of the events does not match");

  Trace trace;
  ByteReader in{facts};
  trace.facts.source = in.text();
  for_each_count(trace.facts, [&](std::uint64_t& count) { count = in.varint(); });
  if (in.failed() || !in.at_end()) return damaged(name, header_bytes, "the source facts do not parse");

  std::vector<std::uint8_t> columns(header->columns_bytes);
  const std::size_t unpacked = ZSTD_decompress(columns.data(), columns.size(), payload.data(), payload.size());
  if (ZSTD_isError(unpacked) != 0 || unpacked != columns.size())
    return damaged(name, payload_at, "the events do not decompress");
  if (crc32c(columns) != header->columns_crc)
    return damaged(name, payload_at, "the checksum of the decompressed events does not match");
  trace.events.resize(header->events);
  if (!decode_columns(columns, trace.events)) return damaged(name, payload_at, "the events do not parse");
  if (const auto fits = check_order(trace, name); !fits) return fits.error();
  return trace;
}

Result<Trace> read_file(const std::string& path) {
  const auto file = open_input(path);
  if (!file) return file.error();
  if (file->bytes > file_bytes_max)
    return base::fail(Errc::limit_reached, Stage::open, 0, "{} has {} bytes; trace files have at most {}", path,
                      file->bytes, file_bytes_max);
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(file->bytes));
  std::size_t have = 0;
  while (have < bytes.size()) {
    const ssize_t got = ::read(file->fd.get(), bytes.data() + have, bytes.size() - have);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      const int number = errno;
      return base::fail(base::errc_from_errno(number), Stage::query, number, "{}: reading failed at byte {}", path,
                        have);
    }
    if (got == 0) break;
    have += static_cast<std::size_t>(got);
  }
  bytes.resize(have);
  return decode(bytes, path);
}

Result<void> write_file(const std::string& path, const Trace& trace) {
  const auto bytes = encode(trace);
  if (!bytes) return bytes.error();
  const std::string temporary = path + ".part";
  const auto failed = [&](std::string_view what) {
    const int number = errno;
    ::unlink(temporary.c_str());
    return base::fail(base::errc_from_errno(number), Stage::open, number,
                      "{}: {} failed: {}; check that the folder exists, is writable and has space", path, what,
                      std::strerror(number));  // NOLINT(concurrency-mt-unsafe): glibc's is thread-local
  };
  const base::UniqueFd file{::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644)};
  if (!file) return failed("creating it");
  std::size_t written = 0;
  while (written < bytes->size()) {
    const ssize_t put = ::write(file.get(), bytes->data() + written, bytes->size() - written);
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) return failed("writing");
    written += static_cast<std::size_t>(put);
  }
  if (::rename(temporary.c_str(), path.c_str()) != 0) return failed("putting it in place");
  return {};
}

}  // namespace iovane::trace
