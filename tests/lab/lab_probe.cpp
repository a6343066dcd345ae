// Proves the lab end to end, from inside: the kernel interfaces are there and a device answers through them.
//
// For the first device of IOVANE_LAB_DEVICES: open its group, attach it to a legacy container, read edu's
// identification word from BAR0. Where the kernel offers a device node (cdev), an IOAS must also come out of
// /dev/iommu. Prints one line per finding; exit status 0 means that all held.
//
// With an argument it misbehaves, so that the lab's verdicts can be checked:
//   exit N    abort    hang    crash (the kernel's, by sysrq)    flood (1 MiB on each output)    leave (files in the
//   working directory)

#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>

#include <fcntl.h>
#include <linux/vfio.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace {

constexpr std::uint32_t edu_id = 0x010000ed;  // major 1, minor 0, "ed"

// This machine's own headers may be older than iommufd: <linux/iommufd.h>, IOMMU_IOAS_ALLOC.
struct IoasAlloc {
  std::uint32_t size = sizeof(IoasAlloc), flags = 0, out_ioas_id = 0;
};
static_assert(sizeof(IoasAlloc) == 12);
constexpr unsigned long ioas_alloc = _IO(';', 0x81);

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "FAIL %s (%s)\n", what.c_str(), std::strerror(errno));
  std::exit(1);
}

int open_or_fail(const std::string& path) {
  int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) fail("open " + path);
  return fd;
}

// The first item of a list that the lab's init left in the environment.
std::string first_of(const char* variable) {
  const char* list = std::getenv(variable);
  if (!list || !*list) {
    errno = 0;
    fail(std::string(variable) + " is empty: is this running in the lab?");
  }
  return std::string(list, std::strcspn(list, ","));
}

void check_iommufd(const std::string& cdev) {
  if (cdev == "-") {
    std::puts("iommufd: not in this kernel");
    return;
  }
  if (access(cdev.c_str(), R_OK | W_OK) != 0) fail("access " + cdev);
  IoasAlloc ioas;
  int iommufd = open_or_fail("/dev/iommu");
  if (ioctl(iommufd, ioas_alloc, &ioas) != 0) fail("IOMMU_IOAS_ALLOC");
  close(iommufd);
  std::printf("iommufd: an IOAS allocated, device node %s\n", cdev.c_str());
}

int attached_container(int group) {
  int container = open_or_fail("/dev/vfio/vfio");
  int version = ioctl(container, VFIO_GET_API_VERSION);
  if (version != VFIO_API_VERSION) fail("VFIO_GET_API_VERSION says " + std::to_string(version));
  vfio_group_status status{};
  status.argsz = sizeof status;
  if (ioctl(group, VFIO_GROUP_GET_STATUS, &status) != 0) fail("VFIO_GROUP_GET_STATUS");
  if (!(status.flags & VFIO_GROUP_FLAGS_VIABLE)) fail("the group is not viable");
  if (ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) != 0) fail("VFIO_GROUP_SET_CONTAINER");
  for (unsigned long type : {VFIO_TYPE1v2_IOMMU, VFIO_SPAPR_TCE_v2_IOMMU}) {
    if (ioctl(container, VFIO_CHECK_EXTENSION, type) <= 0) continue;
    if (ioctl(container, VFIO_SET_IOMMU, type) != 0) fail("VFIO_SET_IOMMU");
    std::printf("vfio: API version %d, IOMMU type %lu\n", version, type);
    return container;
  }
  fail("no IOMMU type that we know");
}

void check_edu(int group, const std::string& bdf) {
  int device = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, bdf.c_str());
  if (device < 0) fail("VFIO_GROUP_GET_DEVICE_FD " + bdf);
  vfio_region_info config{}, bar{};
  config.argsz = bar.argsz = sizeof bar;
  config.index = VFIO_PCI_CONFIG_REGION_INDEX;
  bar.index = VFIO_PCI_BAR0_REGION_INDEX;
  if (ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &config) != 0) fail("region info of config space");
  if (ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &bar) != 0) fail("region info of BAR0");
  const std::uint8_t command[2] = {0x06, 0x00};  // memory space, bus master
  if (pwrite(device, command, sizeof command, static_cast<off_t>(config.offset + 4)) != 2)
    fail("write the command register");
  std::uint32_t id = 0;
  if (pread(device, &id, sizeof id, static_cast<off_t>(bar.offset)) != 4) fail("read BAR0");
  if (id != edu_id && __builtin_bswap32(id) != edu_id) {
    std::printf("id %08x\n", id);
    fail("BAR0 does not start with edu's identification");
  }
  std::printf("edu %s: id %08x\n", bdf.c_str(), id);
  close(device);
}

int check_everything() {
  const std::string bdf = first_of("IOVANE_LAB_DEVICES");
  check_iommufd(first_of("IOVANE_LAB_CDEVS"));
  int group = open_or_fail(first_of("IOVANE_LAB_GROUPS"));
  int container = attached_container(group);
  check_edu(group, bdf);
  close(group);
  close(container);
  std::puts("lab_probe: all held");
  return 0;
}

int misbehave(std::string_view how, const char* detail) {
  if (how == "exit") return std::atoi(detail);
  if (how == "abort") std::abort();
  if (how == "hang")
    for (;;) pause();
  if (how == "crash") {
    int trigger = open_or_fail("/proc/sysrq-trigger");
    return write(trigger, "c", 1) == 1 ? 0 : 1;
  }
  if (how == "flood") {
    for (int line = 0; line < 16 * 1024; line++) {
      std::fprintf(stdout, "out %058d\n", line);
      std::fprintf(stderr, "err %058d\n", line);
    }
    return 0;
  }
  if (how == "leave") {
    mkdir("folder", 0755);
    for (const char* name : {"empty", "folder/large"}) {
      std::FILE* file = std::fopen(name, "w");
      if (!file) fail(name);
      for (int i = 0; name[0] == 'f' && i < 3'000'001; i++) std::fputc('a' + i % 26, file);
      std::fclose(file);
    }
    return 0;
  }
  std::fprintf(stderr, "lab_probe: no way to misbehave called %s\n", how.data());
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  return argc > 1 ? misbehave(argv[1], argc > 2 ? argv[2] : "0") : check_everything();
}
