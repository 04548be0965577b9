# --- Norms. Included by _cpu.pyx.
#
# Matrices are 2-D tensors with unit stride along their rows. `statistics` is (3, M) for layer norm, (1, M) for RMS norm.


cdef inline void set_statistics(fastseq_norm_statistics* target, object tensor, int64_t rows, int dtype) except *:
    cdef char* first = <char*>address(tensor)
    cdef int64_t row_bytes = rows * (8 if dtype else 4)
    target.inverse_deviation = first
    target.mean = target.mean_correction = NULL
    if tensor is not None and tensor.shape[0] == 3:
        target.mean = first + row_bytes
        target.mean_correction = first + 2 * row_bytes


cdef inline void set_norm_numbers(fastseq_norm_shape* shape, int threads, bint rms, double eps, double dropout_p,
                                  object seed) except *:
    memset(shape, 0, sizeof(shape[0]))
    shape.rms = rms
    shape.threads = threads
    shape.eps = eps
    if seed is not None and dropout_p > 0:
        shape.dropout = dropout_p
        key, offset = seed.tolist()
        shape.dropout_seed = <uint64_t><int64_t>key
        shape.dropout_offset = <uint64_t><int64_t>offset


def norm_forward(int dtype, int threads, bint rms, double eps, double dropout_p, seed, input, residual, weight, bias,
                 output, sum, statistics):
    """The norm of residual + dropout(input) and, unless they are None, that sum and what backward needs of its rows."""
    cdef fastseq_norm_forward call
    cdef int status
    set_norm_numbers(&call.shape, threads, rms, eps, dropout_p, seed)
    call.shape.rows, call.shape.features = input.shape
    set_matrix(&call.input, input)
    set_matrix(&call.residual, residual)
    call.weight = address(weight)
    call.bias = address(bias)
    set_matrix(&call.output, output)
    set_matrix(&call.sum, sum)
    set_statistics(&call.statistics, statistics, call.shape.rows, dtype)
    with nogil:
        status = active.norm_forward[dtype](&call)
    if status:
        raise MemoryError("norm_forward: no memory for the kernel's workspace")


def norm_backward(int dtype, int threads, bint rms, double dropout_p, seed, grad_output, grad_sum, x, weight,
                  statistics, grad_x, grad_input, grad_weight, grad_bias):
    """Norm backward; gradients that are None are not computed (results) or count as zero (`grad_sum`)."""
    cdef fastseq_norm_backward call
    cdef int status
    set_norm_numbers(&call.shape, threads, rms, 0.0, dropout_p, seed)
    call.shape.rows, call.shape.features = x.shape
    set_matrix(&call.grad_output, grad_output)
    set_matrix(&call.grad_sum, grad_sum)
    set_matrix(&call.x, x)
    call.weight = address(weight)
    set_statistics(&call.statistics, statistics, call.shape.rows, dtype)
    set_matrix(&call.grad_x, grad_x)
    set_matrix(&call.grad_input, grad_input)
    call.grad_weight = address(grad_weight)
    call.grad_bias = address(grad_bias)
    with nogil:
        status = active.norm_backward[dtype](&call)
    if status:
        raise MemoryError("norm_backward: no memory for the kernel's workspace")


cdef inline bint describe_floats(object tensor, DLTensor* out) except -1:
    """Fill `out`; true for a float32 or float64 CPU tensor of torch's own types, not lazily negated."""
    if type(tensor) is not Tensor and type(tensor) is not Parameter:
        return False
    try:
        exchange.tensor_from_py_object(<void*>tensor, out)
    except Exception:
        return False  # no dense memory behind it: meta, sparse and the like
    if (out.device.device_type != DLPACK_CPU or out.dtype.code != DLPACK_FLOAT or out.dtype.lanes != 1
            or (out.dtype.bits != 32 and out.dtype.bits != 64)):
        return False
    return not tensor.is_neg()


