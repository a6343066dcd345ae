// The texts behind Error::detail_id.
//
// Purpose: keep the newest error texts without allocating, for any number of threads.
// Roles: any thread may write (make_error) and read (Error::detail).
// Progress: wait-free for the writer's ticket; a writer copies into its slot without waiting. Readers never block.
// State: `next_ticket` counts texts; text t lives in slot t mod N. Each slot is a sequence lock: odd while being
//   written. Words are atomics, so a racing reader sees torn words but no data race, and the sequence tells it.
// Invariants: I1 a slot whose sequence is 2t+2 (t: its ticket, counted from 0) holds the whole text of ticket t.
//   I2 a writer that finds its slot still being written by a writer a whole ring behind gives its text up (the error
//   then has no detail) rather than wait.
// Linearization: the release store of the final sequence (W.done); the reader's second acquire load (R.check).
// ABA: a sequence names its ticket, so a reader never takes a newer text for the one it asked for.
// Proven by: tests/unit/result_test.cpp (content, wrap-around, threads under TSan).
#include "base/error_text.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "iovane/result.hpp"

namespace iovane {
namespace {

constexpr std::size_t words_per_slot = error_detail_bytes_max / sizeof(std::uint64_t);

struct DetailSlot {
  std::atomic<std::uint64_t> sequence{0};
  std::array<std::atomic<std::uint64_t>, words_per_slot> words{};
};
static_assert(sizeof(DetailSlot) == 512);

constinit std::array<DetailSlot, error_details_kept> slots{};
constinit std::atomic<std::uint32_t> next_ticket{0};

std::uint32_t keep_text(std::string_view text) noexcept {
  // relaxed: the ticket only picks a slot; the slot's own sequence orders the bytes.
  const std::uint32_t ticket = next_ticket.fetch_add(1, std::memory_order_relaxed);
  const std::uint32_t id = ticket + 1;
  if (id == 0) return 0;  // the one ticket in 2^32 whose id would mean "none"
  DetailSlot& slot = slots[ticket % error_details_kept];

  const std::uint64_t writing = 2 * std::uint64_t{id} - 1;
  // relaxed: only evenness is looked at; the exchange below decides who owns the slot.
  std::uint64_t seen = slot.sequence.load(std::memory_order_relaxed);
  if ((seen & 1U) != 0) return 0;  // I2
  // A.own - pairs with W.done of the slot's previous writer, so that its words come before ours.
  if (!slot.sequence.compare_exchange_strong(seen, writing, std::memory_order_acquire, std::memory_order_relaxed))
    return 0;

  const std::size_t length = std::min(text.size(), error_detail_bytes_max - 1);
  for (std::size_t i = 0; i < words_per_slot; ++i) {
    std::uint64_t word = 0;
    const std::size_t at = i * sizeof word;
    if (at < length) std::memcpy(&word, text.data() + at, std::min(sizeof word, length - at));
    // W.word - release, pairs with R.word: a reader that sees this word also sees the odd sequence before it.
    slot.words[i].store(word, std::memory_order_release);
    if (at + sizeof word > length) break;  // the zero that ends the text is in this word
  }
  // W.done - release, pairs with R.first in read_text().
  slot.sequence.store(writing + 1, std::memory_order_release);
  return id;
}

std::string read_text(std::uint32_t id) {
  if (id == 0) return {};
  const DetailSlot& slot = slots[(id - 1) % error_details_kept];
  const std::uint64_t whole = 2 * std::uint64_t{id};
  // R.first - acquire, pairs with W.done: the words of this ticket are visible.
  if (slot.sequence.load(std::memory_order_acquire) != whole) return {};
  std::array<char, error_detail_bytes_max + 1> buffer{};
  for (std::size_t i = 0; i < words_per_slot; ++i) {
    // R.word - acquire, pairs with W.word.
    const std::uint64_t word = slot.words[i].load(std::memory_order_acquire);
    std::memcpy(buffer.data() + i * sizeof word, &word, sizeof word);
    if (std::memchr(&word, 0, sizeof word) != nullptr) break;
  }
  // R.check - relaxed: the acquire loads above keep it after the words; a newer writer changed it before its words.
  if (slot.sequence.load(std::memory_order_relaxed) != whole) return {};
  return std::string{buffer.data()};
}

struct CodeFacts {
  Errc code;
  int os_errno;
  std::string_view name;
  std::string_view description;
};

constexpr std::array code_facts{
    CodeFacts{Errc::ok, 0, "ok", "no error"},
    CodeFacts{Errc::invalid_argument, EINVAL, "invalid_argument", "the request is malformed"},
    CodeFacts{Errc::overflow, EOVERFLOW, "overflow", "an address or a sum does not fit in 64 bits"},
    CodeFacts{Errc::iova_busy, EEXIST, "iova_busy", "the IOVA range overlaps one that is in use"},
    CodeFacts{Errc::iova_reserved, EINVAL, "iova_reserved", "the IOVA range touches one that the host reserves"},
    CodeFacts{Errc::iova_exhausted, ENOSPC, "iova_exhausted", "no free IOVA range of that size and alignment"},
    CodeFacts{Errc::would_bisect, EINVAL, "would_bisect", "the range would cut a mapping; nothing was unmapped"},
    CodeFacts{Errc::not_found, ENOENT, "not_found", "there is no such thing"},
    CodeFacts{Errc::stale_handle, ESTALE, "stale_handle", "the handle's object is gone"},
    CodeFacts{Errc::memlock_exceeded, ENOMEM, "memlock_exceeded", "pinning would pass RLIMIT_MEMLOCK"},
    CodeFacts{Errc::out_of_memory, ENOMEM, "out_of_memory", "out of memory"},
    CodeFacts{Errc::entry_limit, ENOSPC, "entry_limit", "the backend accepts no further mappings"},
    CodeFacts{Errc::bad_memory, EFAULT, "bad_memory", "the memory cannot be pinned"},
    CodeFacts{Errc::permission, EPERM, "permission", "the process may not do this"},
    CodeFacts{Errc::busy, EBUSY, "busy", "in use"},
    CodeFacts{Errc::unsupported, EOPNOTSUPP, "unsupported", "this host or backend has no such feature"},
    CodeFacts{Errc::no_device, ENODEV, "no_device", "no such device, or it cannot be used"},
    CodeFacts{Errc::io_error, EIO, "io_error", "the kernel failed the call"},
    CodeFacts{Errc::quarantined, EIO, "quarantined", "an earlier unmap failed; the range is out of use"},
    CodeFacts{Errc::cancelled, ECANCELED, "cancelled", "an operation it was linked to failed"},
    CodeFacts{Errc::timed_out, ETIME, "timed_out", "the wait ran out"},
    CodeFacts{Errc::closed, ESHUTDOWN, "closed", "the object is being taken down"},
    CodeFacts{Errc::bad_format, EBADMSG, "bad_format", "the data is damaged or of another format"},
    CodeFacts{Errc::limit_reached, E2BIG, "limit_reached", "a configured limit was reached"},
};

constexpr bool facts_in_order() {
  for (std::size_t i = 0; i < code_facts.size(); ++i)
    if (static_cast<std::size_t>(code_facts[i].code) != i) return false;
  return true;
}
static_assert(facts_in_order());

const CodeFacts& facts_of(Errc code) noexcept {
  const auto index = static_cast<std::size_t>(code);
  return code_facts[index < code_facts.size() ? index : static_cast<std::size_t>(Errc::io_error)];
}

}  // namespace

std::string_view to_string(Errc code) noexcept { return facts_of(code).name; }
int to_errno(Errc code) noexcept { return facts_of(code).os_errno; }

std::string_view to_string(Stage stage) noexcept {
  static constexpr std::array<std::string_view, 13> names{"none",   "open",    "validate", "reserve", "pin",
                                                          "map",    "publish", "unmap",    "unpin",   "release",
                                                          "attach", "detach",  "query"};
  const auto index = static_cast<std::size_t>(stage);
  return index < names.size() ? names[index] : "unknown";
}

Error make_error(Errc code, Stage stage, int os_errno, std::string_view detail) noexcept {
  return Error{code, stage, static_cast<std::uint16_t>(os_errno), detail.empty() ? 0 : keep_text(detail)};
}

std::string Error::detail() const {
  std::string text = read_text(detail_id);
  return text.empty() ? std::string{facts_of(code).description} : text;
}

std::string Error::message() const {
  std::string text;
  if (stage != Stage::none) text.append(to_string(stage)).append(": ");
  text.append(to_string(code));
  if (os_errno != 0) text.append(" (").append(std::generic_category().message(os_errno)).append(")");
  return text.append(": ").append(detail());
}

}  // namespace iovane
