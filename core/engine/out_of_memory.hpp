// Where exceptions end: what a call of the control plane answers when memory ran out in the middle of it.
#pragma once

#include <new>
#include <utility>

#include "iovane/result.hpp"

namespace iovane::engine {

/// What `call` answers, or out_of_memory. `call` has undone itself when it throws.
template <typename Call>
auto or_out_of_memory(Stage stage, Call&& call) -> decltype(call()) {
  try {
    return std::forward<Call>(call)();
  } catch (const std::bad_alloc&) {
    return make_error(Errc::out_of_memory, stage, "no memory; nothing was changed");
  }
}

}  // namespace iovane::engine
