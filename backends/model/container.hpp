// A VFIO container as groups see it: type1 or sPAPR.
#pragma once

#include <cstddef>

#include "backends/model/accounting.hpp"
#include "backends/model/file.hpp"

namespace iovane::backends::model {

struct IommuGroup;

class Container : public File {
 public:
  // Groups come and go; Host::vfio_mutex is held.
  /// 0 or -errno.
  virtual int attach(IommuGroup& group) noexcept = 0;
  virtual void detach(IommuGroup& group) noexcept = 0;
  virtual bool has_driver() const noexcept = 0;

  virtual void add_usage(SpaceUsage& usage, std::size_t& mappings) const noexcept = 0;
};

}  // namespace iovane::backends::model
