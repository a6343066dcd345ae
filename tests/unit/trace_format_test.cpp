#include "trace/format.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <random>

#include "support/seed.hpp"
#include "trace/byte_stream.hpp"
#include "trace/crc32c.hpp"
#include "trace/reference.hpp"
#include "trace/summary.hpp"

namespace iovane::trace {
namespace {

Event map_at(std::uint64_t iova, std::uint64_t length, std::uint64_t physical) {
  return {EventKind::map, 3, 17, *IovaRange::from_length(Iova{iova}, Bytes{length}), physical};
}
Event unmap_at(std::uint64_t iova, std::uint64_t length) {
  return {EventKind::unmap, 1, 19, *IovaRange::from_length(Iova{iova}, Bytes{length}), 0};
}

Trace sample() {
  Trace trace;
  trace.facts.source = "sample.ftrace";
  trace.facts.lines = 4;
  trace.facts.unmaps_dropped = 77;
  trace.events = {map_at(0x1000, 0x2000, 0x10000), map_at(0xffff'ffff'ffff'f000, 0x1000, 0xffff'ffff'ffff'f000),
                  unmap_at(0x1000, 0x2000), map_at(0x2000, 0x1000, 0)};
  return trace;
}

std::vector<std::uint8_t> encoded(const Trace& trace) {
  auto bytes = encode(trace);
  EXPECT_TRUE(bytes);
  return *std::move(bytes);
}

TEST(Crc32c, MatchesThePublishedCheckValue) {
  constexpr std::array<std::uint8_t, 9> digits{'1', '2', '3', '4', '5', '6', '7', '8', '9'};
  static_assert(crc32c(digits) == 0xe3069283U);
}

TEST(ByteStream, DifferencesComeBackInEitherDirection) {
  const std::uint64_t values[] = {0, 1, ~std::uint64_t{0}, 1ULL << 63, (1ULL << 63) - 1, 4096, 0};
  ByteWriter out;
  std::uint64_t base = 5;
  for (const auto v : values) {
    out.difference(v, base);
    base = v;
  }
  ByteReader in{out.bytes()};
  base = 5;
  for (const auto v : values) EXPECT_EQ(base = in.difference(base), v);
  EXPECT_TRUE(in.at_end());
  EXPECT_FALSE(in.failed());
  in.varint();
  EXPECT_TRUE(in.failed());
}

TEST(ByteStream, RefusesNumbersOfMoreThan64Bits) {
  const std::vector<std::uint8_t> eleven(11, 0xff);
  ByteReader in{eleven};
  in.varint();
  EXPECT_TRUE(in.failed());
}

TEST(TraceFormat, RoundTripKeepsEverything) {
  const Trace trace = sample();
  const auto back = decode(encoded(trace), "sample");
  ASSERT_TRUE(back) << back.error().detail();
  EXPECT_EQ(back->facts, trace.facts);
  EXPECT_EQ(back->events, trace.events);
}

TEST(TraceFormat, WritesAndReadsAFileAndLeavesNothingElseBehind) {
  const auto folder = std::filesystem::path{::testing::TempDir()} / ("iovane-format-" + std::to_string(::getpid()));
  std::filesystem::create_directory(folder);
  const std::string path = folder / "sample.iovtrace";
  ASSERT_TRUE(write_file(path, sample()));
  ASSERT_TRUE(read_file(path));
  std::size_t files = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator{folder}) ++files;
  EXPECT_EQ(files, 1U);
  const auto refused = write_file(folder / "missing" / "x", sample());
  EXPECT_NE(refused.error().detail().find("check that the folder exists"), std::string::npos);
  std::filesystem::remove_all(folder);
}

TEST(TraceFormat, EveryTruncationIsCalledOne) {
  const auto bytes = encoded(sample());
  for (std::size_t length = 8; length < bytes.size(); ++length) {
    const auto trace = decode(std::span{bytes}.first(length), "cut");
    ASSERT_FALSE(trace);
    EXPECT_NE(trace.error().detail().find("truncated"), std::string::npos) << length << trace.error().detail();
  }
}

TEST(TraceFormat, EveryFlippedBitIsNoticed) {
  const auto bytes = encoded(sample());
  for (std::size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    auto damaged = bytes;
    damaged[bit / 8] = static_cast<std::uint8_t>(damaged[bit / 8] ^ (1U << (bit % 8)));
    const auto trace = decode(damaged, "flipped");
    if (bit / 8 >= 60 && bit / 8 < 64) continue;  // four reserved bytes, which readers ignore
    ASSERT_FALSE(trace) << "bit " << bit;
    EXPECT_NE(trace.error().detail().find("flipped: "), std::string::npos);
  }
}

TEST(TraceFormat, NamesAWrongVersionBothWays) {
  auto bytes = encoded(sample());
  bytes[8] = 9;
  const auto trace = decode(bytes, "new");
  ASSERT_FALSE(trace);
  EXPECT_EQ(trace.error().code, Errc::unsupported);
  EXPECT_NE(trace.error().detail().find("version 9, this iovane reads version 1"), std::string::npos);
}

TEST(TraceFormat, SendsFtraceTextToTheImporter) {
  const std::string text = "# tracer: nop\n";
  const auto trace = decode({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()}, "x.ftrace");
  EXPECT_NE(trace.error().detail().find("iovane trace import"), std::string::npos);
  EXPECT_NE(decode({}, "empty").error().detail().find("not a trace file"), std::string::npos);
}

TEST(TraceFormat, RefusesEventsThatDoNotFitEachOther) {
  Trace overlapping = sample();
  overlapping.events.push_back(map_at(0x2000, 0x1000, 0));
  EXPECT_NE(decode(encoded(overlapping), "bad").error().detail().find("event 5 of 5"), std::string::npos);
  Trace nothing = sample();
  nothing.events.push_back(unmap_at(0x9000, 0x1000));
  EXPECT_NE(decode(encoded(nothing), "bad").error().detail().find("nothing is mapped"), std::string::npos);
  Trace cutting = sample();
  cutting.events[2] = unmap_at(0x1000, 0x1000);
  EXPECT_NE(decode(encoded(cutting), "bad").error().detail().find("cuts"), std::string::npos);
}

TEST(TraceFormat, SurvivesRandomDamageWithoutBelievingIt) {
  std::mt19937_64 random{test::seed()};
  const auto bytes = encoded(sample());
  for (int round = 0; round < 20'000; ++round) {
    auto damaged = bytes;
    for (int i = 0; i < 1 + round % 4; ++i) damaged[random() % damaged.size()] = static_cast<std::uint8_t>(random());
    const auto trace = decode(damaged, "random");
    if (trace.has_value()) {
      EXPECT_EQ(trace->events, sample().events);
    }
  }
}

TEST(Reference, KeepsRangesAndRefusesOverlapsAndCuts) {
  Reference reference;
  const auto range = [](std::uint64_t start, std::uint64_t length) {
    return *IovaRange::from_length(Iova{start}, Bytes{length});
  };
  EXPECT_TRUE(reference.map(range(0x1000, 0x2000), 7));
  EXPECT_EQ(reference.map(range(0x2000, 0x1000), 7).error().code, Errc::iova_busy);
  EXPECT_TRUE(reference.map(range(0x3000, 0x1000), 8));
  EXPECT_EQ(reference.live_bytes(), Bytes{0x3000});
  EXPECT_EQ(reference.unmap(range(0x2000, 0x2000)).error().code, Errc::would_bisect);
  EXPECT_EQ(reference.live().size(), 2U);
  ASSERT_TRUE(reference.find(Iova{0x2fff}));
  EXPECT_EQ(reference.find(Iova{0x2fff})->second.memory, 7U);
  EXPECT_FALSE(reference.find(Iova{0x4000}));
  EXPECT_TRUE(reference.overlaps(range(0x0, 0x2000)));
  EXPECT_FALSE(reference.overlaps(range(0x0, 0x1000)));
  EXPECT_EQ(*reference.unmap(range(0x0, 0x9000)), Bytes{0x3000});
  EXPECT_EQ(reference.unmap(range(0x0, 0x9000)).error().code, Errc::not_found);
}

TEST(Summary, CountsWhatATraceAsksFor) {
  const Summary s = summarize(sample());
  EXPECT_EQ(s.maps, 3U);
  EXPECT_EQ(s.unmaps, 1U);
  EXPECT_EQ(s.leaf_entries, 4U);
  EXPECT_EQ(s.distinct_granules, 4U);
  EXPECT_EQ(s.live_max, 2U);
  EXPECT_EQ(s.live_at_end, 2U);
  EXPECT_EQ(s.duration_ns, 2U);
  EXPECT_EQ(s.cpus, 2U);
  EXPECT_EQ(s.iova_last, iova_max.value);
}

}  // namespace
}  // namespace iovane::trace
