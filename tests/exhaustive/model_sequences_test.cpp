// All short sequences of maps and unmaps on a space of three pages, on every interface that the software host imitates,
// against a reference that is a std::map and the interface's rules in a few lines each.
//
// After every call: the errno and the bytes are the reference's, and the device reaches exactly the pages that the
// reference has, at the memory that it has. That includes what the kernels leave half done.
#include <gtest/gtest.h>

#include <cerrno>
#include <map>
#include <string>

#include "unit/model_support.hpp"

namespace iovane::backends::model {
namespace {

constexpr std::uint64_t k4 = 4096;
constexpr std::uint64_t base_iova = 0x100000;
constexpr unsigned pages = 3;
constexpr unsigned steps = 4;

enum class Dialect { iommufd, type1_v2, type1_v1, compat_v2, compat_v1 };

struct Call {
  enum Kind { map, unmap, unmap_all } kind;
  unsigned first = 0;
  unsigned last = 0;
};

std::vector<Call> all_calls() {
  std::vector<Call> calls;
  for (const auto kind : {Call::map, Call::unmap}) {
    for (unsigned first = 0; first < pages; ++first) {
      for (unsigned last = first; last < pages; ++last) calls.push_back({kind, first, last});
    }
  }
  calls.push_back({Call::unmap_all, 0, 0});
  return calls;
}

struct Verdict {
  long rc = 0;
  std::uint64_t bytes = 0;  // of an unmap that succeeded
  bool operator==(const Verdict&) const = default;
};

// Areas by their first page: last page, and the memory page of the first.
class Reference {
 public:
  explicit Reference(Dialect d) : dialect_{d} {}

  Verdict apply(const Call& call, unsigned memory_page) {
    if (call.kind == Call::map) {
      for (const auto& [first, area] : areas_) {
        if (first <= call.last && call.first <= area.last) return {-EEXIST, 0};
      }
      areas_[call.first] = {call.last, memory_page};
      return {};
    }
    const unsigned first = call.kind == Call::unmap_all ? 0 : call.first;
    const unsigned last = call.kind == Call::unmap_all ? pages - 1 : call.last;
    if (dialect_ == Dialect::compat_v1) {
      cut(first);
      cut(last + 1);
    }
    if (dialect_ == Dialect::type1_v2) {
      for (const auto& [start, area] : areas_) {
        const bool touches = start <= last && first <= area.last;
        if (touches && (start < first || area.last > last)) return {-EINVAL, 0};
      }
    }
    std::uint64_t gone = 0;
    for (auto it = areas_.begin(); it != areas_.end();) {
      const auto& [start, area] = *it;
      if (start > last || area.last < first) {
        ++it;
        continue;
      }
      if (dialect_ == Dialect::type1_v1) {
        if (start < first) break;
      } else if (start < first || area.last > last) {
        return {-ENOENT, 0};  // what came before is gone
      }
      gone += (area.last - start + 1) * k4;
      it = areas_.erase(it);
    }
    if (gone == 0 && dialect_ == Dialect::iommufd && call.kind != Call::unmap_all) return {-ENOENT, 0};
    return {0, gone};
  }
  // The memory page that `page` leads to, or -1.
  int leads_to(unsigned page) const {
    for (const auto& [first, area] : areas_) {
      if (first <= page && page <= area.last) return static_cast<int>(area.memory + (page - first));
    }
    return -1;
  }
  std::size_t size() const { return areas_.size(); }

 private:
  struct Area {
    unsigned last;
    unsigned memory;
  };
  void cut(unsigned at) {
    for (auto& [first, area] : areas_) {
      if (first < at && at <= area.last) {
        areas_[at] = {area.last, area.memory + (at - first)};
        area.last = at - 1;
        return;
      }
    }
  }
  Dialect dialect_;
  std::map<unsigned, Area> areas_;
};

class Sequences : public ::testing::TestWithParam<Dialect> {
 protected:
  Sequences() : host{make_host({.memory_check = MemoryCheck::none})}, memory{(pages + steps) * k4} {
    for (unsigned p = 0; p < pages + steps; ++p) memory.data()[p * k4] = static_cast<std::byte>(p + 1);
    const Dialect d = GetParam();
    if (d == Dialect::iommufd) {
      iommufd = std::make_unique<IommufdUser>(*host);
      cdev = std::make_unique<CdevUser>(*host, 0);
      ioas = iommufd->ioas();
      EXPECT_EQ(cdev->bind(iommufd->fd), 0);
      EXPECT_EQ(cdev->attach(ioas), 0);
    } else {
      const bool compat = d == Dialect::compat_v1 || d == Dialect::compat_v2;
      const bool v1 = d == Dialect::compat_v1 || d == Dialect::type1_v1;
      container = std::make_unique<Type1User>(*host, v1 ? vfio_api::type1_iommu : vfio_api::type1_v2_iommu, 0,
                                              compat ? "/dev/iommu" : "/dev/vfio/vfio");
      device_fd = container->device("0000:00:03.0");
      EXPECT_GT(device_fd, 0);
    }
  }
  ~Sequences() override {
    if (device_fd >= 0) host->close(device_fd);
  }

