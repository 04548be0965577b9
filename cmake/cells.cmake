# What users' cells are compiled from when they are first used: the driver's headers, next to the extension that they were
# built into, and the flags of its kernels, so that both come from this build.
set(include_folder fastseq/include)
set(headers rnn_*.h cell_*.h dots.h gemm.h math.h pack.h parallel.h profile.h runtime.h split.h vec.h cell_library.cpp)
foreach(pattern IN LISTS headers)
  file(GLOB found CONFIGURE_DEPENDS csrc/cpu/${pattern})
  install(FILES ${found} DESTINATION ${include_folder}/cpu)
endforeach()
install(FILES csrc/fastseq.h csrc/profile.h csrc/phases.def DESTINATION ${include_folder})
install(FILES csrc/cells/cells.def DESTINATION ${include_folder}/cells)

# A line with what all tiers share, then one for each.
string(REPLACE ";" " " shared "${fastseq_arithmetic_flags} ${fastseq_kernel_flags}")
get_property(tiers GLOBAL PROPERTY fastseq_tier_flags)
set(flags_file ${CMAKE_CURRENT_BINARY_DIR}/cell_flags.txt)
file(CONFIGURE OUTPUT ${flags_file} @ONLY CONTENT
     "all -std=gnu++@CMAKE_CXX_STANDARD@ @CMAKE_CXX_FLAGS_RELEASE@ -fPIC -fvisibility=hidden @shared@\n@tiers@")
install(FILES ${flags_file} DESTINATION ${include_folder})
