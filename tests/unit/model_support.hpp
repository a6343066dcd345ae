// What the tests of the software host share: aligned memory, and its ioctls as plain calls that return 0 or -errno.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <vector>

#include "backends/model/model_kernel.hpp"
#include "backends/uapi/iommufd.hpp"
#include "backends/uapi/vfio.hpp"

namespace iovane::backends::model {

/// Zeroed process memory, aligned to `alignment`.
class TestMemory {
 public:
  explicit TestMemory(std::size_t bytes, std::size_t alignment = 4096)
      : bytes_{bytes}, alignment_{alignment}, data_{static_cast<std::byte*>(::operator new(bytes, alignment_))} {
    std::fill_n(data_, bytes, std::byte{0});
  }
  ~TestMemory() { ::operator delete(data_, alignment_); }
  TestMemory(const TestMemory&) = delete;
  TestMemory& operator=(const TestMemory&) = delete;
  std::byte* data() const { return data_; }
  std::uint64_t address() const { return std::bit_cast<std::uint64_t>(data_); }
  std::size_t size() const { return bytes_; }

 private:
  std::size_t bytes_;
  std::align_val_t alignment_;
  std::byte* data_;
};

inline std::unique_ptr<ModelKernel> make_host(const ModelOptions& options = {}) {
  auto made = ModelKernel::create(options);
  return made ? *std::move(made) : nullptr;
}

inline std::vector<std::byte> pattern(std::size_t bytes, unsigned seed) {
  std::vector<std::byte> data(bytes);
  for (std::size_t i = 0; i < bytes; ++i) data[i] = static_cast<std::byte>(seed * 37 + i * 11 + i / 251);
  return data;
}

namespace fd_api = uapi::iommufd;
namespace vfio_api = uapi::vfio;

/// One open /dev/iommu.
class IommufdUser {
 public:
  explicit IommufdUser(ModelKernel& k) : kernel{k}, fd{k.open("/dev/iommu", 0)} {}
  ~IommufdUser() { close(); }
  IommufdUser(const IommufdUser&) = delete;
  IommufdUser& operator=(const IommufdUser&) = delete;
  void close() {
    if (fd >= 0) kernel.close(fd);
    fd = -1;
  }
  template <typename Command>
  long call(Command& command) {
    return kernel.ioctl(fd, Command::request, &command);
  }
  std::uint32_t ioas() {
    fd_api::IoasAlloc c;
    return call(c) == 0 ? c.out_ioas_id : 0;
  }
  long map(std::uint32_t ioas, std::uint64_t iova, std::uint64_t address, std::uint64_t length,
           std::uint32_t flags = fd_api::ioas_map_fixed_iova | fd_api::ioas_map_readable | fd_api::ioas_map_writeable) {
    fd_api::IoasMap c{.flags = flags, .ioas_id = ioas, .user_va = address, .length = length, .iova = iova};
    const long rc = call(c);
    last_iova = c.iova;
    return rc;
  }
  long unmap(std::uint32_t ioas, std::uint64_t iova, std::uint64_t length) {
    fd_api::IoasUnmap c{.ioas_id = ioas, .iova = iova, .length = length};
    const long rc = call(c);
    unmapped = c.length;
    return rc;
  }
  long copy(std::uint32_t to, std::uint64_t to_iova, std::uint32_t from, std::uint64_t from_iova, std::uint64_t length,
            std::uint32_t flags = fd_api::ioas_map_fixed_iova | fd_api::ioas_map_readable |
                                  fd_api::ioas_map_writeable) {
    fd_api::IoasCopy c{.flags = flags,
                       .dst_ioas_id = to,
                       .src_ioas_id = from,
                       .length = length,
                       .dst_iova = to_iova,
                       .src_iova = from_iova};
    const long rc = call(c);
    last_iova = c.dst_iova;
    return rc;
  }
  long destroy(std::uint32_t id) {
    fd_api::Destroy c{.id = id};
    return call(c);
  }
  std::vector<IovaRange> ranges(std::uint32_t ioas) {
    std::vector<fd_api::IovaRange> list(16);
    fd_api::IoasIovaRanges c{
        .ioas_id = ioas, .num_iovas = 16, .allowed_iovas = std::bit_cast<std::uint64_t>(list.data())};
    if (call(c) != 0) return {};
    alignment = c.out_iova_alignment;
    std::vector<IovaRange> result;
    for (std::size_t i = 0; i < c.num_iovas; ++i) result.push_back({Iova{list[i].start}, Iova{list[i].last}});
    return result;
  }
  long allow(std::uint32_t ioas, std::vector<fd_api::IovaRange> list) {
    fd_api::IoasAllowIovas c{.ioas_id = ioas,
                             .num_iovas = static_cast<std::uint32_t>(list.size()),
                             .allowed_iovas = std::bit_cast<std::uint64_t>(list.data())};
    return call(c);
  }

