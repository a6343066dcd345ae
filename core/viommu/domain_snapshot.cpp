#include "viommu/domain_snapshot.hpp"

#include <array>
#include <new>

#include "base/error_text.hpp"

namespace iovane::viommu {
namespace {

constexpr std::size_t header_bytes = 32;
constexpr std::size_t record_bytes = 32;
constexpr std::size_t checksum_bytes = 8;
constexpr std::uint64_t crc_polynomial = 0x42f0'e1eb'a9ea'3693;  // ECMA-182

constexpr std::array<std::uint64_t, 256> crc_table = [] {
  std::array<std::uint64_t, 256> table{};
  for (std::uint64_t i = 0; i < 256; ++i) {
    std::uint64_t r = i << 56;
    for (int bit = 0; bit < 8; ++bit) r = (r >> 63) != 0 ? r << 1 ^ crc_polynomial : r << 1;
    table[i] = r;
  }
  return table;
}();

template <typename T>
void append(std::vector<std::byte>& out, T value) {
  for (std::size_t i = 0; i < sizeof value; ++i) out.push_back(static_cast<std::byte>(value >> (8 * i)));
}

template <typename T>
T read(std::span<const std::byte> bytes, std::size_t at) noexcept {
  T value = 0;
  for (std::size_t i = 0; i < sizeof value; ++i) value |= static_cast<T>(static_cast<T>(bytes[at + i]) << (8 * i));
  return value;
}

}  // namespace

std::uint64_t snapshot_checksum(std::span<const std::byte> bytes) noexcept {
  std::uint64_t crc = 0;
  for (const std::byte b : bytes) crc = crc << 8 ^ crc_table[(crc >> 56 ^ static_cast<std::uint64_t>(b)) & 0xff];
  return crc;
}

Result<std::vector<std::byte>> save_domain(const ShadowDomain& domain) {
  if (!domain.idle())
    return base::fail(Errc::busy, Stage::query, 0, "{}: a batch is not finished; poll() until it is",
                      domain.config().name);
  std::vector<std::byte> out;
  append(out, snapshot_magic);
  append(out, snapshot_version);
  append(out, std::uint32_t{domain.config().granule_shift});
  append(out, std::uint32_t{domain.config().address_bits});
  append(out, std::uint32_t{0});
  append(out, std::uint64_t{0});
  std::uint64_t count = 0;
  domain.for_each_mapping([&](IovaRange range, std::uint64_t gpa, Access access) {
    append(out, range.start.value);
    append(out, range.last.value);
    append(out, gpa);
    append(out, static_cast<std::uint64_t>(access));
    ++count;
  });
  for (std::size_t i = 0; i < 8; ++i) out[24 + i] = static_cast<std::byte>(count >> (8 * i));
  append(out, snapshot_checksum(out));
  return out;
}

Result<void> restore_domain(std::span<const std::byte> bytes, const GuestMemory::View& view, ShadowDomain& domain) {
  const auto bad = [&](std::string_view what) {
    return base::fail(Errc::bad_format, Stage::validate, 0, "{}: snapshot of {} bytes: {}", domain.config().name,
                      bytes.size(), what);
  };
  if (bytes.size() < header_bytes + checksum_bytes) return bad("too short");
  if (read<std::uint64_t>(bytes, 0) != snapshot_magic) return bad("not a snapshot of a guest domain");
  if (read<std::uint32_t>(bytes, 8) != snapshot_version) return bad("of a version this program does not know");
  const auto payload = bytes.first(bytes.size() - checksum_bytes);
  if (snapshot_checksum(payload) != read<std::uint64_t>(bytes, payload.size()))
    return bad("damaged: its checksum is wrong");
  const auto count = read<std::uint64_t>(bytes, 24);
  if (count != (payload.size() - header_bytes) / record_bytes || (payload.size() - header_bytes) % record_bytes != 0)
    return bad("its length and its count differ");
  if (read<std::uint32_t>(bytes, 12) != domain.config().granule_shift ||
      read<std::uint32_t>(bytes, 16) != domain.config().address_bits || read<std::uint32_t>(bytes, 20) != 0)
    return bad("of a domain with another granule or width");
  if (!domain.idle() || domain.index().leaves() != 0)
    return base::fail(Errc::invalid_argument, Stage::validate, 0, "{}: only an empty domain can be restored",
                      domain.config().name);
  Result<void> outcome;
  for (std::size_t at = header_bytes; at < payload.size() && outcome; at += record_bytes) {
    const IovaRange range{Iova{read<std::uint64_t>(bytes, at)}, Iova{read<std::uint64_t>(bytes, at + 8)}};
    const auto access = read<std::uint64_t>(bytes, at + 24);
    if (access == 0 || access > 3 || !range.well_formed()) {
      outcome = bad("a mapping that is none");
    } else if (auto mapped = domain.map(view, range, read<std::uint64_t>(bytes, at + 16), static_cast<Access>(access));
               !mapped) {
      outcome = mapped.error().code == Errc::limit_reached || mapped.error().code == Errc::out_of_memory
                    ? mapped.error()
                    : bad(mapped.error().detail());
    }
  }
  if (outcome) {
    domain.commit_and_wait();
    if (!domain.failures().empty()) outcome = domain.failures().front().error;
  }
  if (!outcome) {
    static_cast<void>(domain.unmap(view, IovaRange::everything(), CutRule::cut));
    domain.commit_and_wait();
  }
  return outcome;
}

}  // namespace iovane::viommu
