// Threads, scratch memory and floating-point mode. See runtime.h.
#include "runtime.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <dlfcn.h>
#include <link.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <initializer_list>

#include "../fastseq.h"

namespace {

// The GNU entry point of a parallel region; LLVM's and Intel's runtimes export it as well. It is looked up in the runtime
// that the process has already loaded (torch brings one): a second pool of threads would fight the first for the cores.
struct OpenMP {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*thread_number)() = nullptr;
  int (*thread_count)() = nullptr;
  int (*max_threads)() = nullptr;
  char path[4096] = "";

  OpenMP() {
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
          const char* name = strrchr(info->dlpi_name, '/');
          name = name ? name + 1 : info->dlpi_name;
          for (const char* known : {"libgomp", "libomp", "libiomp5"})
            if (!strncmp(name, known, strlen(known))) return ((OpenMP*)data)->open(info->dlpi_name, RTLD_NOLOAD) ? 1 : 0;
          return 0;
        },
        this);
    if (!parallel) open("libgomp.so.1", 0);
  }

  bool open(const char* name, int extra_flags) {
    void* library = dlopen(name, RTLD_LAZY | extra_flags);
    if (!library) return false;
    auto region = (decltype(parallel))dlsym(library, "GOMP_parallel");
    thread_number = (decltype(thread_number))dlsym(library, "omp_get_thread_num");
    thread_count = (decltype(thread_count))dlsym(library, "omp_get_num_threads");
    max_threads = (decltype(max_threads))dlsym(library, "omp_get_max_threads");
    if (!region || !thread_number || !thread_count || !max_threads) return false;
    parallel = region;
    Dl_info where;
    if (dladdr((void*)region, &where) && where.dli_fname) strncpy(path, where.dli_fname, sizeof(path) - 1);
    return true;
  }
};

const OpenMP& openmp() {
  static OpenMP instance;
  return instance;
}

// Denormal operands and results cost a hundred cycles each in the multiplier; recurrent states decay into them.
class FlushDenormals {
#if defined(__x86_64__)
  unsigned saved_ = __builtin_ia32_stmxcsr();

 public:
  FlushDenormals() { __builtin_ia32_ldmxcsr(saved_ | 0x8040); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr((__builtin_ia32_stmxcsr() & 0x3f) | (saved_ & ~0x3fu)); }
#elif defined(__aarch64__)
  uint64_t saved_;

 public:
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (uint64_t(1) << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
#endif
};

struct Region {
  void (*body)(void*, int, int);
  void* context;
  void* profile;  // NULL: nothing is recorded

  void run(int rank, int size) {
    if (!profile) return body(context, rank, size);
    fastseq_profile_begin_thread(profile, rank);
    body(context, rank, size);
    fastseq_profile_end_thread();
  }
};

struct Workspace {
  void* block = nullptr;
  size_t bytes = 0;
  ~Workspace() { release(); }
  void release() {
    free(block);
    block = nullptr;
    bytes = 0;
  }
};

// More than this goes back to the system as soon as a call needs less than half of it.
constexpr size_t kept_workspace_bytes = size_t(64) << 20;
constexpr size_t huge_page_bytes = size_t(2) << 20;

}  // namespace

extern "C" {

void fastseq_run_parallel(int threads, void (*body)(void*, int, int), void* context) {
  const OpenMP& runtime = openmp();
  bool alone = threads <= 1 || !runtime.parallel;
  Region region{body, context, fastseq_profiling ? fastseq_profile_region(alone ? 1 : threads) : nullptr};
  if (alone) {
    FlushDenormals mode;
    region.run(0, 1);
    return;
  }
  runtime.parallel(
      [](void* data) {
        FlushDenormals mode;
        Region* region = (Region*)data;
        const OpenMP& runtime = openmp();
        region->run(runtime.thread_number(), runtime.thread_count());
      },
      &region, (unsigned)threads, 0);
}

void* fastseq_workspace(size_t bytes) {
  thread_local Workspace workspace;
  bool wasteful = workspace.bytes > kept_workspace_bytes && bytes < workspace.bytes / 2;
  if (workspace.bytes < bytes || wasteful) {
    workspace.release();
    size_t alignment = bytes >= huge_page_bytes ? huge_page_bytes : 64;
    size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    if (posix_memalign(&workspace.block, alignment, rounded ? rounded : alignment)) {
      workspace.block = nullptr;
      return nullptr;
    }
    workspace.bytes = rounded;
    fastseq_prefer_huge_pages(workspace.block, rounded);
  }
  return workspace.block;
}

void fastseq_prefer_huge_pages(void* block, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  uintptr_t begin = ((uintptr_t)block + huge_page_bytes - 1) / huge_page_bytes * huge_page_bytes;
  uintptr_t end = ((uintptr_t)block + bytes) / huge_page_bytes * huge_page_bytes;
  // Advice only: where the kernel has no huge pages nothing is lost.
  if (end > begin) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#else
  (void)block;
  (void)bytes;
#endif
}

int fastseq_matrix_unit_usable(void) {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
  // Tiles are eight KiB of state that the system saves for a process only after it has asked (Linux 5.16 and later).
  static const bool usable = [] {
    constexpr unsigned tiles = 1u << 24, bfloat16 = 1u << 22;
    constexpr int request_permission = 0x1023, tile_data = 18;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    if ((edx & (tiles | bfloat16)) != (tiles | bfloat16)) return false;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return usable;
#else
  return 0;
#endif
}

void fastseq_wait_turn(int turn) {
  if (turn % 64 == 0) sched_yield();
}

const char* fastseq_openmp_library(void) { return openmp().parallel ? openmp().path : nullptr; }

int fastseq_max_threads(void) { return openmp().parallel ? openmp().max_threads() : 1; }

}  // extern "C"
