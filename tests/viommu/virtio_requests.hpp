// virtio-iommu requests as bytes, by the specification's definitions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "viommu/virtio_iommu.hpp"

namespace iovane::viommu {

class RequestBytes {
 public:
  explicit RequestBytes(virtio::RequestType type) : bytes_(4) { bytes_[0] = static_cast<std::byte>(type); }
  template <typename T>
  RequestBytes& add(T value) {
    for (std::size_t i = 0; i < sizeof value; ++i) bytes_.push_back(static_cast<std::byte>(value >> (8 * i)));
    return *this;
  }
  std::vector<std::byte> done() { return bytes_; }

 private:
  std::vector<std::byte> bytes_;
};

inline std::vector<std::byte> attach_request(std::uint32_t domain, std::uint32_t endpoint, std::uint32_t flags = 0,
                                             std::uint32_t reserved = 0) {
  return RequestBytes{virtio::RequestType::attach}.add(domain).add(endpoint).add(flags).add(reserved).done();
}
inline std::vector<std::byte> detach_request(std::uint32_t domain, std::uint32_t endpoint) {
  return RequestBytes{virtio::RequestType::detach}.add(domain).add(endpoint).add(std::uint64_t{0xffff}).done();
}
inline std::vector<std::byte> map_request(std::uint32_t domain, std::uint64_t start, std::uint64_t last,
                                          std::uint64_t gpa, std::uint32_t flags) {
  return RequestBytes{virtio::RequestType::map}.add(domain).add(start).add(last).add(gpa).add(flags).done();
}
inline std::vector<std::byte> unmap_request(std::uint32_t domain, std::uint64_t start, std::uint64_t last,
                                            std::uint32_t reserved = 0) {
  return RequestBytes{virtio::RequestType::unmap}.add(domain).add(start).add(last).add(reserved).done();
}
inline std::vector<std::byte> probe_request(std::uint32_t endpoint) {
  RequestBytes out{virtio::RequestType::probe};
  out.add(endpoint);
  for (int i = 0; i < 8; ++i) out.add(~std::uint64_t{0});  // the device ignores them
  return out.done();
}

}  // namespace iovane::viommu
