#include "backends/sysfs_inventory.hpp"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <sstream>

#include "base/error_text.hpp"

namespace iovane::backends {
namespace {

namespace fs = std::filesystem;

std::string read_file(const fs::path& path) {
  std::ifstream file{path};
  return {std::istreambuf_iterator<char>{file}, {}};
}

template <typename T>
std::optional<T> parse_number(std::string_view text, int base) {
  if (base == 16 && text.substr(0, 2) == "0x") text.remove_prefix(2);
  T value{};
  const auto [stop, problem] = std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (problem != std::errc{}) return std::nullopt;
  return value;
}

std::string link_name(const fs::path& link) {
  std::error_code problem;
  const fs::path target = fs::read_symlink(link, problem);
  return problem ? std::string{} : target.filename().string();
}

/// The name below vfio-dev/, which the device node under /dev/vfio/devices shares.
std::string cdev_path(const fs::path& device) {
  std::error_code problem;
  for (const auto& entry : fs::directory_iterator{device / "vfio-dev", problem})
    return "/dev/vfio/devices/" + entry.path().filename().string();
  return {};
}

PciDevice read_device(const fs::path& path, const fs::path& groups) {
  PciDevice device;
  device.address = path.filename().string();
  device.vendor = parse_number<std::uint16_t>(read_file(path / "vendor"), 16).value_or(0);
  device.device = parse_number<std::uint16_t>(read_file(path / "device"), 16).value_or(0);
  device.driver = link_name(path / "driver");
  device.numa_node = parse_number<int>(read_file(path / "numa_node"), 10).value_or(-1);
  device.cdev = cdev_path(path);
  if (const std::string group = link_name(path / "iommu_group"); !group.empty()) {
    device.group = parse_number<int>(group, 10).value_or(-1);
    device.reserved = parse_reserved_regions(read_file(groups / group / "reserved_regions"));
  }
  return device;
}

}  // namespace

std::vector<IovaRange> parse_reserved_regions(std::string_view text) {
  std::vector<IovaRange> ranges;
  std::istringstream lines{std::string{text}};
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words{line};
    std::string start_text, last_text, type;
    words >> start_text >> last_text >> type;
    const auto start = parse_number<std::uint64_t>(start_text, 16);
    const auto last = parse_number<std::uint64_t>(last_text, 16);
    if (!start || !last || *start > *last || type.empty() || type == "direct-relaxable") continue;
    ranges.push_back({Iova{*start}, Iova{*last}});
  }
  std::sort(ranges.begin(), ranges.end());
  return ranges;
}

Result<std::vector<PciDevice>> read_pci_inventory(const std::string& sysfs_root) {
  std::vector<PciDevice> devices;
  const fs::path root{sysfs_root};
  std::error_code problem;
  if (!fs::is_directory(root, problem))
    return base::fail(Errc::not_found, Stage::query, 0, "{} is not mounted; mount sysfs to see devices", sysfs_root);
  for (fs::directory_iterator at{root / "bus/pci/devices", problem}, stop; !problem && at != stop;
       at.increment(problem))
    devices.push_back(read_device(at->path(), root / "kernel/iommu_groups"));
  std::sort(devices.begin(), devices.end(),
            [](const PciDevice& a, const PciDevice& b) { return a.address < b.address; });
  return devices;
}

std::vector<IovaRange> reserved_of(Kernel& kernel, const std::string& pci_address) {
  if (pci_address.empty()) return {};
  const auto devices = kernel.pci_devices();
  if (!devices) return {};
  const auto found = std::find_if(devices->begin(), devices->end(),
                                  [&](const PciDevice& device) { return device.address == pci_address; });
  return found == devices->end() ? std::vector<IovaRange>{} : found->reserved;
}

}  // namespace iovane::backends
