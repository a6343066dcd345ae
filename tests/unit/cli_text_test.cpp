#include <gtest/gtest.h>

#include "cli/exit_status.hpp"
#include "cli/probe_report.hpp"
#include "cli/progress.hpp"
#include "cli/table.hpp"
#include "cli/units.hpp"

namespace iovane::cli {
namespace {

using namespace std::chrono_literals;

TEST(Units, CountsHaveSeparators) {
  EXPECT_EQ(format_count(0), "0");
  EXPECT_EQ(format_count(999), "999");
  EXPECT_EQ(format_count(150'000), "150,000");
  EXPECT_EQ(format_count(1'234'567), "1,234,567");
}

TEST(Units, ScaleAtTheBorderAndDropZeros) {
  EXPECT_EQ(format_bytes(Bytes{0}), "0 B");
  EXPECT_EQ(format_bytes(Bytes{4096}), "4 KiB");
  EXPECT_EQ(format_bytes(Bytes{(1U << 20) + (1U << 19)}), "1.5 MiB");
  EXPECT_EQ(format_bytes(Bytes{~std::uint64_t{0}}), "16 EiB");
  EXPECT_EQ(format_duration(999), "999 ns");
  EXPECT_EQ(format_duration(1000), "1 us");
  EXPECT_EQ(format_duration(999'600), "1 ms") << "never 1000 us";
  EXPECT_EQ(format_duration(12'345), "12.3 us");
  EXPECT_EQ(format_duration(4'560'000), "4.56 ms");
  EXPECT_EQ(format_rate(1'250, 1'000'000), "1.25 M/s");
  EXPECT_EQ(format_rate(1, 0), "-");
  EXPECT_EQ(format_ratio(14, 25), "0.56");
  EXPECT_EQ(format_ratio(14, 0), "-");
}

TEST(Table, AlignsByWidestCellAndCountsCodePoints) {
  Table table{{{"name"}, {"n", Table::Align::right}}};
  table.add({"µs", "1"});
  table.add({"longer", "1234"});
  table.add({"short"});
  EXPECT_EQ(table.text(),
            "name       n\n"
            "------------\n"
            "µs         1\n"
            "longer  1234\n"
            "short\n");
}

TEST(Table, FoldsTheLastColumnBetweenWords) {
  Table table{{{"name"}, {"reason"}}};
  table.add({"a", "one two three four five six seven"});
  table.add({"b", "short"});
  EXPECT_EQ(table.text(26),
            "name  reason\n"
            "--------------------------\n"
            "a     one two three four\n"
            "      five six seven\n"
            "b     short\n");
  EXPECT_NE(table.text(1000).find("one two three four five six seven"), std::string::npos);
}

TEST(Progress, LineShowsShareAndTimeLeft) {
  EXPECT_EQ(progress_line("x", 50, 100, 500ms), "x  [############............]  50%");
  EXPECT_EQ(progress_line("x", 50, 100, 65s), "x  [############............]  50%  1:05 left");
  EXPECT_EQ(progress_line("x", 200, 100, 2s), "x  [########################] 100%");
  EXPECT_EQ(progress_line("x", 0, 0, 2s), "x  [........................]   0%");
  EXPECT_LT(progress_line(std::string(200, 'y'), 1, 2, 0ms).size(), 80U);
}

TEST(ExitStatus, TellsTheHostsFaultFromTheFiles) {
  EXPECT_EQ(exit_status_of(Errc::ok), ExitStatus::ok);
  EXPECT_EQ(exit_status_of(Errc::bad_format), ExitStatus::bad_input);
  EXPECT_EQ(exit_status_of(Errc::no_device), ExitStatus::unavailable);
  EXPECT_EQ(exit_status_of(Errc::memlock_exceeded), ExitStatus::unavailable);
  EXPECT_EQ(exit_status_of(Errc::io_error), ExitStatus::failed);
}

TEST(ProbeReport, SaysWhyAndHowToCureInBothForms) {
  backends::HostReport host;
  host.kernel = "Linux 0.0";
  host.why = "nothing else is there";
  backends::InterfaceReport interface;
  interface.path = "/dev/iommu";
  interface.reason = "it does not exist";
  interface.cure = "load the module";
  host.interfaces.push_back(interface);
  backends::DeviceReport device;
  device.pci.address = "0000:00:03.0";
  device.attachable = true;
  device.page_sizes = (1ULL << 12) | (1ULL << 21) | (1ULL << 30);
  device.usable = {{Iova{0}, Iova{0xfedfffff}}};
  host.devices.push_back(device);
  host.parity.push_back({backends::Capability::copy_reuses_pin, true, false, false});
  const std::string text = probe_text(host);
  for (const char* part : {"it does not exist; load the module", "0000:00:03.0", "4 KiB, 2 MiB, 1 GiB",
                           "usable 0x0 to 0xfedfffff", "auto picks: model", "nothing else is there"})
    EXPECT_NE(text.find(part), std::string::npos) << part << "\n" << text;
  const auto json = probe_json(host);
  EXPECT_EQ(json["choice"], "model");
  EXPECT_EQ(json["interfaces"][0]["cure"], "load the module");
  EXPECT_EQ(json["devices"][0]["usable"][0]["last"], 0xfedfffffU);
  EXPECT_TRUE(json["memlock"]["limit"].is_null());
}

}  // namespace
}  // namespace iovane::cli
