#include "trace/import.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>

#include "trace/format.hpp"
#include "trace/ftrace_line.hpp"
#include "trace/reference.hpp"

namespace iovane::trace {
namespace {

const std::string data = IOVANE_TEST_DATA;

/// Writes ftrace text to a file of its own and removes it again.
class Recording {
 public:
  explicit Recording(const std::string& text)
      : path_{::testing::TempDir() + "iovane-recording-" + std::to_string(::getpid()) + "-" + std::to_string(next_++)} {
    std::ofstream{path_, std::ios::binary} << text;
  }
  ~Recording() { ::unlink(path_.c_str()); }
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;
  const std::string& path() const { return path_; }

  static std::string map(int cpu, const char* time, unsigned iova, unsigned physical, unsigned size) {
    char line[256];
    std::snprintf(line, sizeof line,
                  "  t-1  [%03d] .....  %s: map: IOMMU: iova=0x%016x - 0x%016x paddr=0x%016x size=%u\n", cpu, time,
                  iova, iova + size, physical, size);
    return line;
  }
  static std::string unmap(int cpu, const char* time, unsigned iova, unsigned size) {
    char line[256];
    std::snprintf(line, sizeof line,
                  "  t-1  [%03d] .....  %s: unmap: IOMMU: iova=0x%016x - 0x%016x size=%u unmapped_size=%u\n", cpu, time,
                  iova, iova + size, size, size);
    return line;
  }