  Verdict apply(const Call& call, unsigned memory_page) {
    const std::uint64_t iova = base_iova + call.first * k4;
    const std::uint64_t length = (call.last - call.first + 1) * k4;
    const std::uint64_t address = memory.address() + memory_page * k4;
    Verdict v;
    if (iommufd) {
      if (call.kind == Call::map) return {iommufd->map(ioas, iova, address, length), 0};
      v.rc = call.kind == Call::unmap ? iommufd->unmap(ioas, iova, length) : iommufd->unmap(ioas, 0, ~0ULL);
      if (v.rc == 0) v.bytes = iommufd->unmapped;
    } else {
      if (call.kind == Call::map) return {container->map(iova, address, length), 0};
      v.rc = call.kind == Call::unmap ? container->unmap(iova, length)
                                      : container->unmap(0, 0, vfio_api::dma_unmap_flag_all);
      if (v.rc == 0) v.bytes = container->unmapped;
    }
    return v;
  }
  int leads_to(unsigned page) {
    std::byte b{};
    if (!host->device(0).dma_read(Iova{base_iova + page * k4}, {&b, 1}).ok()) return -1;
    return static_cast<int>(b) - 1;
  }

  std::unique_ptr<ModelKernel> host;
  TestMemory memory;
  std::unique_ptr<IommufdUser> iommufd;
  std::unique_ptr<CdevUser> cdev;
  std::unique_ptr<Type1User> container;
  std::uint32_t ioas = 0;
  int device_fd = -1;
};

TEST_P(Sequences, AgreeWithTheReference) {
  const std::vector<Call> calls = all_calls();
  std::size_t total = 1;
  for (unsigned i = 0; i < steps; ++i) total *= calls.size();
  for (std::size_t sequence = 0; sequence < total; ++sequence) {
    Reference reference{GetParam()};
    std::size_t rest = sequence;
    for (unsigned step = 0; step < steps; ++step) {
      const Call& call = calls[rest % calls.size()];
      rest /= calls.size();
      const Verdict got = apply(call, step);
      const Verdict expected = reference.apply(call, step);
      ASSERT_EQ(got.rc, expected.rc) << "sequence " << sequence << ", step " << step;
      ASSERT_EQ(got.bytes, expected.bytes) << "sequence " << sequence << ", step " << step;
      for (unsigned page = 0; page < pages; ++page) {
        ASSERT_EQ(leads_to(page), reference.leads_to(page))
            << "sequence " << sequence << ", step " << step << ", page " << page;
      }
    }
    ASSERT_EQ(apply({Call::unmap_all, 0, 0}, 0).rc, 0);
  }
  EXPECT_EQ(host->usage().mappings, 0U);
  EXPECT_EQ(host->usage().pinned, Bytes{0});
  EXPECT_EQ(host->usage().charged_process.value + host->usage().charged_user.value, 0U);
}

INSTANTIATE_TEST_SUITE_P(AllDialects, Sequences,
                         ::testing::Values(Dialect::iommufd, Dialect::type1_v2, Dialect::type1_v1, Dialect::compat_v2,
                                           Dialect::compat_v1),
                         [](const auto& test) {
                           switch (test.param) {
                             case Dialect::iommufd: return std::string{"iommufd"};
                             case Dialect::type1_v2: return std::string{"type1_v2"};
                             case Dialect::type1_v1: return std::string{"type1_v1"};
                             case Dialect::compat_v2: return std::string{"compat_v2"};
                             case Dialect::compat_v1: return std::string{"compat_v1"};
                           }
                           return std::string{"unknown"};
                         });

}  // namespace
}  // namespace iovane::backends::model
