// Faults that tests plant into the kernels to see that they would be noticed. Only the library that is built for those
// tests (PARACOMM_PLANTS) holds them; elsewhere planted() is the constant false and the branch is gone.
#pragma once

#include "cuda/namespace.h"

namespace paracomm::PARACOMM_DEVICE_NAMESPACE {

enum class Plant : int {
  none,
  // messages
  send_without_credit,      ///< the ring is written before the receiver is through with it
  send_without_slots,       ///< only bytes are looked at, not the number of messages
  credit_too_early,         ///< the receiver gives the ring back before it has read it
  no_credit,                ///< the receiver never gives the ring back
  receive_without_wait,     ///< the flag of a message is not looked at
  receive_relaxed,          ///< the flag is read without acquire
  publish_relaxed,          ///< the flag is written without release
  credit_relaxed,           ///< the credit is written without release
  credit_read_relaxed,      ///< the credit is read without acquire
  publish_before_data,      ///< no barrier between a block's stores and the flag
  data_before_flag,         ///< no barrier between the wait and a block's loads
  stale_number,             ///< the flag is compared with the number before
  cursor_not_kept,          ///< the next launch begins where this one did
  ring_skips_end,           ///< a message that does not fit until the end of the ring is written there all the same
  signature_not_compared,   ///< a mismatching call goes unnoticed
  size_not_compared,        ///< a message of another size goes unnoticed
  scratch_shared_by_tiles,  ///< tiles under way at once share their scratch
  // one-shot and two-shot
  stage_without_wait,       ///< peers' inputs are read before they are there
  stage_relaxed,            ///< the stage is written without release
  stage_read_relaxed,       ///< the stage is read without acquire
  stage_before_data,        ///< no barrier between the copy into the staging buffer and the flag
  stage_after_flag,         ///< no barrier between the wait and a block's loads
  stage_one_buffer,         ///< the staging buffer is not doubled
  stage_same_number,        ///< a stage has the number that it had in the call before
  stage_skips_gather_wait,  ///< two-shot: parts are gathered before their owners have reduced them
  stage_sources_unset,      ///< no barrier between the choice of the sources and their use
  calls_not_kept,           ///< the next launch believes that it is the same call
  // every kernel
  begin_apart,  ///< no barrier between a block's setting up and its work
  leave_apart,  ///< a thread may give up while others still look whether to begin
  // giving up
  report_relaxed,     ///< the report is said to be ready without release
  abort_not_seen,     ///< a wait does not look at the abort word
  deadline_not_seen,  ///< a wait has no end
  gone_not_seen,      ///< a wait does not ask whether the peer has left
};

#if defined(PARACOMM_PLANTS)
inline Plant the_plant = Plant::none;
#define PARACOMM_PLANTED(plant) (::paracomm::PARACOMM_DEVICE_NAMESPACE::the_plant == (plant))
#else
#define PARACOMM_PLANTED(plant) false
#endif

}  // namespace paracomm::PARACOMM_DEVICE_NAMESPACE