 private:
  static inline int next_ = 0;
  std::string path_;
};

Result<Trace> import_text(const std::string& text, const ImportOptions& options = {}) {
  const Recording recording{text};
  return import_ftrace(recording.path(), options);
}

TEST(FtraceLine, ReadsMapAndUnmapOfTheKernelsTwoFormats) {
  const auto now = parse_ftrace_line(
      "          <idle>-0       [001] dNH..    12.120591: unmap: IOMMU: iova=0x00000000fffb4000 - 0x00000000fffb5000 "
      "size=4096 unmapped_size=4096");
  const auto* unmap = std::get_if<Event>(&now);
  ASSERT_NE(unmap, nullptr);
  EXPECT_EQ(unmap->kind, EventKind::unmap);
  EXPECT_EQ(unmap->cpu, 1);
  EXPECT_EQ(unmap->time_ns, 12'120'591'000U);
  EXPECT_EQ(unmap->range, (IovaRange{Iova{0xfffb4000}, Iova{0xfffb4fff}}));

  const auto before_5_17 = parse_ftrace_line(
      "odd [name: 7]-12 [015] 1.5: map: IOMMU: iova=0x0000000000001000 paddr=0x0000000000003000 size=8192");
  const auto* map = std::get_if<Event>(&before_5_17);
  ASSERT_NE(map, nullptr);
  EXPECT_EQ(map->cpu, 15);
  EXPECT_EQ(map->time_ns, 1'500'000'000U);
  EXPECT_EQ(map->range, (IovaRange{Iova{0x1000}, Iova{0x2fff}}));
  EXPECT_EQ(map->physical, 0x3000U);
}

TEST(FtraceLine, ReadsARangeThatReachesTheLastAddress) {
  const auto line = parse_ftrace_line(
      "t-1 [000] ..... 1.0: unmap: IOMMU: iova=0xfffffffffffff000 - 0x0000000000000000 size=4096 unmapped_size=4096");
  const auto* event = std::get_if<Event>(&line);
  ASSERT_NE(event, nullptr);
  EXPECT_EQ(event->range.last, iova_max);
}

TEST(FtraceLine, TellsCommentsLossesAndForeignEventsApart) {
  EXPECT_TRUE(std::holds_alternative<BlankLine>(parse_ftrace_line("# tracer: nop")));
  EXPECT_TRUE(std::holds_alternative<BlankLine>(parse_ftrace_line("   ")));
  EXPECT_TRUE(std::holds_alternative<ForeignLine>(parse_ftrace_line("t-1 [000] d.... 1.0: sched_switch: prev=x")));
  const auto lost = parse_ftrace_line("CPU:1 [LOST 57 EVENTS]");
  ASSERT_TRUE(std::holds_alternative<LostLine>(lost));
  EXPECT_EQ(std::get<LostLine>(lost).events, 57U);
}

TEST(FtraceLine, BelievesNothingThatIsNotWhole) {
  for (const char* text : {
           "t-1 [000] ..... 1.0: map: IOMMU: iova=0x1000 - 0x2000 paddr=0x3000",            // no size
           "t-1 [000] ..... 1.0: map: IOMMU: iova=0x1000 - 0x2000 paddr=0x3000 size=8192",  // not end - start
           "t-1 [000] ..... 1.0: map: IOMMU: iova=0x1000 - 0x2000 size=4096",               // no paddr
           "t-1 [000] ..... 1.0: map: IOMMU: iova=0x1004 - 0x2004 paddr=0x3000 size=4096",  // misaligned
           "t-1 [000] ..... 1.0: map: IOMMU: iova=0x1000 - 0x1000 paddr=0x3000 size=0",     // empty
           "t-1 [000] ..... 1.0: unmap: IOMMU: iova=0x1000 - 0x2000 size=4096",             // no unmapped_size
           "t-1 [000] ..... 1.0: unmap: IOMMU: iova=0x1000 - 0x2000 size=4096 unmapped_size=8192",
           "t-1 [000] ..... x.0: map: IOMMU: iova=0x1000 - 0x2000 paddr=0x3000 size=4096",  // no time
           "t-1 ..... 1.0: map: IOMMU: iova=0x1000 - 0x2000 paddr=0x3000 size=4096",        // no CPU
           "t-1 [000] ..... 1.0: map: IOMMU: iova=0x1000 - 0x2000 paddr=0x3000 size=4096 xyz",
           "t-1 [000] ..... 1.0: map: IOMMU: iova=0xffffffffffffffffff - 0x2000 paddr=0x3000 size=4096",
           "t-1 [000] ..... 1.0: map: iova=0x1000",
       })
    EXPECT_TRUE(std::holds_alternative<MalformedLine>(parse_ftrace_line(text))) << text;
}

TEST(TraceImport, SeparatesTheTwoDomainsOfARealRecording) {
  const auto trace = import_ftrace(data + "/ftrace/two-domains.ftrace");
  ASSERT_TRUE(trace) << trace.error().detail();
  EXPECT_EQ(trace->facts.lines, 452U);
  EXPECT_EQ(trace->facts.maps_read + trace->facts.unmaps_read, 440U);
  EXPECT_EQ(trace->facts.spaces, 2U);
  EXPECT_EQ(trace->facts.space_stride, 1ULL << 32);
  EXPECT_TRUE(check_order(*trace, "imported"));
}

TEST(TraceImport, ReadsZstdAndTrimsAnUnmapThatBeganBeforeTheRecording) {
  const auto trace = import_ftrace(data + "/ftrace/mid-life.ftrace.zst");
  ASSERT_TRUE(trace) << trace.error().detail();
  EXPECT_EQ(trace->facts.lines, 513U);
  EXPECT_GE(trace->facts.unmaps_trimmed, 1U);
  EXPECT_TRUE(check_order(*trace, "imported"));
}

TEST(TraceImport, MatchesAnUnmapWithTheScatterListThatItEnds) {
  using R = Recording;
  const auto trace = import_text(R::map(0, "1.000000", 0x1000, 0x50000, 4096) +
                                 R::map(0, "1.000001", 0x2000, 0x90000, 4096) + R::unmap(1, "1.000500", 0x1000, 8192));
  ASSERT_TRUE(trace);
  EXPECT_EQ(trace->events.size(), 3U);
  EXPECT_EQ(trace->facts.spaces, 1U);
}

TEST(TraceImport, PrefersTheScatterListOverPiecesOfAnotherDomain) {
  using R = Recording;
  // CPU 1 maps 0x1000-0x3fff in one piece for one device; CPU 0 maps 0x1000, 0x2000, 0x3000 for another one. The unmap
  // of 0x1000-0x3fff fits both; after it, only the pieces can still serve the unmap of 0x2000-0x2fff and its like.
  const auto trace =
      import_text(R::map(0, "1.000000", 0x1000, 0x50000, 4096) + R::map(1, "1.000001", 0x9000, 0x70000, 4096) +
                  R::map(1, "1.000002", 0x1000, 0x60000, 12288) + R::map(1, "1.000003", 0x2000, 0x51000, 4096) +
                  R::map(0, "1.000004", 0x3000, 0x52000, 4096) + R::unmap(0, "1.000500", 0x1000, 12288) +
                  R::unmap(0, "1.000501", 0x1000, 4096) + R::unmap(0, "1.000502", 0x2000, 4096) +
                  R::unmap(0, "1.000503", 0x3000, 4096) + R::unmap(0, "1.000504", 0x9000, 4096));
  ASSERT_TRUE(trace) << trace.error().detail();
  EXPECT_EQ(trace->facts.unmaps_dropped, 0U);
  EXPECT_EQ(trace->events.size(), 10U);
  EXPECT_EQ(trace->facts.spaces, 2U);
}

TEST(TraceImport, PutsAnUnmapThatWasRecordedTooEarlyBehindItsMap) {
  using R = Recording;
  const auto trace = import_text(R::unmap(1, "1.000003", 0x1000, 4096) + R::map(0, "1.000005", 0x1000, 0x50000, 4096) +
                                 R::map(0, "1.000100", 0x1000, 0x60000, 4096));
  ASSERT_TRUE(trace) << trace.error().detail();
  EXPECT_EQ(trace->facts.unmaps_moved_later, 1U);
  EXPECT_EQ(trace->facts.spaces, 1U);
  ASSERT_EQ(trace->events.size(), 3U);
  EXPECT_EQ(trace->events[0].kind, EventKind::map);
  EXPECT_EQ(trace->events[1].kind, EventKind::unmap);
}

TEST(TraceImport, PutsAnUnmapThatWasRecordedTooLateBeforeTheNextMap) {
  using R = Recording;
  const auto trace =
      import_text(R::map(0, "1.000000", 0x1000, 0x50000, 4096) + R::map(1, "1.000500", 0x1000, 0x60000, 4096) +
                  R::unmap(0, "1.000502", 0x1000, 4096) + R::unmap(0, "1.001000", 0x1000, 4096));
  ASSERT_TRUE(trace) << trace.error().detail();
  EXPECT_EQ(trace->facts.unmaps_moved_earlier, 1U);
  EXPECT_EQ(trace->facts.spaces, 1U);
  ASSERT_EQ(trace->events.size(), 4U);
  EXPECT_EQ(trace->events[1].kind, EventKind::unmap);
  EXPECT_EQ(trace->events[2].physical, 0x60000U);
}

TEST(TraceImport, DoesNotMoveAnUnmapOfTheSameCpu) {
  using R = Recording;
  // One CPU's clock is right: this unmap is of a mapping from before the recording.
  const auto trace = import_text(R::unmap(0, "1.000003", 0x1000, 4096) + R::map(0, "1.000005", 0x1000, 0x50000, 4096));
  ASSERT_TRUE(trace);
  EXPECT_EQ(trace->facts.unmaps_dropped, 1U);
  EXPECT_EQ(trace->events.size(), 1U);
}

TEST(TraceImport, DropsWhatMoreSpacesThanAllowedWouldNeed) {
  using R = Recording;
  std::string text;
  for (int i = 0; i < 20; ++i) text += R::map(0, "1.000000", 0x1000, 0x50000, 4096);
  ImportOptions options;
  options.repair.spaces_max = 4;
  const auto trace = import_text(text, options);
  ASSERT_TRUE(trace);
  EXPECT_EQ(trace->facts.spaces, 4U);
  EXPECT_EQ(trace->facts.maps_dropped, 16U);
  EXPECT_EQ(trace->events.size(), 4U);
}

TEST(TraceImport, RefusesWindowsBeyondTheAddressSpace) {
  const std::string line = "t-1 [000] ..... 1.0: map: IOMMU: iova=0xfffffffffffff000 - 0x0 paddr=0x3000 size=4096\n";
  const auto trace = import_text(line + line);
  ASSERT_FALSE(trace);
  EXPECT_EQ(trace.error().code, Errc::limit_reached);
}

TEST(TraceImport, NamesFileAndLineOfWhatItCannotBelieve) {
  using R = Recording;
  const std::string text = R::map(0, "1.000000", 0x1000, 0x50000, 4096) + "t-1 [000] ..... 1.0: map: IOMMU: iova=0x1\n";
  const Recording recording{text};
  const auto trace = import_ftrace(recording.path());
  ASSERT_FALSE(trace);
  EXPECT_EQ(trace.error().code, Errc::bad_format);
  EXPECT_NE(trace.error().detail().find(recording.path() + ":2: "), std::string::npos) << trace.error().detail();
  ImportOptions lenient;
  lenient.skip_malformed = true;
  const auto skipped = import_ftrace(recording.path(), lenient);
  ASSERT_TRUE(skipped);
  EXPECT_EQ(skipped->facts.malformed_lines, 1U);
}

TEST(TraceImport, SaysWhatIsWrongWithFilesThatAreNoRecordings) {
  EXPECT_NE(import_text("hello\nworld\n").error().detail().find("no iommu:map or iommu:unmap event"),
            std::string::npos);
  EXPECT_NE(import_text("").error().detail().find("in 0 lines"), std::string::npos);
  EXPECT_NE(import_text(std::string(10'000, 'x')).error().detail().find(":1: line of more than"), std::string::npos);
  EXPECT_NE(import_ftrace("/nonexistent/file").error().detail().find("no such file"), std::string::npos);
  EXPECT_NE(import_ftrace("/").error().detail().find("folder"), std::string::npos);
}

TEST(TraceImport, SaysThatACompressedRecordingIsTruncatedOrDamaged) {
  std::ifstream in{data + "/ftrace/mid-life.ftrace.zst", std::ios::binary};
  const std::string whole{std::istreambuf_iterator<char>{in}, {}};
  ASSERT_GT(whole.size(), 1000U);
  EXPECT_NE(import_text(whole.substr(0, whole.size() - 100)).error().detail().find("truncated"), std::string::npos);
  std::string damaged = whole;
  for (std::size_t i = 200; i < 400; ++i) damaged[i] = static_cast<char>(damaged[i] ^ 0x5a);
  const auto trace = import_text(damaged);
  ASSERT_FALSE(trace);
  EXPECT_EQ(trace.error().code, Errc::bad_format);
}

TEST(TraceImport, TheShippedTracesAreWhatTheRecordingsWere) {
  struct Expected {
    const char* name;
    std::uint64_t maps, unmaps, dropped;
  };
  for (const Expected& e :
       {Expected{"seq128k", 145'426, 4'561, 0}, {"rr4k", 75'014, 74'974, 0}, {"mixed", 98'135, 51'853, 254}}) {
    const auto trace = read_file(data + "/traces/" + e.name + ".iovtrace");
    ASSERT_TRUE(trace) << trace.error().detail();
    EXPECT_EQ(trace->facts.lines, 150'000U);
    EXPECT_EQ(trace->facts.maps_read, e.maps);
    EXPECT_EQ(trace->facts.unmaps_read, e.unmaps);
    EXPECT_EQ(trace->facts.maps_dropped, 0U);
    EXPECT_EQ(trace->facts.unmaps_dropped, e.dropped);
    EXPECT_EQ(trace->events.size(), e.maps + e.unmaps - e.dropped);
  }
}

}  // namespace
}  // namespace iovane::trace
