// What the kernels need from the process: threads, a scratch arena, a barrier. Implemented once, in runtime.cpp, for the
// plainest instruction set, so that per-ISA objects share no inline code with it.
#pragma once

#include <stddef.h>
#include <stdint.h>

extern "C" {
// Calls body(context, rank, size) for rank 0 ... size-1 at the same time, size <= threads, through the process's one OpenMP
// runtime. Denormals are flushed inside and the caller's floating-point mode is restored.
void fastseq_run_parallel(int threads, void (*body)(void* context, int rank, int size), void* context);

// Scratch memory of the calling thread, 64-byte aligned, valid until its next call; NULL when memory is out. One block per
// thread that grows to the largest request and is given back when that was large: no shape-keyed cache.
void* fastseq_workspace(size_t bytes);

// Whether there is an AMX unit for bfloat16 and the system lets this process use it; asks the system at the first call.
int fastseq_matrix_unit_usable(void);

// Asks for huge pages behind a large block that is about to be written for the first time.
void fastseq_prefer_huge_pages(void* block, size_t bytes);

// --- profile.cpp; called while the profiler is on, which fastseq_profiling says
__attribute__((visibility("hidden"))) extern int fastseq_profiling;
// Ends the calling thread's phase and begins another; returns the one that ended.
int fastseq_profile_enter(int phase);
// One kernel call on the calling thread; strings must last. 0: it is not recorded, and must not be ended.
int fastseq_profile_begin_call(const char* kernel, const char* variant, const char* isa, int dtype);
void fastseq_profile_add_size(const char* name, int64_t value);
void fastseq_profile_end_call(void);
// A parallel region of the current call, and a thread's part in it.
void* fastseq_profile_region(int threads);
void fastseq_profile_begin_thread(void* region, int rank);
void fastseq_profile_end_thread(void);

// One turn of waiting: a pause first, the processor given away after `turn` grows large.
void fastseq_wait_turn(int turn);
}
