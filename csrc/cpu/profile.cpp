// What the profiler records. Reached only while it is on; see profile.h.
#include "../profile.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "runtime.h"

namespace {

int64_t ticks() {
#if defined(__x86_64__)
  return (int64_t)__builtin_ia32_rdtsc();
#elif defined(__aarch64__)
  int64_t value;
  asm volatile("mrs %0, cntvct_el0" : "=r"(value));
  return value;
#else
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * int64_t(1000000000) + time.tv_nsec;
#endif
}

int64_t clock_ns(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return time.tv_sec * int64_t(1000000000) + time.tv_nsec;
}

// All slices of a session together: 96 MiB.
constexpr int64_t most_slices = int64_t(4) << 20;
// To count ticks against the clock takes some time.
constexpr int64_t shortest_session_ns = 2000000;

struct Session {
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  int64_t number = 0;  // of the current one, or of the next
  int64_t max_calls = 0, max_slices = 0;
  int64_t calls = 0, calls_dropped = 0, slices = 0;
  int64_t begin = 0, begin_monotonic_ns = 0, begin_time_ns = 0;
  fastseq_profile_call* first = nullptr;
  fastseq_profile_call** last = &first;
};
Session session;

struct Lock {
  Lock() { pthread_mutex_lock(&session.mutex); }
  ~Lock() { pthread_mutex_unlock(&session.mutex); }
};

thread_local fastseq_profile_call* current_call = nullptr;
thread_local fastseq_profile_thread* current_thread = nullptr;

void free_call(fastseq_profile_call* call) {
  for (int i = 0; i < call->threads; ++i) free(call->records[i].slices);
  free(call->records);
  free(call);
}

void leave(fastseq_profile_thread* thread, int64_t now) {
  thread->ticks[thread->phase] += now - thread->last;
  if (!thread->slices_dropped && thread->slice_count) thread->slices[thread->slice_count - 1].end = now;
}

void enter(fastseq_profile_thread* thread, int64_t phase, int64_t now) {
  thread->phase = phase;
  thread->last = now;
  ++thread->counts[phase];
  int64_t count = thread->slice_count;
  // A thread's last slices are left out, not the first: what is kept has no holes.
  if (thread->slices_dropped || count == thread->slice_capacity) {
    ++thread->slices_dropped;
    return;
  }
  thread->slices[count] = {phase, now, now};
  thread->slice_count = count + 1;
}

}  // namespace

