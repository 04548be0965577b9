// The process's side of users' cells: the table of what their libraries call, and loading them. See cell_library.h.
#include <dlfcn.h>
#include <stdio.h>

#include "cell_library.h"
#include "runtime.h"

extern "C" {

const fastseq_cell_runtime* fastseq_cell_runtime_table(void) {
  static const fastseq_cell_runtime table = {
      fastseq_run_parallel,       fastseq_workspace,        fastseq_prefer_huge_pages,
      fastseq_wait_turn,          &fastseq_profiling,       fastseq_profile_enter,
      fastseq_profile_begin_call, fastseq_profile_add_size, fastseq_profile_end_call,
  };
  return &table;
}

const fastseq_cell_library* fastseq_cell_open(const char* path, char* reason, size_t reason_bytes) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    snprintf(reason, reason_bytes, "%s", dlerror());
    return nullptr;
  }
  auto start = (fastseq_cell_start_function)dlsym(library, "fastseq_cell_start");
  const fastseq_cell_library* kernels = start ? start(fastseq_cell_runtime_table()) : nullptr;
  if (kernels && kernels->abi == FASTSEQ_CELL_ABI) return kernels;
  snprintf(reason, reason_bytes, "%s is no library of a cell for this build", path);
  dlclose(library);
  return nullptr;
}

}  // extern "C"
