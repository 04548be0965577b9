// What tests set: the device that is played, and the order in which its threads run.
#include "emulator.h"

extern "C" __attribute__((visibility("default"))) void fastseq_emulation_device(int multiprocessors, int shared_bytes,
                                                                                int descending) {
  fastseq_emulation::limits = {multiprocessors, shared_bytes, descending};
}
