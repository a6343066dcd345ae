// The slow path of the map cache: find out what is missing, pay for it, pin it, publish it.
#include <algorithm>
#include <bit>
#include <cerrno>
#include <chrono>
#include <thread>

#include "base/error_text.hpp"
#include "pinning/map_cache_batch.hpp"

namespace iovane::pinning {

Result<void> MapCache::ensure(const MemoryRange& asked, Access access) noexcept {
  const std::uint64_t granule = provider_.traits().granule.value;
  if (!asked.well_formed() || access == Access::none || asked.is_file() != (asked.last >= file_key_first))
    return base::fail(
        Errc::invalid_argument, Stage::validate, 0,
        "memory [{:#x}, {:#x}] with access {}: expected start <= last <= {:#x}, all of it in this process "
        "or all in one file, and a right to read or write",
        asked.start, asked.last, static_cast<unsigned>(access), key_last);
  if (index_.is_forked_copy())
    return base::fail(Errc::closed, Stage::validate, 0, "this cache belongs to the process that forked this one");
  PinBatch batch;
  batch.wanted = asked.grown_to(granule);
  batch.access = access;
  if (asked.is_file()) {
    const auto first = files_.find(asked.start);
    if (!first || asked.last > first->window_last)
      return base::fail(Errc::invalid_argument, Stage::validate, 0,
                        "keys [{:#x}, {:#x}] are not inside one registered file", asked.start, asked.last);
    batch.wanted.last = std::min(batch.wanted.last, first->window_last);
  }

  bool counted = false;
  unsigned idle = 0;     // rounds since something was published
  unsigned refused = 0;  // pins of memory that was there a moment before
  // Each round that publishes something brings at least a granule; more rounds than granules mean that others evict
  // what we pin.
  std::uint64_t rounds_left = attempts_max + batch.wanted.length().value / granule;
  while (idle < attempts_max && rounds_left-- != 0) {
    {
      std::unique_lock held{lock_};
      const PlanVerdict verdict = plan(batch);
      if (verdict == PlanVerdict::covered) return {};
      if (!counted) ++stats_.misses;
      counted = true;
      if (verdict == PlanVerdict::wait) {
        // Someone else's pin or the monitor's work; both end by themselves and notify.
        ++stats_.waits;
        changed_->wait(held);
        ++rounds_left;
        continue;
      }
    }
    batch.published = 0;
    // A.unpins - acquire, pairs with R.unpins in unpin().
    const std::uint64_t unpins_seen = unpins_ended_.load(std::memory_order_acquire);
    const Result<void> done = fill_in(batch);
    // What has been taken away again by now, the caller finds missing and asks for once more.
    if (done && batch.whole && batch.published == batch.count) return {};
    idle = batch.published != 0 ? 0 : idle + 1;
    if (done) continue;
    const Errc code = done.error().code;
    // The provider's limits can be tighter than ours: others in this process and of this user pin as well, and others
    // map in the same address space. Unused pins go first, then the margin.
    const bool providers_limit =
        ((code == Errc::memlock_exceeded || code == Errc::entry_limit) && done.error().os_errno != 0) ||
        code == Errc::iova_exhausted || code == Errc::limit_reached;
    if (providers_limit &&
        make_room(batch.wanted.length().value, any_node, BudgetRefusal::Limit::process, batch.wanted, unpins_seen))
      continue;
    // The memory changed while it was pinned, and this provider's pins go by address: the old one has to go first.
    if (code == Errc::busy && settle(unpins_seen)) continue;
    if (batch.margin != PinBatch::Margin::none && code != Errc::closed) {
      // Perhaps only the neighbourhood is at fault: memory that is not there, or a budget that is all but used up.
      batch.margin = static_cast<PinBatch::Margin>(static_cast<unsigned>(batch.margin) - 1);
      continue;
    }
    // Watching made the memory present; when the pin did not find it there, somebody discarded it in between, and its
    // event had been worked off before this round began. Memory that cannot be pinned at all fails every time.
    if (code == Errc::bad_memory && watcher_ != nullptr && batch.error && ++refused < refusals_max) continue;
    return done;
  }
  return base::fail(
      Errc::busy, Stage::pin, 0,
      "memory [{:#x}, {:#x}] changed, or was evicted, {} times while it was being pinned: somebody unmaps "
      "or discards it, or the budget is too small for what is asked at once",
      asked.start, asked.last, attempts_max);
}

// Under lock_. Fills the batch with the gaps of the wanted range (and of its chunks), takes them into in_flight_.
MapCache::PlanVerdict MapCache::plan(PinBatch& batch) noexcept {
  // relaxed: changes_end() stores it under lock_, and a 1 that comes later concerns a change that comes later.
  if (changes_pending_.load(std::memory_order_relaxed) != 0) {
    return PlanVerdict::wait;
  }
  batch.count = 0;
  batch.whole = true;
  batch.error = {};
  supersede_weaker(batch);

  const MemoryRange area = with_margin(batch);
  // No more than the chunk: its refusal must not be followed by a second try of the same.
  if (batch.margin == PinBatch::Margin::stream && area.last <= batch.wanted.grown_to(config_.chunk.value).last)
    batch.margin = PinBatch::Margin::chunk;
  bool missing = false;
  for (std::uint64_t key = area.start;;) {
    const auto next = index_.first_in({key, area.last});
    const std::uint64_t gap_last = next ? next->range.start - 1 : area.last;
    if (!next || next->range.start > key) {
      const MemoryRange gap{key, gap_last};
      if (gap.overlaps(batch.wanted)) {
        missing = true;
        if (is_in_flight(gap.common(batch.wanted))) return PlanVerdict::wait;
      }
      add_gap(batch, gap);
    }
    if (!next || next->range.last >= area.last) break;
    key = next->range.last + 1;
  }
  if (!missing) return PlanVerdict::covered;
  // Take places for the pieces. A full table shortens the batch; the next round does the rest.
  std::size_t taken = 0;
  for (std::size_t f = 0; f < in_flight_max && taken < batch.count; ++f) {
    if (in_flight_[f].used) continue;
    in_flight_[f] = {batch.pieces[taken].range, true, false};
    batch.pieces[taken++].flight = f;
  }
  in_flight_count_ += taken;
  batch.whole = batch.whole && taken == batch.count;
  batch.count = taken;
  if (taken != 0) note_stream(area, batch.step);
  return taken != 0 ? PlanVerdict::planned : PlanVerdict::wait;
}

// Under lock_. What to pin for the wanted range, as far as it is not there yet: its chunks, or more where it goes on
// with what was pinned before.
MemoryRange MapCache::with_margin(PinBatch& batch) const noexcept {
  batch.step = 0;
  if (batch.margin == PinBatch::Margin::none) return batch.wanted;
  MemoryRange area = batch.wanted.grown_to(config_.chunk.value);
  batch.step = area.length().value;
  if (batch.margin == PinBatch::Margin::stream)
    for (const Stream& stream : streams_)
      if (stream.bytes != 0 && stream.next == area.start) {
        // It ends at a border of its size, so that a huge page is not shared with the next one and the user's last
        // chunk reaches no further than the memory is likely to.
        const std::uint64_t bytes = std::min(std::bit_floor(stream.bytes) * 2, config_.chunk_max.value);
        area.last = std::max(area.last, (area.start & ~(bytes - 1)) + (bytes - 1));
        batch.step = std::max(batch.step, bytes);
      }
  if (const auto place = files_.find(batch.wanted.start))
    area.last = std::min(area.last, place->window_last);
  else
    area.last = std::min(area.last, file_key_first - 1);
  return area;
}

// Under lock_. `area` is being pinned: whoever misses right behind it goes on with it.
void MapCache::note_stream(const MemoryRange& area, std::uint64_t step) noexcept {
  if (config_.chunk_max.value == 0) return;
  const Stream now{area.last + 1, std::min(step, config_.chunk_max.value)};
  for (std::size_t i = 0; i < streams_max; ++i)
    if (streams_[i].next == area.start && streams_[i].bytes != 0) {
      if (i >= streams_max / 2) {
        streams_[i] = now;
        return;
      }
      streams_[i] = {};
      streams_[streams_max / 2 + stream_oldest_[1]++ % (streams_max / 2)] = now;
      return;
    }
  streams_[stream_oldest_[0]++ % (streams_max / 2)] = now;
}

// Regions that allow less than is asked leave the index; what replaces them allows both.
void MapCache::supersede_weaker(PinBatch& batch) noexcept {
  std::uint64_t key = batch.wanted.start;
  while (const auto live = index_.first_in({key, batch.wanted.last})) {
    if (!includes(live->access, batch.access)) {
      batch.access = static_cast<Access>(static_cast<unsigned>(batch.access) | static_cast<unsigned>(live->access));
      retire_locked(live->id);
    }
    if (live->range.last >= batch.wanted.last) return;
    key = live->range.last + 1;
  }
}

// Under lock_.
bool MapCache::is_in_flight(const MemoryRange& range) const noexcept {
  if (in_flight_count_ == 0) return false;
  for (const InFlight& f : in_flight_)
    if (f.used && f.range.overlaps(range)) return true;
  return false;
}

void MapCache::add_gap(PinBatch& batch, MemoryRange gap) noexcept {
  if (is_in_flight(gap)) {
    // Somebody pins part of the margin already: keep to what is needed.
    if (!gap.overlaps(batch.wanted)) return;
    gap = gap.common(batch.wanted);
  }
  const std::uint64_t border = provider_.traits().border.value;
  for (std::uint64_t key = gap.start; batch.count < pieces_max;) {
    const std::uint64_t piece_last = std::min(gap.last, key | (border - 1));
    batch.pieces[batch.count++] = {.range = {key, piece_last}};
    if (piece_last == gap.last) return;
    key = piece_last + 1;
  }
  batch.whole = false;
}

PinRequest MapCache::request_for(const MemoryRange& range, Access access) const noexcept {
  PinRequest request{.range = range, .access = access};
  if (const auto place = files_.find(range.start)) {
    request.fd = place->fd;
    request.offset = place->offset;
    request.memory = place->memory;
  }
  return request;
}

// Without lock_. Whatever happens, the pieces have left in_flight_ when it returns.
Result<void> MapCache::fill_in(PinBatch& batch) noexcept {
  for (std::size_t i = 0; i < batch.count; ++i) {
    batch.requests[i] = request_for(batch.pieces[i].range, batch.access);
    batch.outcomes[i] = {};
  }
  Result<void> ready = charge(batch);
  if (ready) ready = watch(batch);
  if (!ready) {
    abandon(batch);
    return ready;
  }
  provider_.pin({batch.requests.data(), batch.count}, {batch.outcomes.data(), batch.count});
  publish(batch);
  if (batch.error) return batch.error;
  return {};
}

Result<void> MapCache::charge(PinBatch& batch) noexcept {
  for (std::size_t i = 0; i < batch.count; ++i) {
    PinBatch::Piece& piece = batch.pieces[i];
    if (budget_.has_node_limits()) piece.node = static_cast<std::uint8_t>(config_.node_of(piece.range) % nodes_max);
    const std::uint64_t bytes = provider_.memlock_charge(batch.requests[i]).value;
    unsigned attempt = 0;
    for (;;) {
      const std::uint64_t unpins_seen = unpins_ended_.load(std::memory_order_acquire);  // A.unpins
      const auto refusal = try_charge(piece.node, bytes);
      if (!refusal) break;
      // Others may take what we free: give up after some rounds rather than evict everything.
      if (++attempt > attempts_max || !make_room(bytes, piece.node, refusal->which, batch.wanted, unpins_seen))
        return refusal_text(*refusal);
    }
    piece.charged = bytes;
  }
  for (unsigned attempt = 0;;) {
    const std::uint64_t unpins_seen = unpins_ended_.load(std::memory_order_acquire);  // A.unpins
    if (index_.region_count() + batch.count <= config_.regions_max) break;
    if (++attempt > attempts_max || !make_room(1, any_node, BudgetRefusal::Limit::space, batch.wanted, unpins_seen))
      return base::fail(Errc::entry_limit, Stage::pin, 0,
                        "the cache holds {} regions, all in use, and may hold {} (MapCacheConfig::regions_max)",
                        index_.region_count(), config_.regions_max);
  }
  return {};
}

Error MapCache::refusal_text(const BudgetRefusal& r) const noexcept {
  return base::fail(Errc::memlock_exceeded, Stage::pin, 0,
                    "pinning {} bytes passes the {} limit of {} bytes (node {}): {} bytes are pinned and in use; "
                    "release leases, or raise the limit (MapCacheConfig::bytes_max, PinBudget::Limits, ulimit -l)",
                    r.need, to_string(r.which), r.limit, r.node, r.used);
}

Result<void> MapCache::watch(PinBatch& batch) noexcept {
  if (watcher_ == nullptr) return {};
  for (std::size_t i = 0; i < batch.count; ++i) {
    if (batch.pieces[i].range.is_file()) continue;
    if (auto watched = watcher_->watch(batch.pieces[i].range, batch.access); !watched) return watched;
    batch.pieces[i].watched = true;
  }
  return {};
}

// Takes the outcomes into the index; what failed, was poisoned or does not fit is undone.
void MapCache::publish(PinBatch& batch) noexcept {
  std::array<UnpinRequest, pieces_max> undo;
  std::array<std::size_t, pieces_max> undo_piece;
  std::size_t undo_count = 0;
  const auto note = [&](const PinBatch::Piece& piece, const Error& error) {
    if (!batch.error && piece.range.overlaps(batch.wanted)) batch.error = error;
  };
  {
    const std::lock_guard held{lock_};
    for (std::size_t i = 0; i < batch.count; ++i) {
      PinBatch::Piece& piece = batch.pieces[i];
      InFlight& flight = in_flight_[piece.flight];
      const PinOutcome& outcome = batch.outcomes[i];
      if (outcome.error && flight.poisoned) {
        // It changed while it was being pinned: what the pin met is over, so look again.
        ++stats_.poisoned;
      } else if (outcome.error) {
        note(piece, outcome.error);
      } else {
        bool live = false;
        if (flight.poisoned) {
          ++stats_.poisoned;
        } else if (auto id = index_.insert(piece.range, batch.access, outcome.handle, piece.node); id) {
          policy_.insert(*id);
          live = true;
        } else {
          note(piece, id.error());
        }
        if (live) {
          ++stats_.pins;
          ++batch.published;
          piece.charged = 0;  // the region's from here on
          piece.watched = false;
        } else {
          undo[undo_count] = {piece.range, batch.access, outcome.handle};
          undo_piece[undo_count++] = i;
        }
      }
      flight = {};
    }
    in_flight_count_ -= batch.count;
  }
  changed_->notify_all();
  if (undo_count != 0) {
    std::array<Error, pieces_max> errors{};
    provider_.unpin({undo.data(), undo_count}, {errors.data(), undo_count});
    for (std::size_t u = 0; u < undo_count; ++u)
      if (errors[u]) {
        // Pinned for good, so charged for good.
        batch.pieces[undo_piece[u]].charged = 0;
        const std::lock_guard held{lock_};
        ++stats_.regions_lost;
      }
  }
  for (std::size_t i = 0; i < batch.count; ++i)
    if (batch.pieces[i].charged != 0) uncharge(batch.pieces[i].node, batch.pieces[i].charged);
}

void MapCache::abandon(PinBatch& batch) noexcept {
  {
    const std::lock_guard held{lock_};
    for (std::size_t i = 0; i < batch.count; ++i) in_flight_[batch.pieces[i].flight] = {};
    in_flight_count_ -= batch.count;
  }
  changed_->notify_all();
  for (std::size_t i = 0; i < batch.count; ++i)
    if (batch.pieces[i].charged != 0) {
      uncharge(batch.pieces[i].node, batch.pieces[i].charged);
      batch.pieces[i].charged = 0;
    }
}

std::optional<BudgetRefusal> MapCache::try_charge(std::uint8_t node, std::uint64_t bytes) noexcept {
  if (const auto used = space_.try_take(bytes))
    return BudgetRefusal{BudgetRefusal::Limit::space, node, space_.limit(), *used, bytes};
  if (const auto refusal = budget_.try_charge(node, bytes)) {
    space_.give_back(bytes);
    return refusal;
  }
  return std::nullopt;
}

void MapCache::uncharge(std::uint8_t node, std::uint64_t bytes) noexcept {
  budget_.uncharge(node, bytes);
  space_.give_back(bytes);
}

// Without lock_. True when something came free. `unpins_seen`: unpins_ended_ from before room was found missing.
bool MapCache::make_room(std::uint64_t bytes, std::uint8_t node, BudgetRefusal::Limit which, const MemoryRange& keep,
                         std::uint64_t unpins_seen) noexcept {
  if (collect() != 0) return true;
  const std::uint8_t where = which == BudgetRefusal::Limit::node ? node : any_node;
  if (evict_beside(bytes, where, &keep) != 0) return true;
  if (which != BudgetRefusal::Limit::space && budget_.evict_elsewhere(*this, bytes, where) != 0) return true;
  return await_unpins(unpins_seen) || await_walkers();
}

// Without lock_. True when something that had been retired is unpinned.
bool MapCache::settle(std::uint64_t unpins_seen) noexcept {
  return collect() != 0 || await_unpins(unpins_seen) || await_walkers();
}

// A thread that was interrupted in the middle of a lookup holds everything back that it might have found, for as long
// as it does not run. Retired regions that nobody really uses come free as soon as it goes on; 20 ms are several turns
// on a busy CPU.
bool MapCache::await_walkers() noexcept {
  constexpr std::chrono::microseconds longest{20'000};
  for (std::chrono::microseconds pause{50}; pause < longest; pause *= 2) {
    {
      const std::lock_guard held{lock_};
      if (!waits_for_walk_) return false;
    }
    std::this_thread::sleep_for(pause);
    if (collect() != 0) return true;
  }
  return false;
}

// Nothing is left to evict, but another thread may be unpinning what it took: wait for that rather than fail. It ends
// by itself, for it needs nothing that this thread holds.
bool MapCache::await_unpins(std::uint64_t unpins_seen) noexcept {
  std::unique_lock held{lock_};
  // relaxed: written under lock_.
  while (unpins_ended_.load(std::memory_order_relaxed) == unpins_seen) {
    if (unpins_under_way_ == 0) return false;
    changed_->wait(held);
  }
  return true;
}

}  // namespace iovane::pinning
