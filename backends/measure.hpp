// A short measurement of this host: what a map and its unmap cost on each interface, with a real device attached.
//
// It is made once per boot, kernel and set of devices, and kept in a small file (MeasurementFile). Only devices that
// the report calls attachable are tried, one interface after the other; the kernel refuses a second user of a device,
// so one in use is never disturbed. An idle one is opened, which resets it, as any later attach will.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "backends/backend.hpp"
#include "backends/kernel.hpp"

namespace iovane::backends {

struct HostReport;

/// The fastest map and unmap of `length` bytes that was seen.
struct PairCost {
  Bytes length{};
  std::uint64_t map_ns = 0;
  std::uint64_t copy_ns = 0;  ///< through registered memory; 0: the interface has no copy
  constexpr bool operator==(const PairCost&) const noexcept = default;
};

struct InterfaceCost {
  Interface interface = Interface::iommufd;
  std::vector<PairCost> pairs{};  ///< by length; empty: not measured
  std::string reason{};           ///< why not
  /// What a map and its unmap cost in the cheaper way, in ns: the geometric mean over the lengths, each as often as
  /// guests map it. Geometric, so that by how much a length is cheaper counts: large ones are measured with everything
  /// at hand, and in ns they would outweigh the nine in ten that are small.
  double mean_ns() const noexcept;
};

struct Measurement {
  std::vector<InterfaceCost> interfaces{};
  std::string device{};  ///< which one was attached
  bool cached = false;
  std::uint64_t took_us = 0;  ///< attaching included

  const InterfaceCost* of(Interface interface) const noexcept;
  /// The shortest map of registered memory that is cheaper as a copy; 0: all of them. Longer ones are copied too.
  Bytes copy_from() const noexcept;
};

struct MeasureOptions {
  /// For all pairs together; attaching comes on top and takes what the device's reset takes. At least one pair of each
  /// kind is made.
  std::chrono::nanoseconds budget = std::chrono::milliseconds{40};
};

/// Measures the interfaces among iommufd and type1 that the report calls usable. Nothing where no device could be
/// attached; `why` then says so. Blocks. Throws only std::bad_alloc.
std::optional<Measurement> measure_interfaces(Kernel& kernel, const HostReport& report, const MeasureOptions& options,
                                              std::string& why);

/// Lets a measurement overrule the static order of the report where it is clear (a tenth cheaper), and says so in
/// report.why.
void choose_by(const Measurement& measurement, HostReport& report);

/// What must not have changed since a measurement: boot, kernel, devices and their drivers.
std::uint64_t measurement_key(std::string_view boot, const HostReport& report) noexcept;

/// The text of the file: a line each, see measure_file.cpp. Reading says nothing on anything unexpected.
std::string format_measurement(const Measurement& measurement, std::uint64_t key);
std::optional<Measurement> parse_measurement(std::string_view text, std::uint64_t key);

/// Where measurements are kept: `given`, or IOVANE_MEASUREMENT_FILE, or $XDG_CACHE_HOME/iovane/interfaces, or
/// $HOME/.cache/iovane/interfaces, or /run/iovane/interfaces. The environment does not count in set-user-ID programs.
std::string measurement_path(const std::string& given);
/// Nothing unless the file is this user's or root's own, short, and written for `key`.
std::optional<Measurement> load_measurement(const std::string& path, std::uint64_t key);
/// Replaces the file as a whole; a failure is no error, the next start measures again.
bool store_measurement(const std::string& path, const Measurement& measurement, std::uint64_t key);
/// The kernel's random name for this boot; empty where /proc does not tell.
std::string boot_id();

}  // namespace iovane::backends
