// Little-endian numbers and LEB128 variable-length numbers in byte vectors.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace iovane::trace {

class ByteWriter {
 public:
  template <typename T>
  void fixed(T value) {
    for (std::size_t i = 0; i < sizeof(T); ++i) bytes_.push_back(static_cast<std::uint8_t>(value >> (8 * i)));
  }
  void varint(std::uint64_t value) {
    while (value >= 0x80) {
      bytes_.push_back(static_cast<std::uint8_t>(value | 0x80));
      value >>= 7;
    }
    bytes_.push_back(static_cast<std::uint8_t>(value));
  }
  /// A difference modulo 2^64, small in either direction: zigzag.
  void difference(std::uint64_t value, std::uint64_t base) {
    const std::uint64_t d = value - base;
    varint((d << 1) ^ ((d >> 63) != 0 ? ~std::uint64_t{0} : 0));
  }
  void text(std::string_view text) {
    varint(text.size());
    bytes_.insert(bytes_.end(), text.begin(), text.end());
  }
  std::vector<std::uint8_t>& bytes() noexcept { return bytes_; }

 private:
  std::vector<std::uint8_t> bytes_;
};

/// Reads what ByteWriter wrote. Past the end, or at a malformed number, it answers zero and stays failed.
class ByteReader {
 public:
  explicit ByteReader(std::span<const std::uint8_t> bytes) noexcept : bytes_{bytes} {}

  template <typename T>
  T fixed() noexcept {
    if (bytes_.size() - at_ < sizeof(T)) return fail<T>();
    T value = 0;
    for (std::size_t i = 0; i < sizeof(T); ++i)
      value = static_cast<T>(value | static_cast<T>(T{bytes_[at_ + i]} << (8 * i)));
    at_ += sizeof(T);
    return value;
  }
  std::uint64_t varint() noexcept {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      if (at_ == bytes_.size()) return fail<std::uint64_t>();
      const std::uint8_t byte = bytes_[at_++];
      if (shift == 63 && byte > 1) return fail<std::uint64_t>();
      value |= std::uint64_t{byte & 0x7fU} << shift;
      if ((byte & 0x80U) == 0) return value;
    }
    return fail<std::uint64_t>();
  }
  std::uint64_t difference(std::uint64_t base) noexcept {
    const std::uint64_t zigzag = varint();
    return base + ((zigzag >> 1) ^ ((zigzag & 1U) != 0 ? ~std::uint64_t{0} : 0));
  }
  std::string_view text() noexcept {
    const std::uint64_t length = varint();
    if (failed_ || bytes_.size() - at_ < length) return fail<std::string_view>();
    const auto* const start = reinterpret_cast<const char*>(bytes_.data() + at_);
    at_ += length;
    return {start, length};
  }
  bool failed() const noexcept { return failed_; }
  bool at_end() const noexcept { return at_ == bytes_.size(); }
  std::size_t offset() const noexcept { return at_; }

 private:
  template <typename T>
  T fail() noexcept {
    failed_ = true;
    at_ = bytes_.size();
    return T{};
  }
  std::span<const std::uint8_t> bytes_;
  std::size_t at_ = 0;
  bool failed_ = false;
};

}  // namespace iovane::trace
