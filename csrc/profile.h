// The profiler's side of the C ABI: what was recorded of each kernel call, and how recording is switched on and off.
//
// Time is counted in ticks of the processor's time stamp. Every thread of a call is in exactly one phase at a time, so that
// the ticks of its phases add up to the time between its begin and its end.
#ifndef FASTSEQ_PROFILE_H
#define FASTSEQ_PROFILE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum fastseq_phase {
#define FASTSEQ_PHASE(id, name) FASTSEQ_PHASE_##id,
#include "phases.def"
#undef FASTSEQ_PHASE
  FASTSEQ_PHASE_COUNT
};

#define FASTSEQ_PROFILE_SIZES 16

struct fastseq_profile_slice {
  int64_t phase;
  int64_t begin;
  int64_t end;
};

struct fastseq_profile_thread {
  int64_t begin;  // 0: the thread took no part
  int64_t end;
  int64_t last;  // when the current phase was entered
  int64_t phase;
  int64_t ticks[FASTSEQ_PHASE_COUNT];
  int64_t counts[FASTSEQ_PHASE_COUNT];  // how often each was entered
  int64_t slice_count;
  int64_t slice_capacity;  // of the session that the call began in: another may follow before it ends
  int64_t slices_dropped;
  struct fastseq_profile_slice* slices;  // [slice_count]
};

struct fastseq_profile_size {
  const char* name;
  int64_t value;
};

struct fastseq_profile_call {
  const char* kernel;
  const char* variant;
  const char* isa;
  int32_t dtype;      // fastseq_dtype
  int32_t threads;    // entries of `records`
  int64_t thread_id;  // the system's number of the calling thread
  int64_t session;
  int64_t begin;
  int64_t end;
  int64_t size_count;
  struct fastseq_profile_size sizes[FASTSEQ_PROFILE_SIZES];
  struct fastseq_profile_thread* records;  // [threads]
  struct fastseq_profile_call* next;
};

struct fastseq_profile {
  double ticks_per_second;
  int64_t begin;          // ticks
  int64_t end;            // ticks
  int64_t begin_time_ns;  // of the system's clock, at `begin`
  int64_t calls_dropped;
  struct fastseq_profile_call* calls;  // in the order in which they ended
};

// Starts recording. Calls beyond max_calls are counted only, as are a thread's slices beyond max_slices a call.
// 0: recording was on already.
int fastseq_profile_start(int64_t max_calls, int64_t max_slices);
// Stops recording and hands over what was recorded; NULL: recording was off, or memory is out.
struct fastseq_profile* fastseq_profile_stop(void);
void fastseq_profile_free(struct fastseq_profile* profile);
const char* fastseq_phase_name(int phase);

#ifdef __cplusplus
}
#endif
#endif
