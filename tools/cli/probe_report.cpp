#include "cli/probe_report.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <bit>
#include <vector>

#include "cli/table.hpp"
#include "cli/units.hpp"

namespace iovane::cli {
namespace {

using backends::Capability;
using backends::HostReport;
using Json = nlohmann::ordered_json;

/// "4 KiB, 2 MiB, 1 GiB" of a bit set of sizes.
std::string sizes_of(std::uint64_t page_sizes) {
  std::vector<std::string> sizes;
  for (std::uint64_t rest = page_sizes; rest != 0; rest &= rest - 1)
    sizes.push_back(format_bytes(Bytes{std::uint64_t{1} << std::countr_zero(rest)}));
  return fmt::format("{}", fmt::join(sizes, ", "));
}

std::vector<std::string> names_of(Capability set) {
  std::vector<std::string> names;
  for (std::uint32_t rest = static_cast<std::uint32_t>(set); rest != 0; rest &= rest - 1)
    names.emplace_back(backends::to_string(static_cast<Capability>(1U << std::countr_zero(rest))));
  return names;
}

/// The last sentence of a reason may want a cure behind it.
std::string with_cure(const std::string& reason, const std::string& cure) {
  return cure.empty() ? reason : fmt::format("{}; {}", reason, cure);
}

std::string interfaces_text(const HostReport& host) {
  Table table{{{"interface"}, {"usable"}, {"version"}, {"what it is, or what it lacks"}}};
  for (const auto& i : host.interfaces)
    table.add({std::string{backends::to_string(i.interface)}, i.usable ? "yes" : "no", i.version,
               i.usable ? fmt::format("{} ({})", i.path, fmt::join(i.extensions, ", ")) : with_cure(i.reason, i.cure)});
  return table.text();
}

std::string devices_text(const HostReport& host) {
  if (host.devices.empty()) return "no PCI device is behind an IOMMU or bound to a VFIO driver\n";
  std::string text;
  for (const auto& d : host.devices) {
    text += fmt::format("{}  {:04x}:{:04x}  group {}  driver {}  {}\n", d.pci.address, d.pci.vendor, d.pci.device,
                        d.pci.group < 0 ? std::string{"none"} : fmt::format("{}", d.pci.group),
                        d.pci.driver.empty() ? "none" : d.pci.driver,
                        d.attachable ? "can be attached" : with_cure(d.reason, d.cure));
    std::string facts;
    if (d.page_sizes != 0) facts += fmt::format("  page sizes {}", sizes_of(d.page_sizes));
    if (d.entries_max != 0) facts += fmt::format("  at most {} mappings", format_count(d.entries_max));
    if (!d.iommu.empty()) facts += fmt::format("  {}", d.iommu);
    if (d.dirty_tracking) facts += "  dirty tracking";
    if (!facts.empty()) text += fmt::format("             {}\n", facts);
    for (const IovaRange& range : d.usable)
      text += fmt::format("               usable {:#x} to {:#x}\n", range.start.value, range.last.value);
  }
  return text;
}

std::string memlock_text(const backends::MemlockUse& use) {
  return fmt::format("memlock: limit {}, {} locked and {} pinned by this process{}\n",
                     use.limit ? format_bytes(*use.limit) : "none", format_bytes(use.locked), format_bytes(use.pinned),
                     use.exempt ? "; CAP_IPC_LOCK waives the limit" : "");
}

std::string parity_text(const HostReport& host) {
  if (host.parity.empty()) return {};
  Table table{{{"feature"}, {"iommufd"}, {"type1"}, {"compat"}, {"spapr"}, {"stage1"}}};
  const auto mark = [](bool has) { return has ? "yes" : "-"; };
  for (const auto& line : host.parity)
    table.add({std::string{backends::to_string(line.capability)}, mark(line.iommufd), mark(line.type1),
               mark(line.compat), mark(line.spapr), mark(line.stage1)});
  return table.text() + '\n';
}

std::string measurement_text(const HostReport& host) {
  if (!host.measurement) return fmt::format("not measured: {}\n\n", host.not_measured);
  const backends::Measurement& m = *host.measurement;
  Table table{{{"interface"}, {"bytes"}, {"map + unmap, us"}, {"copy + unmap, us"}}};
  const auto us = [](std::uint64_t ns) {
    return ns == 0 ? std::string{"-"} : fmt::format("{:.2f}", static_cast<double>(ns) / 1000);
  };
  for (const auto& cost : m.interfaces)
    for (const auto& pair : cost.pairs)
      table.add({std::string{backends::to_string(cost.interface)}, format_bytes(pair.length), us(pair.map_ns),
                 us(pair.copy_ns)});
  std::string text =
      fmt::format("measured with {} in {:.1f} ms{}:\n{}", m.device, static_cast<double>(m.took_us) / 1000,
                  m.cached ? ", earlier in this boot" : "", table.text());
  if (m.copy_from().value != 0)
    text +=
        fmt::format("registered memory is mapped afresh below {} bytes, copied from there on\n", m.copy_from().value);
  return text + '\n';
}

Json measurement_json(const HostReport& host) {
  if (!host.measurement) return {{"why_not", host.not_measured}};
  Json pairs = Json::array();
  for (const auto& cost : host.measurement->interfaces)
    for (const auto& pair : cost.pairs)
      pairs.push_back({{"interface", backends::to_string(cost.interface)},
                       {"bytes", pair.length.value},
                       {"map_ns", pair.map_ns},
                       {"copy_ns", pair.copy_ns}});
  return {{"device", host.measurement->device},
          {"took_us", host.measurement->took_us},
          {"cached", host.measurement->cached},
          {"copy_from", host.measurement->copy_from().value},
          {"pairs", std::move(pairs)}};
}

Json ranges_json(const std::vector<IovaRange>& ranges) {
  Json list = Json::array();
  for (const IovaRange& range : ranges) list.push_back({{"start", range.start.value}, {"last", range.last.value}});
  return list;
}

Json interface_json(const backends::InterfaceReport& i) {
  return {{"interface", backends::to_string(i.interface)},
          {"present", i.present},
          {"usable", i.usable},
          {"path", i.path},
          {"reason", i.reason},
          {"cure", i.cure},
          {"version", i.version},
          {"extensions", i.extensions},
          {"capabilities", names_of(i.capabilities)}};
}

Json device_json(const backends::DeviceReport& d) {
  return {{"address", d.pci.address},
          {"vendor", d.pci.vendor},
          {"device", d.pci.device},
          {"driver", d.pci.driver},
          {"group", d.pci.group},
          {"cdev", d.pci.cdev},
          {"numa_node", d.pci.numa_node},
          {"attachable", d.attachable},
          {"reason", d.reason},
          {"cure", d.cure},
          {"attached_through", d.attached_through ? Json(backends::to_string(*d.attached_through)) : Json()},
          {"reserved", ranges_json(d.pci.reserved)},
          {"usable", ranges_json(d.usable)},
          {"page_sizes", d.page_sizes},
          {"entries_max", d.entries_max},
          {"iommu", d.iommu},
          {"dirty_tracking", d.dirty_tracking}};
}

}  // namespace

std::string probe_text(const HostReport& host) {
  std::string text = fmt::format("kernel: {}\n\n{}\n{}\n{}\n{}", host.kernel, interfaces_text(host), devices_text(host),
                                 memlock_text(host.memlock), parity_text(host));
  text += measurement_text(host);
  text += fmt::format("auto picks: {}\n       why: {}\n",
                      host.choice ? backends::to_string(*host.choice) : "model, the software IOMMU", host.why);
  return text;
}

Json probe_json(const HostReport& host) {
  Json interfaces = Json::array();
  for (const auto& i : host.interfaces) interfaces.push_back(interface_json(i));
  Json devices = Json::array();
  for (const auto& d : host.devices) devices.push_back(device_json(d));
  Json groups = Json::array();
  for (const auto& g : host.groups)
    groups.push_back({{"number", g.number}, {"viable", g.viable}, {"devices", g.devices}});
  Json parity = Json::array();
  for (const auto& line : host.parity)
    parity.push_back({{"feature", backends::to_string(line.capability)},
                      {"iommufd", line.iommufd},
                      {"type1", line.type1},
                      {"compat", line.compat},
                      {"spapr", line.spapr},
                      {"stage1", line.stage1}});
  return {{"format", 1},
          {"kernel", host.kernel},
          {"choice", host.choice ? backends::to_string(*host.choice) : "model"},
          {"why", host.why},
          {"interfaces", std::move(interfaces)},
          {"groups", std::move(groups)},
          {"devices", std::move(devices)},
          {"memlock",
           {{"limit", host.memlock.limit ? Json(host.memlock.limit->value) : Json()},
            {"locked", host.memlock.locked.value},
            {"pinned", host.memlock.pinned.value},
            {"exempt", host.memlock.exempt}}},
          {"parity", std::move(parity)},
          {"measurement", measurement_json(host)}};
}

}  // namespace iovane::cli
