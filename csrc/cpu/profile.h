// How kernels tell the profiler what they are doing. While nothing is recorded, entering a phase is a load and a branch that
// is never taken.
#pragma once

#include "../profile.h"
#include "runtime.h"
#include "vec.h"

#define FS_STRING_OF(name) #name
#define FS_STRING(name) FS_STRING_OF(name)

namespace fastseq::FS_ISA {
namespace {

enum class Phase : int {
#define FASTSEQ_PHASE(id, name) id,
#include "../phases.def"
#undef FASTSEQ_PHASE
};

// From here on the thread is in `phase`; the one it was in before, to come back to.
FS_INLINE Phase enter_phase(Phase phase) {
  if (__builtin_expect(fastseq_profiling, 0)) return (Phase)fastseq_profile_enter((int)phase);
  return Phase::other;
}

// One call of a kernel, from begins() to the end of its scope.
class ProfiledCall {
  bool recorded_ = false;

 public:
  template <class T>
  FS_INLINE bool begins(const char* kernel, const char* variant) {
    if (__builtin_expect(fastseq_profiling, 0))
      recorded_ = fastseq_profile_begin_call(kernel, variant, FS_STRING(FS_ISA), sizeof(T) == 8);
    return recorded_;
  }
  FS_INLINE ~ProfiledCall() {
    if (__builtin_expect(recorded_, 0)) fastseq_profile_end_call();
  }
};

// A size of the current call, for the models of work and traffic.
FS_INLINE void profile_size(const char* name, int64_t value) { fastseq_profile_add_size(name, value); }

}  // namespace
}  // namespace fastseq::FS_ISA
