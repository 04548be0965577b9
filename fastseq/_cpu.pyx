# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""CPU kernels: takes tensors' addresses, fills the argument structs, releases the GIL, calls. No maths, no checks.

Every tensor argument is a torch tensor or None (a null pointer). `dtype` is 0 for float32 and 1 for float64.
"""

from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid
from libc.math cimport sqrt
from libc.stdint cimport int64_t, uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from libcpp.vector cimport vector

from fastseq._core cimport (
    FASTSEQ_CELL_COUNT,
    FASTSEQ_PHASE_COUNT,
    fastseq_attention_backward,
    fastseq_attention_forward,
    fastseq_attention_shape,
    fastseq_cell_library,
    fastseq_cell_name,
    fastseq_cell_open,
    fastseq_heads,
    fastseq_isa_count,
    fastseq_isa_name,
    fastseq_isa_usable,
    fastseq_kernel_table,
    fastseq_linear_backward,
    fastseq_linear_forward,
    fastseq_linear_shape,
    fastseq_matrix,
    fastseq_max_threads,
    fastseq_norm_backward,
    fastseq_norm_forward,
    fastseq_norm_shape,
    fastseq_norm_statistics,
    fastseq_openmp_library,
    fastseq_phase_name,
    fastseq_profile,
    fastseq_profile_call,
    fastseq_profile_free,
    fastseq_profile_start,
    fastseq_profile_stop,
    fastseq_profile_thread,
    fastseq_rnn_backward,
    fastseq_rnn_backward_function,
    fastseq_rnn_forward,
    fastseq_rnn_forward_function,
    fastseq_rnn_reserve_function,
    fastseq_rnn_shape,
    fastseq_rnn_weight_gradients,
    fastseq_rnn_weights,
    fastseq_rows,
    fastseq_scores,
    fastseq_sequence,
    fastseq_table,
)
from fastseq._dlpack cimport DLPACK_CPU, DLPACK_FLOAT, DLPackExchangeAPI, DLTensor

cdef const fastseq_kernel_table* active = fastseq_table(0)

CELLS = {fastseq_cell_name(i).decode(): i for i in range(FASTSEQ_CELL_COUNT)}
include "_cpu_cells.pxi"

UNARY = {"exp": 0, "tanh": 1, "sigmoid": 2, "gelu": 3, "gelu_tanh": 4, "silu": 5}


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


def memory_gbytes(str kind, int64_t bytes_per_thread, int threads, double seconds):
    """GB/s at which `threads` threads "read" an array each or "copy" one half of it onto the other, again and again."""
    cdef double result
    cdef int copies = kind == "copy"
    if not copies and kind != "read":
        raise ValueError(f"kind must be 'read' or 'copy', got {kind!r}")
    if bytes_per_thread < 1024 or threads < 1:
        raise ValueError(f"bytes_per_thread must be at least 1024 and threads at least 1, got {bytes_per_thread}, {threads}")
    with nogil:
        result = active.memory_gbytes(copies, bytes_per_thread, threads, seconds)
    if result < 0:
        raise MemoryError(f"memory_gbytes: no memory for {threads} times {bytes_per_thread} bytes")
    return result


def unary(int function, int dtype, input, output):
    """One of the elementwise functions of `UNARY` over contiguous tensors of the same length."""
    cdef const void* source = address(input)
    cdef void* target = address(output)
    cdef int64_t count = input.numel()
    with nogil:
        active.unary[function][dtype](source, target, count)


cdef inline void* address(object tensor) except? NULL:
    if tensor is None:
        return NULL
    cdef void* data = <void*><uintptr_t>tensor.data_ptr()
    # A wrapper around other tensors, say: to a kernel NULL is an argument that was not given.
    if data == NULL and tensor.numel():
        raise RuntimeError(f"expected a tensor with memory of its own, got {type(tensor).__name__}")
    return data


cdef inline void set_matrix(fastseq_matrix* matrix, object tensor) except *:
    matrix.data = address(tensor)
    matrix.row_stride = 0 if tensor is None else tensor.stride(0)


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
    return reserve_bytes_of(cell, dtype)(rows, hidden_size, projection_size, directions)


def rnn_forward(int cell, int dtype, int threads, tuple sizes, x, tuple x_strides, y, tuple y_strides, h0, c0, h_n, c_n,
                weights, bint biases, reserve, batch_sizes, row_order, bint packed):
    """One layer forward. `cell` is a number of `CELLS` or from `load_cell`, `sizes` is (T, B, I, H, P, D); strides are
    (step, row) in elements."""
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
    cdef fastseq_rnn_forward_function kernel = forward_of(cell, dtype)
    with nogil:
        status = kernel(&call)
    if status:
        raise MemoryError("rnn_forward: no memory for the kernel's workspace")


def rnn_backward(int cell, int dtype, int threads, tuple sizes, x, tuple x_strides, grad_y, tuple grad_y_strides,
                 grad_x, tuple grad_x_strides, h0, c0, grad_h_n, grad_c_n, grad_h0, grad_c0,
                 weights, grad_weights, bint biases, reserve, batch_sizes, row_order, bint packed):
    """One layer backward. Gradients that are None are not computed (outputs) or count as zero (inputs)."""
    cdef fastseq_rnn_backward call
    cdef fastseq_rnn_weights targets[2]
    cdef int status, d
    set_shape(&call.shape, sizes, batch_sizes, row_order, packed, threads)
    set_sequence(&call.x, x, x_strides)
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
    cdef fastseq_rnn_backward_function kernel = backward_of(cell, dtype)
    with nogil:
        status = kernel(&call)
    if status:
        raise MemoryError("rnn_backward: no memory for the kernel's workspace")


# --- The short way for one step or one plain layer. Attribute by attribute, checking eight tensors from Python costs more
# than the step itself; the exchange table of newer torch releases answers for a tensor in one C call.

cdef const DLPackExchangeAPI* exchange = NULL
cdef object Tensor = None
cdef object Parameter = None
cdef object empty_like = None
cdef object float64 = None
cdef object is_grad_enabled = None
cdef object thread_count = None
cdef dict plain_cells = {}


def connect(capsule, tensor_type, parameter_type, empty_like_function, float64_type, is_grad_enabled_function,
            thread_count_function, dict cells):
    """Make the short ways available. `capsule` is torch.Tensor.__dlpack_c_exchange_api__; `cells` is name -> (index of the
    kernels, gates, has a cell state)."""
    global exchange, Tensor, Parameter, empty_like, float64, is_grad_enabled, thread_count, plain_cells
    if not PyCapsule_IsValid(capsule, b"dlpack_exchange_api"):
        return
    Tensor, Parameter, empty_like, float64 = tensor_type, parameter_type, empty_like_function, float64_type
    is_grad_enabled, thread_count, plain_cells = is_grad_enabled_function, thread_count_function, cells
    table = <const DLPackExchangeAPI*>PyCapsule_GetPointer(capsule, b"dlpack_exchange_api")
    if table.version.major == 1:
        exchange = table


cdef object dispatch_modes = None
cdef object profiler = None
cdef object is_any_autocast_enabled = None
cdef object tracing_state = None
cdef object are_transforms_active = None
cdef object forward_ad = None


def connect_observers(dispatch_modes_function, profiler_module, is_any_autocast_enabled_function, tracing_state_function,
                      are_transforms_active_function, forward_ad_module):
    """What `is_observed` asks: torch's functions and modules of these names."""
    global dispatch_modes, profiler, is_any_autocast_enabled, tracing_state, are_transforms_active, forward_ad
    dispatch_modes, profiler, is_any_autocast_enabled = dispatch_modes_function, profiler_module, is_any_autocast_enabled_function
    tracing_state, are_transforms_active = tracing_state_function, are_transforms_active_function
    forward_ad = forward_ad_module


