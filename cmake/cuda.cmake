# libfastseq_cuda: a second, optional library beside the extension, loaded when a CUDA tensor arrives (fastseq/_cuda_library.py).
#
#   FASTSEQ_CUDA                 ON: build it, an error without nvcc. OFF: don't. AUTO, the default: as OFF, for as long as the
#                                kernels have never run on a device; then AUTO is to mean ON where there is nvcc.
#   FASTSEQ_CUDA_ARCHITECTURES   CMake's list: "90a-real" (default), "80-real;90-real;90-virtual", ...
#
# Both are taken from the environment, too (pyproject.toml). No libtorch, no cuBLAS, the CUDA runtime linked statically.

set(FASTSEQ_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
set(FASTSEQ_CUDA_ARCHITECTURES 90a-real CACHE STRING "Architectures the CUDA kernels are compiled for")
if(NOT FASTSEQ_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "FASTSEQ_CUDA must be AUTO, ON or OFF, got '${FASTSEQ_CUDA}'")
endif()
if(NOT FASTSEQ_CUDA STREQUAL "ON")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(FATAL_ERROR "FASTSEQ_CUDA=ON needs nvcc: none was found in PATH or CUDACXX")
endif()
set(CMAKE_CUDA_ARCHITECTURES ${FASTSEQ_CUDA_ARCHITECTURES})
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3")

add_library(fastseq_cuda_flags INTERFACE)
# The cells' constexpr functions are called from device code.
target_compile_options(fastseq_cuda_flags INTERFACE --expt-relaxed-constexpr -Xptxas=-v -Xcompiler=-Wall,-Wextra)

string(REPLACE ";" " " architectures "${FASTSEQ_CUDA_ARCHITECTURES}")
add_library(fastseq_cuda SHARED csrc/cuda/dispatch.cu)
target_compile_definitions(fastseq_cuda PRIVATE "FASTSEQ_CUDA_ARCHITECTURES=\"${architectures}\"")
target_link_libraries(fastseq_cuda PRIVATE fastseq_cuda_flags)
target_link_options(fastseq_cuda PRIVATE LINKER:--exclude-libs,ALL)

# One object per kind of kernel and storage type from the same source.
function(fastseq_add_storage type name)
  foreach(kind rnn attention)
    add_library(cuda_${kind}_${name} OBJECT csrc/cuda/${kind}.cu)
    target_compile_definitions(cuda_${kind}_${name} PRIVATE FS_STORAGE=${type} FS_STORAGE_NAME=${name})
    target_link_libraries(cuda_${kind}_${name} PRIVATE fastseq_cuda_flags)
    target_sources(fastseq_cuda PRIVATE $<TARGET_OBJECTS:cuda_${kind}_${name}>)
  endforeach()
endfunction()
fastseq_add_storage(float float32)
fastseq_add_storage(double float64)
fastseq_add_storage(__nv_bfloat16 bfloat16)
fastseq_add_storage(__half float16)

install(TARGETS fastseq_cuda LIBRARY DESTINATION fastseq)
