# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""CPU kernels: takes tensors' addresses, fills the argument structs, releases the GIL, calls. No maths, no checks.

Every tensor argument is a torch tensor or None (a null pointer). `dtype` is 0 for float32 and 1 for float64.
"""

from libc.stdint cimport int32_t, int64_t, uintptr_t
from libc.string cimport memset

from fastseq._core cimport (
    FASTSEQ_CELL_COUNT,
    fastseq_cell_name,
    fastseq_isa_count,
    fastseq_isa_name,
    fastseq_isa_usable,
    fastseq_kernel_table,
    fastseq_max_threads,
    fastseq_openmp_library,
    fastseq_rnn_backward,
    fastseq_rnn_forward,
    fastseq_rnn_shape,
    fastseq_rnn_weight_gradients,
    fastseq_rnn_weights,
    fastseq_sequence,
    fastseq_table,
)

cdef const fastseq_kernel_table* active = fastseq_table(0)

CELLS = {fastseq_cell_name(i).decode(): i for i in range(FASTSEQ_CELL_COUNT)}
UNARY = {"exp": 0, "tanh": 1, "sigmoid": 2}


def isa_built():
    """Names of the instruction-set tiers in this build, from the plainest up."""
    return [fastseq_isa_name(i).decode() for i in range(fastseq_isa_count())]


def isa_usable():
    """Those of `isa_built` that this processor runs."""
    return [fastseq_isa_name(i).decode() for i in range(fastseq_isa_count()) if fastseq_isa_usable(i)]


def isa():
    """The tier whose kernels are called."""
    return active.isa.decode()


def set_isa(str name):
    """Call the kernels of another tier. ValueError for one that is unknown or that this processor lacks."""
    global active
    for i in range(fastseq_isa_count()):
        if fastseq_isa_name(i).decode() == name:
            if not fastseq_isa_usable(i):
                raise ValueError(f"isa must be one that this processor runs: expected one of {isa_usable()}, got {name!r}")
            active = fastseq_table(i)
            return
    raise ValueError(f"isa must be one of {isa_built()}, got {name!r}")


def openmp_library():
    """Path of the OpenMP runtime that the kernels share with torch, or None."""
    path = fastseq_openmp_library()
    return path.decode() if path != NULL else None


def max_threads():
    """Threads the OpenMP runtime would give to a parallel region."""
    return fastseq_max_threads()


def fma_gflops(int dtype, int threads, double seconds):
    """Multiply-add peak in GFLOP/s of the active tier, all threads together."""
    cdef double result
    with nogil:
        result = active.fma_gflops[dtype](threads, seconds)
    return result


def unary(int function, int dtype, input, output):
    """Elementwise exp, tanh or sigmoid over contiguous tensors of the same length."""
    cdef const void* source = address(input)
    cdef void* target = address(output)
    cdef int64_t count = input.numel()
    with nogil:
        active.unary[function][dtype](source, target, count)


cdef inline void* address(object tensor) except? NULL:
    if tensor is None:
        return NULL
    return <void*><uintptr_t>tensor.data_ptr()


cdef inline void set_shape(fastseq_rnn_shape* shape, tuple sizes, object batch_sizes, object row_order, bint packed,
                           int threads) except *:
    shape.steps, shape.batch, shape.input_size, shape.hidden_size, shape.projection_size, shape.directions = sizes
    shape.batch_sizes = <const int64_t*>address(batch_sizes)
    shape.row_order = <const int64_t*>address(row_order)
    shape.packed = packed
    shape.threads = threads


cdef inline void set_sequence(fastseq_sequence* sequence, object tensor, tuple strides) except *:
    sequence.data = address(tensor)
    sequence.step_stride, sequence.row_stride = strides


cdef inline void set_weights(fastseq_rnn_weights* target, object weights, int directions, bint biases,
                             bint projection) except *:
    cdef int i = 0, d
    for d in range(directions):
        target[d].input = address(weights[i])
        target[d].hidden = address(weights[i + 1])
        i += 2
        target[d].input_bias = NULL
        target[d].hidden_bias = NULL
        target[d].projection = NULL
        if biases:
            target[d].input_bias = address(weights[i])
            target[d].hidden_bias = address(weights[i + 1])
            i += 2
        if projection:
            target[d].projection = address(weights[i])
            i += 1


def rnn_reserve_bytes(int cell, int dtype, int64_t rows, int64_t hidden_size, int64_t projection_size,
                      int64_t directions):
    """Size of what `rnn_forward` keeps for `rnn_backward`; `rows` is the number of (step, sequence) pairs."""
    return active.rnn_reserve_bytes[cell][dtype](rows, hidden_size, projection_size, directions)


def rnn_forward(int cell, int dtype, int threads, tuple sizes, x, tuple x_strides, y, tuple y_strides, h0, c0, h_n, c_n,
                weights, bint biases, reserve, batch_sizes, row_order, bint packed):
    """One layer forward. `sizes` is (T, B, I, H, P, D); strides are (step, row) in elements."""
    cdef fastseq_rnn_forward call
    cdef int status
    set_shape(&call.shape, sizes, batch_sizes, row_order, packed, threads)
    set_sequence(&call.x, x, x_strides)
    set_sequence(&call.y, y, y_strides)
    call.initial_hidden = address(h0)
    call.initial_cell = address(c0)
    call.final_hidden = address(h_n)
    call.final_cell = address(c_n)
    call.reserve = address(reserve)
    set_weights(call.weights, weights, call.shape.directions, biases, call.shape.projection_size > 0)
    with nogil:
        status = active.rnn_forward[cell][dtype](&call)
    if status:
        raise MemoryError("rnn_forward: no memory for the kernel's workspace")


def rnn_backward(int cell, int dtype, int threads, tuple sizes, x, tuple x_strides, y, tuple y_strides, grad_y,
                 tuple grad_y_strides, grad_x, tuple grad_x_strides, h0, c0, grad_h_n, grad_c_n, grad_h0, grad_c0,
                 weights, grad_weights, bint biases, reserve, batch_sizes, row_order, bint packed):
    """One layer backward. Gradients that are None are not computed (outputs) or count as zero (inputs)."""
    cdef fastseq_rnn_backward call
    cdef fastseq_rnn_weights targets[2]
    cdef int status, d
    set_shape(&call.shape, sizes, batch_sizes, row_order, packed, threads)
    set_sequence(&call.x, x, x_strides)
    set_sequence(&call.y, y, y_strides)
    set_sequence(&call.grad_y, grad_y, grad_y_strides)
    set_sequence(&call.grad_x, grad_x, grad_x_strides)
    call.initial_hidden = address(h0)
    call.initial_cell = address(c0)
    call.grad_final_hidden = address(grad_h_n)
    call.grad_final_cell = address(grad_c_n)
    call.grad_initial_hidden = address(grad_h0)
    call.grad_initial_cell = address(grad_c0)
    call.reserve = address(reserve)
    set_weights(call.weights, weights, call.shape.directions, biases, call.shape.projection_size > 0)
    set_weights(targets, grad_weights, call.shape.directions, biases, call.shape.projection_size > 0)
    for d in range(call.shape.directions):
        call.grad_weights[d].input = <void*>targets[d].input
        call.grad_weights[d].hidden = <void*>targets[d].hidden
        call.grad_weights[d].input_bias = <void*>targets[d].input_bias
        call.grad_weights[d].hidden_bias = <void*>targets[d].hidden_bias
        call.grad_weights[d].projection = <void*>targets[d].projection
    with nogil:
        status = active.rnn_backward[cell][dtype](&call)
    if status:
        raise MemoryError("rnn_backward: no memory for the kernel's workspace")