cdef inline bint describe_matrix(DLTensor* tensor, int dims, int64_t* rows, int64_t* features,
                                 fastseq_matrix* matrix) noexcept:
    """The tensor as a matrix whose rows are its last `dims` dimensions; false where that takes a copy."""
    cdef int64_t expected = 1
    cdef int i
    for i in range(tensor.ndim - 1, tensor.ndim - dims - 1, -1):
        if tensor.shape[i] != 1 and tensor.strides[i] != expected:
            return False
        expected *= tensor.shape[i]
    features[0] = matrix.row_stride = expected
    rows[0] = 1
    for i in range(tensor.ndim - dims - 1, -1, -1):
        if tensor.shape[i] == 1:
            continue
        if rows[0] == 1:
            matrix.row_stride = tensor.strides[i]
        elif tensor.strides[i] != matrix.row_stride * rows[0]:
            return False
        rows[0] *= tensor.shape[i]
    matrix.data = start(tensor)
    return rows[0] > 0 and features[0] > 0


cdef inline bint describe_affine(object parameter, DLTensor* like, int dims, const void** out) except -1:
    """The address of a weight or bias; false unless it is a dense tensor shaped as the rows of `like`, or None."""
    cdef DLTensor tensor
    cdef int64_t expected = 1
    cdef int i
    if parameter is None:
        out[0] = NULL
        return True
    if not describe_floats(parameter, &tensor) or tensor.ndim != dims or tensor.dtype.bits != like.dtype.bits:
        return False
    for i in range(dims - 1, -1, -1):
        if tensor.shape[i] != like.shape[like.ndim - dims + i] or (tensor.shape[i] != 1 and tensor.strides[i] != expected):
            return False
        expected *= tensor.shape[i]
    out[0] = start(&tensor)
    return True


cdef inline bint describe_like(object tensor, DLTensor* like, int dims, fastseq_matrix* matrix) except -1:
    """True for a tensor of that shape and dtype that is a matrix as it lies, and for None."""
    cdef DLTensor description
    cdef int64_t rows, features
    cdef int i
    if tensor is None:
        return True
    if (not describe_floats(tensor, &description) or description.ndim != like.ndim
            or description.dtype.bits != like.dtype.bits):
        return False
    for i in range(like.ndim):
        if description.shape[i] != like.shape[i]:
            return False
    return describe_matrix(&description, dims, &rows, &features, matrix)


cdef object forward_of_tensors(DLTensor* x, int threads, input, residual, weight, bias, int dims, double eps, bint rms,
                               double dropout_p, seed, bint want_sum, bint save):
    """(output, sum, statistics), of which the last two are None where not asked for; None where it takes a copy.

    `x` describes `input`, whose last `dims` dimensions are normalized together.
    """
    cdef fastseq_norm_forward call
    cdef int status, dtype
    cdef int64_t rows, features
    memset(&call, 0, sizeof(call))
    if not describe_matrix(x, dims, &rows, &features, &call.input):
        return None
    if not describe_affine(weight, x, dims, &call.weight) or not describe_affine(bias, x, dims, &call.bias):
        return None
    call.sum.row_stride = call.output.row_stride = features
    if not describe_like(residual, x, dims, &call.residual):
        return None
    # A tensor like one that is there costs half of one from sizes.
    cdef bint dense = rows == 1 or call.input.row_stride == features
    output = empty_like(input) if dense else input.new_empty(input.shape)
    call.output.data = address(output)
    sum = statistics = None
    if (want_sum or save) and (residual is not None or dropout_p > 0):
        sum = empty_like(output)
        call.sum.data = address(sum)
    dtype = x.dtype.bits == 64
    if save:
        statistics = input.new_empty((1 if rms else 3, rows))
        set_statistics(&call.statistics, statistics, rows, dtype)
    set_norm_numbers(&call.shape, threads, rms, eps, dropout_p, seed)
    call.shape.rows, call.shape.features = rows, features
    with nogil:
        status = active.norm_forward[dtype](&call)
    if status:
        raise MemoryError("norm_forward: no memory for the kernel's workspace")
    return output, sum, statistics


