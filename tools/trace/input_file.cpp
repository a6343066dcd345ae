#include "trace/input_file.hpp"

#include <fcntl.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>

#include "base/error_text.hpp"
#include "base/os_error.hpp"

namespace iovane::trace {

Result<InputFile> open_input(const std::string& path) {
  InputFile file{base::UniqueFd{::open(path.c_str(), O_RDONLY | O_CLOEXEC)}, 0};
  if (!file.fd) {
    const int number = errno;
    const char* const cure = number == ENOENT   ? "there is no such file; check the name and the working folder"
                             : number == EACCES ? "you may not read it; run as its owner or change its mode"
                                                : std::strerror(number);  // NOLINT(concurrency-mt-unsafe)
    return base::fail(base::errc_from_errno(number), Stage::open, number, "{}: {}", path, cure);
  }
  struct stat info {};
  if (::fstat(file.fd.get(), &info) != 0 || S_ISDIR(info.st_mode))
    return base::fail(Errc::invalid_argument, Stage::open, EISDIR, "{}: this is a folder; name a file in it", path);
  file.bytes = S_ISREG(info.st_mode) ? static_cast<std::uint64_t>(info.st_size) : 0;
  return file;
}

}  // namespace iovane::trace