cpdef bint is_observed() except -1:
    """As `fastseq._ops.shared.is_observed`."""
    return (<long>dispatch_modes() > 0 or profiler._is_profiler_enabled or is_any_autocast_enabled()
            or tracing_state() is not None or are_transforms_active() or <long>forward_ad._current_level >= 0)


cdef inline bint is_negated(object tensor) except -1:
    """Memory holds the negated values."""
    return tensor is not None and tensor.is_neg()


cdef inline bint describe(object tensor, DLTensor* out, int ndim, int bits) except -1:
    """Fill `out`; true for a dense CPU tensor of that rank and float width and of exactly torch's own types."""
    if type(tensor) is not Tensor and type(tensor) is not Parameter:
        return False
    try:
        exchange.tensor_from_py_object(<void*>tensor, out)
    except Exception:
        return False  # no dense memory behind it: meta, sparse and the like
    if (out.device.device_type != DLPACK_CPU or out.dtype.code != DLPACK_FLOAT or out.dtype.bits != bits
            or out.dtype.lanes != 1 or out.ndim != ndim):
        return False
    cdef int64_t expected = 1
    cdef int i
    for i in range(ndim - 1, -1, -1):
        if out.shape[i] != 1 and out.strides[i] != expected:
            return False
        expected *= out.shape[i]
    return expected > 0