  ModelKernel& kernel;
  int fd;
  std::uint64_t last_iova = 0;
  std::uint64_t unmapped = 0;
  std::uint64_t alignment = 0;
};

/// An open device cdev.
class CdevUser {
 public:
  CdevUser(ModelKernel& k, std::size_t index)
      : kernel{k}, fd{k.open(("/dev/vfio/devices/vfio" + std::to_string(index)).c_str(), 0)} {}
  ~CdevUser() { close(); }
  CdevUser(const CdevUser&) = delete;
  CdevUser& operator=(const CdevUser&) = delete;
  void close() {
    if (fd >= 0) kernel.close(fd);
    fd = -1;
  }
  long bind(int iommufd) {
    vfio_api::DeviceBindIommufd c{.iommufd = iommufd};
    const long rc = kernel.ioctl(fd, c.request, &c);
    if (rc == 0) id = c.out_devid;
    return rc;
  }
  long attach(std::uint32_t pt_id) {
    vfio_api::DeviceAttachIommufdPt c{.pt_id = pt_id};
    const long rc = kernel.ioctl(fd, c.request, &c);
    if (rc == 0) hwpt = c.pt_id;
    return rc;
  }
  long detach() {
    vfio_api::DeviceDetachIommufdPt c;
    return kernel.ioctl(fd, c.request, &c);
  }
  ModelKernel& kernel;
  int fd;
  std::uint32_t id = 0;
  std::uint32_t hwpt = 0;
};

/// A container with one group, set up for a type1 version (or not yet, with 0).
class Type1User {
 public:
  Type1User(ModelKernel& k, unsigned long type, int group = 0, const char* path = "/dev/vfio/vfio")
      : kernel{k}, fd{k.open(path, 0)}, group_fd{k.open(("/dev/vfio/" + std::to_string(group)).c_str(), 0)} {
    set_container_rc = kernel.ioctl(group_fd, vfio_api::group_set_container, &fd);
    if (type != 0) set_iommu_rc = kernel.ioctl_value(fd, vfio_api::set_iommu, type);
  }
  ~Type1User() {
    kernel.close(group_fd);
    kernel.close(fd);
  }
  Type1User(const Type1User&) = delete;
  Type1User& operator=(const Type1User&) = delete;
  long map(std::uint64_t iova, std::uint64_t address, std::uint64_t size,
           std::uint32_t flags = vfio_api::dma_map_flag_read | vfio_api::dma_map_flag_write) {
    vfio_api::Type1DmaMap c{.flags = flags, .vaddr = address, .iova = iova, .size = size};
    return kernel.ioctl(fd, c.request, &c);
  }
  long unmap(std::uint64_t iova, std::uint64_t size, std::uint32_t flags = 0) {
    vfio_api::Type1DmaUnmap c{.flags = flags, .iova = iova, .size = size};
    const long rc = kernel.ioctl(fd, c.request, &c);
    unmapped = c.size;
    return rc;
  }
  int device(const char* address) {
    return static_cast<int>(
        kernel.ioctl(group_fd, vfio_api::group_get_device_fd, const_cast<char*>(address)));  // NOLINT
  }
  ModelKernel& kernel;
  int fd;
  int group_fd;
  long set_container_rc = 0;
  long set_iommu_rc = 0;
  std::uint64_t unmapped = 0;
};

}  // namespace iovane::backends::model
