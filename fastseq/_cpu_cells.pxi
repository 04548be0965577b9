# Users' cells: libraries that are compiled and loaded while the process runs. Included by _cpu.pyx.

# Kernels of the number FASTSEQ_CELL_COUNT and up; they stay for the process's life.
cdef vector[const fastseq_cell_library*] cell_libraries


def load_cell(str path, str isa, int dtype):
    """Load a library that csrc/cpu/cell_library.cpp was compiled into: the number that stands for its kernels.

    ImportError: it cannot be loaded, or was made for something else than `isa` and `dtype`.
    """
    cdef char reason[1024]
    cdef bytes name = path.encode()
    cdef const fastseq_cell_library* library = fastseq_cell_open(name, reason, sizeof(reason))
    if library == NULL:
        raise ImportError(reason.decode(errors="replace"))
    if library.isa.decode() != isa or library.dtype != dtype:
        raise ImportError(f"{path} is for tier {library.isa.decode()} and dtype {library.dtype}, not {isa} and {dtype}")
    cell_libraries.push_back(library)
    return FASTSEQ_CELL_COUNT + <int>cell_libraries.size() - 1


cdef inline fastseq_rnn_forward_function forward_of(int cell, int dtype) noexcept:
    return (active.rnn_forward[cell][dtype] if cell < FASTSEQ_CELL_COUNT
            else cell_libraries[cell - FASTSEQ_CELL_COUNT].forward)


cdef inline fastseq_rnn_backward_function backward_of(int cell, int dtype) noexcept:
    return (active.rnn_backward[cell][dtype] if cell < FASTSEQ_CELL_COUNT
            else cell_libraries[cell - FASTSEQ_CELL_COUNT].backward)


cdef inline fastseq_rnn_reserve_function reserve_bytes_of(int cell, int dtype) noexcept:
    return (active.rnn_reserve_bytes[cell][dtype] if cell < FASTSEQ_CELL_COUNT
            else cell_libraries[cell - FASTSEQ_CELL_COUNT].reserve_bytes)