cdef inline char* start(DLTensor* tensor) noexcept:
    return <char*>tensor.data + tensor.byte_offset


def plain_layer(str cell, input, hx, cx, weights, bint batch_first):
    """One direction with biases over dense tensors, without gradients and with nobody watching: (output, h_n, c_n).

    None when anything is not as plain as that, or wrong: the caller's general way then finds out what and says so.
    """
    cdef int index, gates
    cdef bint has_cell
    cdef fastseq_rnn_forward call
    cdef DLTensor x, h, c, w_ih, w_hh, b_ih, b_hh
    cdef int bits, status
    cdef int64_t steps, batch, features, hidden, rows
    if (exchange == NULL or len(weights) != 4 or is_grad_enabled() or is_observed() or is_negated(input) or is_negated(hx)
            or is_negated(cx)):
        return None
    index, gates, has_cell = plain_cells[cell]
    bits = 64 if input.dtype is float64 else 32
    if not describe(input, &x, 3, bits):
        return None
    if batch_first:
        batch, steps = x.shape[0], x.shape[1]
    else:
        steps, batch = x.shape[0], x.shape[1]
    features = x.shape[2]
    if not describe(weights[0], &w_ih, 2, bits) or not describe(weights[1], &w_hh, 2, bits):
        return None
    if not describe(weights[2], &b_ih, 1, bits) or not describe(weights[3], &b_hh, 1, bits):
        return None
    hidden = w_hh.shape[1]
    rows = gates * hidden
    if (w_ih.shape[0] != rows or w_ih.shape[1] != features or w_hh.shape[0] != rows or b_ih.shape[0] != rows
            or b_hh.shape[0] != rows):
        return None
    call.initial_hidden = call.initial_cell = NULL
    if hx is not None:
        if not describe(hx, &h, 3, bits) or h.shape[0] != 1 or h.shape[1] != batch or h.shape[2] != hidden:
            return None
        call.initial_hidden = start(&h)
    if cx is not None:
        if not describe(cx, &c, 3, bits) or c.shape[0] != 1 or c.shape[1] != batch or c.shape[2] != hidden:
            return None
        call.initial_cell = start(&c)

    # A tensor like one that is there costs half of one from sizes.
    output = empty_like(hx) if hx is not None and steps == 1 and (batch == 1 or not batch_first) else input.new_empty(
        (batch, steps, hidden) if batch_first else (steps, batch, hidden))
    h_n = empty_like(hx) if hx is not None else input.new_empty((1, batch, hidden))
    c_n = None
    if has_cell:
        c_n = empty_like(h_n)
    call.shape.steps, call.shape.batch, call.shape.input_size = steps, batch, features
    call.shape.hidden_size, call.shape.projection_size, call.shape.directions = hidden, 0, 1
    call.shape.batch_sizes = call.shape.row_order = NULL
    call.shape.packed = 0
    call.shape.threads = thread_count()
    call.x.data = start(&x)
    call.x.step_stride, call.x.row_stride = (features, steps * features) if batch_first else (batch * features, features)
    call.y.data = address(output)
    call.y.step_stride, call.y.row_stride = (hidden, steps * hidden) if batch_first else (batch * hidden, hidden)
    call.final_hidden = address(h_n)
    call.final_cell = address(c_n)
    call.reserve = NULL
    call.weights[0].input = start(&w_ih)
    call.weights[0].hidden = start(&w_hh)
    call.weights[0].input_bias = start(&b_ih)
    call.weights[0].hidden_bias = start(&b_hh)
    call.weights[0].projection = NULL
    cdef int dtype = bits == 64
    with nogil:
        status = active.rnn_forward[index][dtype](&call)
    if status:
        raise MemoryError("rnn_forward: no memory for the kernel's workspace")
    return output, h_n, c_n


include "_cpu_attention.pxi"
include "_cpu_linear.pxi"
include "_cpu_norm.pxi"
include "_cpu_decoding.pxi"
include "_cpu_profile.pxi"
