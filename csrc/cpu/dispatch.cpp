// Which kernel tables this library holds and which of them this processor runs.
#include <string.h>

#include "../fastseq.h"
#include "runtime.h"

extern "C" {
#define FASTSEQ_ISA(name, usable) extern const fastseq_kernel_table fastseq_table_##name;
#include "isa.def"
#undef FASTSEQ_ISA
}

namespace {

struct Tier {
  const char* name;
  const fastseq_kernel_table* table;
  bool (*usable)();
};

// From the plainest up: the last usable one is the default.
const Tier tiers[] = {
#define FASTSEQ_ISA(name, usable) {#name, &fastseq_table_##name, []() -> bool { return usable; }},
#include "isa.def"
#undef FASTSEQ_ISA
};

const char* const cell_names[] = {
#define FASTSEQ_CELL(name, Struct) #name,
#include "../cells/cells.def"
#undef FASTSEQ_CELL
};

}  // namespace

extern "C" {

int fastseq_isa_count(void) { return (int)(sizeof(tiers) / sizeof(tiers[0])); }

const char* fastseq_isa_name(int index) { return tiers[index].name; }

int fastseq_isa_usable(int index) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  return tiers[index].usable();
}

const fastseq_kernel_table* fastseq_table(int index) { return tiers[index].table; }

const char* fastseq_cell_name(int cell) { return cell_names[cell]; }

}  // extern "C"
