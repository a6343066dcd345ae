// What a worker hands out as it happens: page faults that devices wait in, and descriptors that become readable.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <utility>

#include "engine/worker.hpp"
#include "iovane/page_fault.hpp"

namespace iovane::engine {

class SpaceCore;

/// Takes page faults from an address space's queue, asks the caller's handler, and answers.
class PageFaultPump final : public WorkerTask {
 public:
  PageFaultPump(SpaceCore& space, PageFaultHandler handler) : space_{space}, handler_{std::move(handler)} {}

 private:
  static constexpr std::size_t events_max = 16;

  std::uint64_t run_on_worker() noexcept override;
  bool runs_again() const noexcept override { return true; }
  void decide(const PageFaultEvent& event) noexcept;
  bool answer() noexcept;

  SpaceCore& space_;
  const PageFaultHandler handler_;
  // What was read and not decided yet: should this thread end in the handler, the next asks it again.
  std::array<PageFaultEvent, events_max> events_;
  std::size_t next_ = 0;
  std::size_t count_ = 0;
  struct Unanswered {
    PageFaultEvent event;
    PageFaultAnswer answer;
  };
  std::optional<Unanswered> unanswered_;
  // Of the group whose last event has not come.
  bool fail_ = false;
  bool later_ = false;
};

/// Calls a handler whenever a descriptor is readable.
class DescriptorTask final : public WorkerTask {
 public:
  DescriptorTask(std::shared_ptr<SpaceCore> space, Worker& worker, int fd, std::function<bool()> handler)
      : space_{std::move(space)}, worker_{worker}, fd_{fd}, handler_{std::move(handler)} {}

  void start() noexcept { worker_.post(*this); }
  void stop() noexcept { worker_.forget(*this); }

 private:
  std::uint64_t run_on_worker() noexcept override;
  bool runs_again() const noexcept override { return true; }

  const std::shared_ptr<SpaceCore> space_;  // and with it the worker
  Worker& worker_;
  const int fd_;
  const std::function<bool()> handler_;
};

}  // namespace iovane::engine