extern "C" {

int fastseq_profiling = 0;

int fastseq_profile_enter(int phase) {
  fastseq_profile_thread* thread = current_thread;
  if (!thread) return FASTSEQ_PHASE_other;
  int before = (int)thread->phase;
  if (phase == before) return before;
  int64_t now = ticks();
  leave(thread, now);
  enter(thread, phase, now);
  return before;
}

int fastseq_profile_begin_call(const char* kernel, const char* variant, const char* isa, int dtype) {
  int64_t begin = ticks();
  int64_t number;
  {
    Lock lock;
    if (!fastseq_profiling) return 0;
    if (session.calls >= session.max_calls) {
      ++session.calls_dropped;
      return 0;
    }
    ++session.calls;
    number = session.number;
  }
  fastseq_profile_call* call = (fastseq_profile_call*)calloc(1, sizeof(fastseq_profile_call));
  if (!call) return 0;
  call->kernel = kernel;
  call->variant = variant;
  call->isa = isa;
  call->dtype = dtype;
  call->session = number;
  call->begin = begin;
#if defined(SYS_gettid)
  call->thread_id = syscall(SYS_gettid);
#endif
  current_call = call;
  return 1;
}

void fastseq_profile_add_size(const char* name, int64_t value) {
  fastseq_profile_call* call = current_call;
  if (call && call->size_count < FASTSEQ_PROFILE_SIZES) call->sizes[call->size_count++] = {name, value};
}

void fastseq_profile_end_call(void) {
  fastseq_profile_call* call = current_call;
  if (!call) return;
  current_call = nullptr;
  call->end = ticks();
  int64_t slices = 0;
  for (int i = 0; i < call->threads; ++i) {
    fastseq_profile_thread& thread = call->records[i];
    slices += thread.slice_count;
    // What stays behind takes no more than it holds.
    void* shrunk =
        thread.slice_count ? realloc(thread.slices, (size_t)thread.slice_count * sizeof(fastseq_profile_slice)) : nullptr;
    if (shrunk) thread.slices = (fastseq_profile_slice*)shrunk;
  }
  Lock lock;
  // Recording may have ended, or begun anew, while the kernel ran.
  if (!fastseq_profiling || call->session != session.number) {
    free_call(call);
    return;
  }
  session.slices += slices;
  *session.last = call;
  session.last = &call->next;
}

void* fastseq_profile_region(int threads) {
  fastseq_profile_call* call = current_call;
  if (!call || call->threads >= threads) return call;
  // Kernels open one region, or several of the same size.
  auto* records = (fastseq_profile_thread*)realloc(call->records, (size_t)threads * sizeof(fastseq_profile_thread));
  if (!records) return nullptr;
  call->records = records;
  for (int i = call->threads; i < threads; ++i) {
    memset(&records[i], 0, sizeof(records[i]));
    int64_t capacity = session.slices < most_slices ? session.max_slices : 0;
    if (capacity > 0) records[i].slices = (fastseq_profile_slice*)malloc((size_t)capacity * sizeof(fastseq_profile_slice));
    records[i].slice_capacity = records[i].slices ? capacity : 0;
  }
  call->threads = threads;
  return call;
}

void fastseq_profile_begin_thread(void* region, int rank) {
  fastseq_profile_call* call = (fastseq_profile_call*)region;
  if (!call || rank >= call->threads) return;
  fastseq_profile_thread* thread = &call->records[rank];
  int64_t now = ticks();
  if (thread->begin) {
    // The time since the last region belongs to no phase of the kernel.
    thread->ticks[FASTSEQ_PHASE_other] += now - thread->end;
  } else {
    thread->begin = now;
  }
  enter(thread, FASTSEQ_PHASE_other, now);
  current_thread = thread;
}

void fastseq_profile_end_thread(void) {
  fastseq_profile_thread* thread = current_thread;
  if (!thread) return;
  current_thread = nullptr;
  thread->end = ticks();
  leave(thread, thread->end);
}

int fastseq_profile_start(int64_t max_calls, int64_t max_slices) {
  Lock lock;
  if (fastseq_profiling) return 0;
  session.max_calls = max_calls;
  session.max_slices = max_slices;
  session.calls = session.calls_dropped = session.slices = 0;
  session.first = nullptr;
  session.last = &session.first;
  ++session.number;
  session.begin_monotonic_ns = clock_ns(CLOCK_MONOTONIC);
  session.begin = ticks();
  session.begin_time_ns = clock_ns(CLOCK_REALTIME);
  __atomic_store_n(&fastseq_profiling, 1, __ATOMIC_RELEASE);
  return 1;
}

struct fastseq_profile* fastseq_profile_stop(void) {
  auto* profile = (fastseq_profile*)calloc(1, sizeof(fastseq_profile));
  int64_t monotonic_ns;
  {
    Lock lock;
    if (!fastseq_profiling || !profile) {
      free(profile);
      return nullptr;
    }
    __atomic_store_n(&fastseq_profiling, 0, __ATOMIC_RELEASE);
    profile->end = ticks();
    monotonic_ns = clock_ns(CLOCK_MONOTONIC);
    profile->begin = session.begin;
    profile->begin_time_ns = session.begin_time_ns;
    profile->calls_dropped = session.calls_dropped;
    profile->calls = session.first;
    session.first = nullptr;
    session.last = &session.first;
    ++session.number;
  }
  int64_t now = profile->end;
  while (monotonic_ns - session.begin_monotonic_ns < shortest_session_ns) {
    now = ticks();
    monotonic_ns = clock_ns(CLOCK_MONOTONIC);
  }
  profile->ticks_per_second = (double)(now - profile->begin) * 1e9 / (double)(monotonic_ns - session.begin_monotonic_ns);
  return profile;
}

void fastseq_profile_free(struct fastseq_profile* profile) {
  if (!profile) return;
  while (profile->calls) {
    fastseq_profile_call* next = profile->calls->next;
    free_call(profile->calls);
    profile->calls = next;
  }
  free(profile);
}

const char* fastseq_phase_name(int phase) {
  static const char* const names[] = {
#define FASTSEQ_PHASE(id, name) name,
#include "../phases.def"
#undef FASTSEQ_PHASE
  };
  return phase >= 0 && phase < FASTSEQ_PHASE_COUNT ? names[phase] : nullptr;
}

}  // extern "C"
