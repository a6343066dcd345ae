// Replacing: one mapping leads to other memory, without a gap where the backend can.
#include "base/error_text.hpp"
#include "engine/batch_executor.hpp"

namespace iovane::engine {

using backends::BackendOp;
using backends::BackendOpResult;
using backends::OpKind;
using base::fail;

void BatchExecutor::replace(std::uint32_t i, const Operation& operation) noexcept {
  if (const Error refused = try_replace(i, operation)) refuse(i, refused);
}

Error BatchExecutor::try_replace(std::uint32_t i, const Operation& operation) noexcept {
  flush();
  const IovaRange range = operation.range();
  if (!is_granular(space_, range)) return bad_range(space_, range);
  if (!is_access(operation.access)) return unknown_access();
  MappingRecord* const record = space_.index.first_record(range);
  if (record == nullptr || record->range != range || record->state != MappingState::live)
    return fail(Errc::not_found, Stage::validate, 0, "no mapping is exactly [{:#x}, {:#x}]", range.start.value,
                range.last.value);
  if ((record->flags & mapping_is_scattered) != 0)
    return make_error(Errc::unsupported, Stage::validate, "a scatter list cannot be replaced; unmap it and map anew");
  ResolvedPiece piece;
  if (!resolve_piece(space_, operation.one_piece(), piece)) return bad_piece(space_, operation.one_piece());
  const Bytes length = operation.length;
  if (length != range.length())
    return fail(Errc::invalid_argument, Stage::validate, 0, "the new memory has {} bytes, the mapping {}", length.value,
                range.length().value);

  const BackendOp new_op = map_op(piece, range, operation.access);
  if (has(space_.backend->facts().capabilities, backends::Capability::replace_in_place)) {
    BackendOp op = new_op;
    op.kind = OpKind::replace;
    replacing_ = record;
    const auto result = execute_one(op);
    replacing_ = nullptr;
    if (result.error) return result.error;
  } else {
    replacing_ = record;
    if (const Error stays = take_out(range)) {
      quarantine(*record);
      replacing_ = nullptr;
      return stays;
    }
    const auto result = execute_one(new_op);
    if (result.error) return restore_replaced(record, result);
    replacing_ = nullptr;
  }
  if (piece.memory_index != record->region) {
    if (piece.memory_index != 0) ++space_.memories.at(piece.memory_index - 1).mappings;
    drop_memory(record->region);
  }
  record->region = piece.memory_index;
  record->memory = piece.memory;
  record->access = operation.access;
  Completion& verdict = slice_.completion(i);
  verdict.bytes = length;
  verdict.mapping = space_.index.id_of(record);
  return {};
}

// The new memory was refused, or its fate is not known: the old memory comes back.
Error BatchExecutor::restore_replaced(MappingRecord* record, const BackendOpResult& refused) noexcept {
  const IovaRange range = record->range;
  if (!clear_of(refused, range)) {
    quarantine(*record);
    replacing_ = nullptr;
    return refused.error;
  }
  const std::uint32_t old_index = record->region;
  const backends::RegionId old_region =
      old_index != 0 ? space_.memories.at(old_index - 1).region : backends::RegionId{};
  const auto restored = execute_one(map_op({old_region, record->memory, old_index}, range, record->access));
  const bool all_gone = !restored.error || clear_of(restored, range);
  replacing_ = nullptr;
  if (!restored.error) return refused.error;
  if (!all_gone) {
    quarantine(*record);
    return refused.error;
  }
  retire(record);
  return fail(refused.error.code, Stage::map, refused.error.os_errno,
              "{}; mapping the old memory again failed too ({}), so [{:#x}, {:#x}] is unmapped now",
              refused.error.detail(), restored.error.detail(), range.start.value, range.last.value);
}

}  // namespace iovane::engine