def plain_norm(input, residual, normalized_shape, weight, bias, eps, bint rms, bint want_sum):
    """A norm without dropout and without gradients: the result, or with `want_sum` (result, sum).

    False when only gradients stand in the way; None when anything else is not as plain as that, or wrong: the caller's
    general way then finds out what and says so.
    """
    cdef DLTensor x
    cdef fastseq_matrix matrix
    cdef const void* unused
    cdef int dims, i
    cdef int64_t rows, features
    if exchange == NULL or (type(normalized_shape) is not tuple and type(normalized_shape) is not list):
        return None
    if type(eps) is not float and (eps is not None or not rms):
        return None
    dims = len(normalized_shape)
    if not describe_floats(input, &x) or dims == 0 or dims > x.ndim or (want_sum and residual is None):
        return None
    for i in range(dims):
        size = normalized_shape[i]
        if type(size) is not int or size != x.shape[x.ndim - dims + i]:
            return None
    if is_grad_enabled() and (needs_grad(input) or needs_grad(residual) or needs_grad(weight) or needs_grad(bias)):
        if (describe_affine(weight, &x, dims, &unused) and describe_affine(bias, &x, dims, &unused)
                and describe_like(residual, &x, dims, &matrix) and describe_matrix(&x, dims, &rows, &features, &matrix)):
            return False
        return None
    if eps is None:
        eps = 2.220446049250313e-16 if x.dtype.bits == 64 else 1.1920928955078125e-07
    results = forward_of_tensors(&x, thread_count(), input, residual, weight, bias, dims, eps, rms, 0.0, None, want_sum, False)
    if results is None:
        return None
    return (results[0], results[1]) if want_sum else results[0]


cdef inline bint needs_grad(object tensor) except -1:
    return (type(tensor) is Tensor or type(tensor) is Parameter) and tensor.requires_grad


def dense_norm_forward(int threads, input, residual, weight, bias, int dims, double eps, bint rms, double dropout_p, seed,
                       bint want_sum, bint save):
    """(output, sum or None, statistics or None); None where a tensor would have to be copied first."""
    cdef DLTensor x
    if exchange == NULL or not describe_floats(input, &x):
        return None
    return forward_of_tensors(&x, threads, input, residual, weight, bias, dims, eps, rms, dropout_p, seed, want_sum, save)


def dense_norm_backward(int threads, grad_output, grad_sum, x, weight, seed, statistics, int dims, bint rms,
                        double dropout_p, needs):
    """(grad_x, grad_input, grad_weight, grad_bias), None where not needed; None where a copy is needed first."""
    cdef fastseq_norm_backward call
    cdef DLTensor description
    cdef int status, dtype
    cdef int64_t rows, features
    if exchange == NULL or not describe_floats(x, &description):
        return None
    memset(&call, 0, sizeof(call))
    if (not describe_matrix(&description, dims, &rows, &features, &call.x)
            or not describe_like(grad_output, &description, dims, &call.grad_output)
            or not describe_like(grad_sum, &description, dims, &call.grad_sum)
            or not describe_affine(weight, &description, dims, &call.weight)):
        return None
    dtype = description.dtype.bits == 64
    set_statistics(&call.statistics, statistics, rows, dtype)
    call.grad_x.row_stride = call.grad_input.row_stride = features
    cdef bint dense = rows == 1 or call.x.row_stride == features
    grad_x = grad_input = grad_weight = grad_bias = None
    if needs[0]:
        grad_x = empty_like(x) if dense else x.new_empty(x.shape)
    if needs[1]:
        grad_input = empty_like(x) if dense else x.new_empty(x.shape)
    if needs[2]:
        grad_weight = empty_like(weight)
    if needs[3]:
        grad_bias = x.new_empty(x.shape[x.dim() - dims:]) if weight is None else empty_like(weight)
    call.grad_x.data = address(grad_x)
    call.grad_input.data = address(grad_input)
    call.grad_weight = address(grad_weight)
    call.grad_bias = address(grad_bias)
    set_norm_numbers(&call.shape, threads, rms, 0.0, dropout_p, seed)
    call.shape.rows, call.shape.features = rows, features
    with nogil:
        status = active.norm_backward[dtype](&call)
    if status:
        raise MemoryError("norm_backward: no memory for the kernel's workspace")
    return grad_x, grad_input, grad_weight, grad_bias
