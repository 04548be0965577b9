# --- Linear layers. Included by _cpu.pyx.
#
# Matrices are 2-D with a unit stride along their columns; weights and biases are dense.


cdef void set_linear_shape(fastseq_linear_shape* shape, int64_t rows, int64_t inputs, int64_t outputs, int activation,
                           double dropout, seed, int threads) except *:
    shape.rows, shape.inputs, shape.outputs = rows, inputs, outputs
    shape.activation, shape.threads, shape.dropout = activation, threads, dropout
    shape.dropout_seed = shape.dropout_offset = 0
    if seed is not None and dropout > 0:
        key, offset = seed.tolist()
        shape.dropout_seed = <uint64_t><int64_t>key
        shape.dropout_offset = <uint64_t><int64_t>offset


def linear_forward(int dtype, int threads, input, weight, bias, residual, output, pre_activation, int activation,
                   double dropout, seed):
    """Linear forward into `output` and, unless it is None, `pre_activation`."""
    cdef fastseq_linear_forward call
    cdef int status
    set_linear_shape(&call.shape, input.shape[0], input.shape[1], weight.shape[0], activation, dropout, seed, threads)
    set_matrix(&call.x, input)
    set_matrix(&call.residual, residual)
    set_matrix(&call.output, output)
    call.weight = address(weight)
    call.bias = address(bias)
    call.pre_activation = address(pre_activation)
    with nogil:
        status = active.linear_forward[dtype](&call)
    if status:
        raise MemoryError("linear_forward: no memory for the kernel's workspace")


def linear_backward(int dtype, int threads, grad_output, input, weight, pre_activation, int activation, double dropout, seed,
                    grad_input, grad_weight, grad_bias):
    """Linear backward; gradients that are None are not computed."""
    cdef fastseq_linear_backward call
    cdef int status
    cdef int64_t inputs = 1  # with neither of the two, the bias is all that is asked for
    if input is not None:
        inputs = input.shape[1]
    elif weight is not None:
        inputs = weight.shape[1]
    set_linear_shape(&call.shape, grad_output.shape[0], inputs, grad_output.shape[1], activation, dropout, seed, threads)
    set_matrix(&call.grad_output, grad_output)
    set_matrix(&call.x, input)
    set_matrix(&call.grad_x, grad_input)
    call.weight = address(weight)
    call.pre_activation = address(pre_activation)
    call.grad_weight = address(grad_weight)
    call.grad_bias = address(grad_bias)
    with nogil:
        status = active.linear_backward[dtype](&call)
    if status:
        raise MemoryError("linear_backward: no memory for the kernel's workspace")


def element_dropout_mask(int64_t rows, int64_t columns, double probability, seed, keep):
    """Write into `keep`, (rows, columns) bytes, which elements of a matrix the kernels' dropout keeps."""
    cdef fastseq_linear_shape shape
    set_linear_shape(&shape, rows, 0, columns, 0, probability, seed, 1)
    cdef uint8_t* target = <uint8_t*>address(keep)
    with nogil:
        active.element_dropout_mask(rows, columns, probability, shape.dropout_seed, shape.dropout_offset, target)


cdef inline bint is_recorded(object tensor) except -1:
    """Autograd records it or its memory is lazily negated: not for the short ways."""
    return tensor.requires_grad or tensor.is_neg()


cdef inline bint describe_rows(object tensor, DLTensor* out, fastseq_matrix* matrix, int64_t* rows) except -1:
    """Fill all; true for a float32 or float64 CPU tensor of torch's own types whose rows lie at one distance."""
    if type(tensor) is not Tensor and type(tensor) is not Parameter:
        return False
    try:
        exchange.tensor_from_py_object(<void*>tensor, out)
    except Exception:
        return False  # no dense memory behind it: meta, sparse and the like
    cdef int i, last = out.ndim - 1
    if (out.device.device_type != DLPACK_CPU or out.dtype.code != DLPACK_FLOAT or out.dtype.lanes != 1 or last < 0
            or (out.dtype.bits != 32 and out.dtype.bits != 64) or out.shape[last] == 0
            or (out.strides[last] != 1 and out.shape[last] != 1)):
        return False
    matrix.data = start(out)
    matrix.row_stride = out.shape[last]
    rows[0] = 1
    for i in range(last - 1, -1, -1):
        if out.shape[i] == 0:
            return False
        if out.shape[i] == 1:
            continue
        if rows[0] == 1:
            matrix.row_stride = out.strides[i]
        elif out.strides[i] != rows[0] * matrix.row_stride:
            return False
        rows[0] *= out.shape[i]
    return True


def plain_linear(int threads, input, weight, bias, int activation, residual):
    """dropout-free linear without gradients: the output.

    None when anything is not as plain as that, or wrong: the caller's general way then finds out what and says so.
    """
    cdef fastseq_linear_forward call
    cdef DLTensor x, w, b, r
    cdef int64_t rows, residual_rows
    cdef int i, status, dtype
    if exchange == NULL or not describe_rows(input, &x, &call.x, &rows):
        return None
    if not describe(weight, &w, 2, x.dtype.bits) or w.shape[1] != x.shape[x.ndim - 1]:
        return None
    cdef int64_t outputs = w.shape[0]
    call.bias = NULL
    call.residual.data = NULL
    call.residual.row_stride = 0
    recording = is_grad_enabled()
    if recording and (is_recorded(input) or is_recorded(weight)):
        return None
    if bias is not None:
        if not describe(bias, &b, 1, x.dtype.bits) or b.shape[0] != outputs or (recording and is_recorded(bias)):
            return None
        call.bias = start(&b)
    if residual is not None:
        if (not describe_rows(residual, &r, &call.residual, &residual_rows) or r.ndim != x.ndim
                or r.dtype.bits != x.dtype.bits or r.shape[r.ndim - 1] != outputs
                or (recording and is_recorded(residual))):
            return None
        for i in range(x.ndim - 1):
            if r.shape[i] != x.shape[i]:
                return None
    if not recording and (input.is_neg() or weight.is_neg() or (bias is not None and bias.is_neg())
                          or (residual is not None and residual.is_neg())):
        return None
    # A tensor like one that is there costs half of one from sizes; it need not be dense, though, if that is not.
    if outputs == x.shape[x.ndim - 1] and call.x.row_stride == outputs:
        output = empty_like(input)
    elif residual is not None and call.residual.row_stride == outputs:
        output = empty_like(residual)
    else:
        output = input.new_empty([x.shape[i] for i in range(x.ndim - 1)] + [outputs])
    set_linear_shape(&call.shape, rows, w.shape[1], outputs, activation, 0, None, threads)
    call.x.row_stride = call.x.row_stride if rows > 1 else w.shape[1]
    call.output.data = address(output)
    call.output.row_stride = outputs
    call.weight = start(&w)
    call.pre_activation = NULL
    dtype = x.dtype.bits == 64
    with nogil:
        status = active.linear_forward[dtype](&call)
    if status:
        raise MemoryError("linear_forward: no memory for the kernel's workspace")
    return output
