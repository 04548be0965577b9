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


cdef bint describe_linear(fastseq_linear_forward* call, DLTensor* x, input, weight, bias, residual) except -1:
    """Fill what `call` says of tensors that are there, and `x`; false where one does not fit or would have to be copied."""
    cdef DLTensor w, b, r
    cdef int64_t residual_rows
    cdef int i
    memset(call, 0, sizeof(call[0]))
    if exchange == NULL or not describe_rows(input, x, &call.x, &call.shape.rows):
        return False
    if not describe(weight, &w, 2, x.dtype.bits) or w.shape[1] != x.shape[x.ndim - 1]:
        return False
    call.weight = start(&w)
    call.shape.inputs, call.shape.outputs = w.shape[1], w.shape[0]
    if call.shape.rows == 1:
        call.x.row_stride = call.shape.inputs
    if bias is not None:
        if not describe(bias, &b, 1, x.dtype.bits) or b.shape[0] != call.shape.outputs:
            return False
        call.bias = start(&b)
    if residual is not None:
        if (not describe_rows(residual, &r, &call.residual, &residual_rows) or r.ndim != x.ndim
                or r.dtype.bits != x.dtype.bits or r.shape[r.ndim - 1] != call.shape.outputs):
            return False
        for i in range(x.ndim - 1):
            if r.shape[i] != x.shape[i]:
                return False
    return not (input.is_neg() or weight.is_neg() or (bias is not None and bias.is_neg())
                or (residual is not None and residual.is_neg()))


cdef object linear_of_tensors(fastseq_linear_forward* call, DLTensor* x, int threads, input, residual, int activation,
                       double dropout_p, seed, bint save):
    """(output, pre-activation or None) of a described call."""
    cdef int status, i, dtype = x.dtype.bits == 64
    cdef int64_t outputs = call.shape.outputs
    # A tensor like one that is there costs half of one from sizes; it need not be dense, though, if that is not.
    if outputs == x.shape[x.ndim - 1] and call.x.row_stride == outputs:
        output = empty_like(input)
    elif residual is not None and call.residual.row_stride == outputs:
        output = empty_like(residual)
    else:
        output = input.new_empty([x.shape[i] for i in range(x.ndim - 1)] + [outputs])
    z = input.new_empty((call.shape.rows, outputs)) if save else None
    set_linear_shape(&call.shape, call.shape.rows, call.shape.inputs, outputs, activation, dropout_p, seed, threads)
    call.output.data = address(output)
    call.output.row_stride = outputs
    call.pre_activation = address(z)
    with nogil:
        status = active.linear_forward[dtype](call)
    if status:
        raise MemoryError("linear_forward: no memory for the kernel's workspace")
    return output, z


def plain_linear(input, weight, bias, int activation, residual):
    """dropout-free linear without gradients: the output.

    False when only gradients stand in the way; None when anything else is not as plain as that, or wrong: the caller's
    general way then finds out what and says so.
    """
    cdef fastseq_linear_forward call
    cdef DLTensor x
    if not describe_linear(&call, &x, input, weight, bias, residual):
        return None
    if is_grad_enabled() and (input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
                              or (residual is not None and residual.requires_grad)):
        return False
    return linear_of_tensors(&call, &x, thread_count(), input, residual, activation, 0.0, None, False)[0]


def dense_linear_forward(int threads, input, weight, bias, residual, int activation, double dropout_p, seed, bint save):
    """(output, pre-activation or None); None where a tensor would have to be copied first."""
    cdef fastseq_linear_forward call
    cdef DLTensor x
    if not describe_linear(&call, &x, input, weight, bias, residual):
        return None
    return linear_of_tensors(&call, &x, threads, input, residual, activation, dropout_p, seed, save)


def dense_linear_backward(int threads, grad_output, input, weight, saved, int activation, double dropout_p, seed, needs):
    """(grad_input, grad_weight, grad_bias), None where not needed; None where a tensor would have to be copied first."""
    cdef fastseq_linear_backward call
    cdef DLTensor g, x, w, z
    cdef fastseq_matrix matrix
    cdef int64_t rows, other_rows
    cdef int status, i, dtype
    memset(&call, 0, sizeof(call))
    if exchange == NULL or not describe_rows(grad_output, &g, &call.grad_output, &rows) or grad_output.is_neg():
        return None
    dtype = g.dtype.bits == 64
    cdef int64_t outputs = g.shape[g.ndim - 1], inputs = 1  # with neither of the two, the bias is all that is asked for
    if rows == 1:
        call.grad_output.row_stride = outputs
    if weight is not None:
        if not describe(weight, &w, 2, g.dtype.bits) or w.shape[0] != outputs or weight.is_neg():
            return None
        inputs = w.shape[1]
        call.weight = start(&w)
    if input is not None:
        if (not describe_rows(input, &x, &call.x, &other_rows) or other_rows != rows or x.dtype.bits != g.dtype.bits
                or input.is_neg()):
            return None
        inputs = x.shape[x.ndim - 1]
        if rows == 1:
            call.x.row_stride = inputs
    if saved is not None:
        # A ReLU's output stands in for the pre-activation.
        if (not describe_rows(saved, &z, &matrix, &other_rows) or other_rows != rows or z.shape[z.ndim - 1] != outputs
                or z.dtype.bits != g.dtype.bits or (rows > 1 and matrix.row_stride != outputs) or saved.is_neg()):
            return None
        call.pre_activation = start(&z)
    grad_input = grad_weight = grad_bias = None
    if needs[0]:
        # Gradients are dense; so is a tensor like a dense one.
        if input is not None and call.x.row_stride == inputs:
            grad_input = empty_like(input)
        else:
            grad_input = grad_output.new_empty([g.shape[i] for i in range(g.ndim - 1)] + [inputs])
    if needs[1]:
        grad_weight = grad_output.new_empty((outputs, inputs)) if weight is None else empty_like(weight)
    if needs[2]:
        grad_bias = grad_output.new_empty((outputs,))
    set_linear_shape(&call.shape, rows, inputs, outputs, activation, dropout_p, seed, threads)
    call.grad_x.data = address(grad_input)
    call.grad_x.row_stride = inputs
    call.grad_weight = address(grad_weight)
    call.grad_bias = address(grad_bias)
    if grad_weight is None:
        call.x.data = NULL
    if grad_input is None:
        call.weight = NULL
    with nogil:
        status = active.linear_backward[dtype](&call)
    if status:
        raise MemoryError("linear_backward: no memory for the kernel's workspace")
    return grad_input, grad_weight, grad_bias
