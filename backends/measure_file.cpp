// The file that a measurement is kept in. Text, one fact per line:
//   iovane-interfaces 1
//   key 8c5f01d2...              (hexadecimal)
//   device 0000:00:03.0 1234     (address, microseconds that it took)
//   pair iommufd 4096 5200 6100  (interface, bytes, map and copy in ns)
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "backends/measure.hpp"
#include "backends/open.hpp"
#include "backends/probe.hpp"
#include "base/error_text.hpp"
#include "base/unique_fd.hpp"

namespace iovane::backends {
namespace {

constexpr std::string_view magic = "iovane-interfaces 1";
constexpr std::size_t file_bytes_max = 4096;
constexpr std::size_t pairs_max = 16;

std::uint64_t hash(std::uint64_t state, std::string_view text) noexcept {  // FNV-1a
  for (const char c : text) state = (state ^ static_cast<unsigned char>(c)) * 0x100'0000'01b3ULL;
  return (state ^ 0xff) * 0x100'0000'01b3ULL;
}

bool read_pair(std::istringstream& words, Measurement& measurement) {
  std::string name;
  PairCost pair;
  if (!(words >> name >> pair.length.value >> pair.map_ns >> pair.copy_ns) || pair.map_ns == 0) return false;
  const auto interface = parse_interface(name);
  if (!interface) return false;
  if (measurement.interfaces.empty() || measurement.interfaces.back().interface != *interface)
    measurement.interfaces.push_back({.interface = *interface, .pairs = {}, .reason = {}});
  std::vector<PairCost>& pairs = measurement.interfaces.back().pairs;
  if (measurement.interfaces.size() > 2 || pairs.size() == pairs_max) return false;
  if (!pairs.empty() && pairs.back().length >= pair.length) return false;
  pairs.push_back(pair);
  return true;
}

std::string environment(const char* name) {
  const char* const value = ::secure_getenv(name);
  return value != nullptr ? value : "";
}

}  // namespace

std::uint64_t measurement_key(std::string_view boot, const HostReport& report) noexcept {
  std::uint64_t key = hash(0xcbf2'9ce4'8422'2325ULL, boot);
  key = hash(key, report.kernel);
  for (const InterfaceReport& interface : report.interfaces)
    key = hash(hash(key, to_string(interface.interface)), interface.usable ? "usable" : "not");
  for (const DeviceReport& device : report.devices) key = hash(hash(key, device.pci.address), device.pci.driver);
  return key;
}

std::string format_measurement(const Measurement& measurement, std::uint64_t key) {
  std::string text = fmt::format("{}\nkey {:x}\ndevice {} {}\n", magic, key, measurement.device, measurement.took_us);
  for (const InterfaceCost& cost : measurement.interfaces)
    for (const PairCost& pair : cost.pairs)
      text +=
          fmt::format("pair {} {} {} {}\n", to_string(cost.interface), pair.length.value, pair.map_ns, pair.copy_ns);
  return text;
}

std::optional<Measurement> parse_measurement(std::string_view text, std::uint64_t key) {
  if (text.size() > file_bytes_max) return std::nullopt;
  std::istringstream lines{std::string{text}};
  Measurement measurement;
  measurement.cached = true;
  std::string line;
  if (!std::getline(lines, line) || line != magic) return std::nullopt;
  if (!std::getline(lines, line) || line != fmt::format("key {:x}", key)) return std::nullopt;
  while (std::getline(lines, line)) {
    std::istringstream words{line};
    std::string what;
    words >> what;
    if (what == "device") {
      if (!(words >> measurement.device >> measurement.took_us)) return std::nullopt;
    } else if (what != "pair" || !read_pair(words, measurement)) {
      return std::nullopt;
    }
  }
  if (measurement.interfaces.empty()) return std::nullopt;
  return measurement;
}

std::string measurement_path(const std::string& given) {
  if (!given.empty()) return given;
  if (const std::string path = environment("IOVANE_MEASUREMENT_FILE"); !path.empty()) return path;
  if (const std::string cache = environment("XDG_CACHE_HOME"); !cache.empty()) return cache + "/iovane/interfaces";
  if (const std::string home = environment("HOME"); !home.empty()) return home + "/.cache/iovane/interfaces";
  return "/run/iovane/interfaces";
}

std::optional<Measurement> load_measurement(const std::string& path, std::uint64_t key) {
  const base::UniqueFd fd{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK)};
  struct stat info {};
  if (!fd || ::fstat(fd.get(), &info) != 0 || !S_ISREG(info.st_mode)) return std::nullopt;
  if (info.st_uid != 0 && info.st_uid != ::geteuid()) return std::nullopt;
  std::string text(file_bytes_max + 1, '\0');
  const auto got = ::read(fd.get(), text.data(), text.size());
  if (got <= 0) return std::nullopt;
  text.resize(static_cast<std::size_t>(got));
  return parse_measurement(text, key);
}

bool store_measurement(const std::string& path, const Measurement& measurement, std::uint64_t key) {
  std::error_code problem;
  std::filesystem::create_directories(std::filesystem::path{path}.parent_path(), problem);
  const std::string fresh = fmt::format("{}.{}", path, ::getpid());
  const std::string text = format_measurement(measurement, key);
  {
    const base::UniqueFd fd{::open(fresh.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0644)};
    if (!fd) return false;
    if (::write(fd.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size())) {
      ::unlink(fresh.c_str());
      return false;
    }
  }
  if (::rename(fresh.c_str(), path.c_str()) == 0) return true;
  ::unlink(fresh.c_str());
  return false;
}

std::string boot_id() {
  std::ifstream file{"/proc/sys/kernel/random/boot_id"};
  std::string id;
  std::getline(file, id);
  return id;
}

}  // namespace iovane::backends
