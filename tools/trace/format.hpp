// The binary trace format, version 1: docs/TRACE_FORMAT.md.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "iovane/result.hpp"
#include "trace/event.hpp"

namespace iovane::trace {

inline constexpr std::uint32_t format_version = 1;

/// The bytes of a trace file. Errors: limit_reached (more than events_max events), out_of_memory.
Result<std::vector<std::uint8_t>> encode(const Trace& trace);

/// A trace from the bytes of a file. `name` stands for the file in error texts. Believes nothing: magic, version,
/// lengths, three checksums, every event, and the invariant of Trace. Errors (bad_format) name the file, the byte
/// offset or the event, and the cure.
Result<Trace> decode(std::span<const std::uint8_t> bytes, std::string_view name);

/// Reads and decodes a file of at most 1 GiB.
Result<Trace> read_file(const std::string& path);
/// Encodes and writes a file, complete or not at all: a temporary file beside it takes its place at the end.
Result<void> write_file(const std::string& path, const Trace& trace);

}  // namespace iovane::trace
