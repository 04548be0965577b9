# --- Attention. Included by _cpu.pyx.
#
# `sizes` is (B, Hq, Hkv, Sq, Skv, E, Ev); `terms` and `options` are the tuples of fastseq/_attention.py. Strides are read
# off the tensors; where a table is broadcast, its size is 1 and the kernels' stride 0.


cdef inline void set_heads(fastseq_heads* heads, object tensor) except *:
    """[B, heads, rows, size], or [rows, heads, size] of all sequences one after the other."""
    heads.data = address(tensor)
    if tensor is None:
        return
    cdef tuple strides = tensor.stride()
    if len(strides) == 4:
        heads.batch_stride, heads.head_stride, heads.row_stride = strides[0], strides[1], strides[2]
    else:
        heads.batch_stride, heads.head_stride, heads.row_stride = 0, strides[1], strides[0]


cdef inline void set_rows(fastseq_rows* rows, object tensor) except *:
    """[B, heads, rows] or [heads, rows], unit stride along the rows."""
    rows.data = address(tensor)
    if tensor is None:
        return
    cdef tuple strides = tensor.stride()
    if len(strides) == 3:
        rows.batch_stride, rows.head_stride = strides[0], strides[1]
    else:
        rows.batch_stride, rows.head_stride = 0, strides[0]


cdef inline int64_t broadcast_stride(object size, object stride) except? -1:
    return 0 if size == 1 else stride


cdef inline void set_scores(fastseq_scores* scores, object tensor) except *:
    """[B or 1, heads or 1, Sq or 1, Skv or 1]."""
    scores.data = address(tensor)
    if tensor is None:
        return
    cdef object shape = tensor.shape
    cdef tuple strides = tensor.stride()
    scores.batch_stride = broadcast_stride(shape[0], strides[0])
    scores.head_stride = broadcast_stride(shape[1], strides[1])
    scores.query_stride = broadcast_stride(shape[2], strides[2])
    scores.key_stride = broadcast_stride(shape[3], strides[3])


cdef int64_t longest(const int64_t* starts, int64_t count) noexcept:
    cdef int64_t i, most = 0
    for i in range(count):
        if starts[i + 1] - starts[i] > most:
            most = starts[i + 1] - starts[i]
    return most


cdef void set_attention_shape(fastseq_attention_shape* shape, tuple sizes, terms, options,
                              int threads) except *:
    memset(shape, 0, sizeof(shape[0]))
    (shape.batch, shape.heads, shape.kv_heads, shape.queries, shape.keys, shape.key_size, shape.value_size) = sizes
    (bias, mask, key_padding_mask, query_lengths, key_lengths, query_starts, key_starts, block_table, alibi_slopes, sinks,
     seed) = terms
    (shape.window_left, shape.window_right, shape.bottom_right, shape.softcap, shape.dropout, shape.scale) = options
    shape.threads = threads
    shape.query_starts = <const int64_t*>address(query_starts)
    shape.key_starts = <const int64_t*>address(key_starts)
    shape.query_lengths = <const int64_t*>address(query_lengths)
    shape.key_lengths = <const int64_t*>address(key_lengths)
    if query_starts is not None:
        shape.queries = longest(shape.query_starts, shape.batch)
        shape.keys = longest(shape.key_starts, shape.batch)
    if block_table is not None:
        shape.block_table = <const int64_t*>address(block_table)
        shape.blocks_per_sequence = block_table.shape[1]
        shape.block_size = shape.keys // shape.blocks_per_sequence
    if seed is not None and shape.dropout > 0:
        key, offset = seed.tolist()
        shape.dropout_seed = <uint64_t><int64_t>key
        shape.dropout_offset = <uint64_t><int64_t>offset
    set_scores(&shape.bias, bias)
    set_scores(&shape.mask, mask)
    if key_padding_mask is not None:
        shape.key_padding = <const uint8_t*>address(key_padding_mask)
        shape.key_padding_stride = key_padding_mask.stride(0)
    if alibi_slopes is not None:
        shape.alibi_slopes = address(alibi_slopes)
        shape.alibi_batch_stride = shape.heads if alibi_slopes.dim() == 2 else 0
    shape.sinks = address(sinks)


def attention_forward(int dtype, int threads, tuple sizes, query, key, value, terms, options, output, lse,
                      row_maximum, row_scale, weights, bint average_weights):
    """Attention forward; results that are None are not computed."""
    cdef fastseq_attention_forward call
    cdef int status
    set_attention_shape(&call.shape, sizes, terms, options, threads)
    set_heads(&call.query, query)
    set_heads(&call.key, key)
    set_heads(&call.value, value)
    set_heads(&call.output, output)
    set_rows(&call.lse, lse)
    set_rows(&call.row_maximum, row_maximum)
    set_rows(&call.row_scale, row_scale)
    call.average_weights = average_weights
    call.weights.data = address(weights)
    if weights is not None:
        strides = weights.stride()
        if average_weights:
            call.weights.batch_stride, call.weights.query_stride, call.weights.key_stride = strides
            call.weights.head_stride = 0
        else:
            (call.weights.batch_stride, call.weights.head_stride, call.weights.query_stride,
             call.weights.key_stride) = strides
    with nogil:
        status = active.attention_forward[dtype](&call)
    if status:
        raise MemoryError("attention_forward: no memory for the kernel's workspace")


def attention_backward(int dtype, int threads, tuple sizes, grad_output, grad_lse, query, key, value, terms,
                       options, output, row_maximum, row_scale, grad_query, grad_key, grad_value, grad_bias,
                       grad_sinks):
    """Attention backward; gradients that are None are not computed (results) or count as zero (arguments)."""
    cdef fastseq_attention_backward call
    cdef int status
    set_attention_shape(&call.shape, sizes, terms, options, threads)
    set_heads(&call.query, query)
    set_heads(&call.key, key)
    set_heads(&call.value, value)
    set_heads(&call.output, output)
    set_rows(&call.row_maximum, row_maximum)
    set_rows(&call.row_scale, row_scale)
    set_heads(&call.grad_output, grad_output)
    set_rows(&call.grad_lse, grad_lse)
    set_heads(&call.grad_query, grad_query)
    set_heads(&call.grad_key, grad_key)
    set_heads(&call.grad_value, grad_value)
    set_scores(&call.grad_bias, grad_bias)
    call.grad_bias_elements = grad_bias.numel() if grad_bias is not None else 0
    call.grad_sinks = address(grad_sinks)
    with nogil:
        status = active.attention_backward[dtype](&call)
    if status:
        raise MemoryError("attention_backward: no memory for the kernel's workspace")


def dropout_mask(tuple sizes, double probability, seed, keep):
    """Write into `keep`, (B, Hq, Sq, Skv) bytes, which weights the kernels' dropout keeps."""
    cdef fastseq_attention_shape shape
    set_attention_shape(&shape, sizes, (*(None,) * 10, seed), (-1, -1, False, 0.0, probability, 1.0), 1)
    cdef uint8_t* target = <uint8_t*>address(keep)
    with nogil:
        active.dropout_mask(&shape, target)


cdef inline bint describe_heads(object tensor, DLTensor* out, fastseq_heads* heads) except -1:
    """Fill both; true for a 4-D float32 or float64 CPU tensor of torch's own types with elements and a unit last stride."""
    if type(tensor) is not Tensor and type(tensor) is not Parameter:
        return False
    try:
        exchange.tensor_from_py_object(<void*>tensor, out)
    except Exception:
        return False  # no dense memory behind it: meta, sparse and the like
    if (out.device.device_type != DLPACK_CPU or out.dtype.code != DLPACK_FLOAT or out.dtype.lanes != 1 or out.ndim != 4
            or (out.dtype.bits != 32 and out.dtype.bits != 64) or (out.strides[3] != 1 and out.shape[3] != 1)
            or out.shape[0] == 0 or out.shape[1] == 0 or out.shape[2] == 0 or out.shape[3] == 0):
        return False
    heads.data = start(out)
    heads.batch_stride, heads.head_stride, heads.row_stride = out.strides[0], out.strides[1], out.strides[2]
    return True


def plain_attention(query, key, value, causal, grouped, scale):
    """Attention without options but causal, without gradients.

    None when anything is not as plain as that, or wrong: the caller's general way then finds out what and says so.
    """
    cdef fastseq_attention_forward call
    cdef DLTensor q, k, v, o
    cdef int status, dtype
    if exchange == NULL or (scale is not None and type(scale) is not float and type(scale) is not int):
        return None
    if type(causal) is not bool or type(grouped) is not bool:
        return None
    if (not describe_heads(query, &q, &call.query) or not describe_heads(key, &k, &call.key)
            or not describe_heads(value, &v, &call.value)):
        return None
    # Recording autograd and lazily negated memory are for others.
    if is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    if query.is_neg() or key.is_neg() or value.is_neg():
        return None
    cdef int64_t batch = q.shape[0], heads = q.shape[1], queries = q.shape[2], size = q.shape[3]
    cdef int64_t kv_heads = k.shape[1], keys = k.shape[2], value_size = v.shape[3]
    if (k.shape[0] != batch or v.shape[0] != batch or v.shape[1] != kv_heads or v.shape[2] != keys or k.shape[3] != size
            or k.dtype.bits != q.dtype.bits or v.dtype.bits != q.dtype.bits
            or (heads != kv_heads and (not grouped or heads % kv_heads))):
        return None
    cdef bint rows_outside = q.strides[1] < q.strides[2]
    # The same layout as the query's; a tensor like one that is there costs half of one from sizes.
    if value_size == size and q.strides[0] == heads * queries * size and (
            (q.strides[1] == size and q.strides[2] == heads * size) if rows_outside
            else (q.strides[1] == queries * size and q.strides[2] == size)):
        output = empty_like(query)
    elif rows_outside:
        output = query.new_empty((batch, queries, heads, value_size)).transpose(1, 2)
    else:
        output = query.new_empty((batch, heads, queries, value_size))
    if not describe_heads(output, &o, &call.output):
        return None
    memset(&call.shape, 0, sizeof(call.shape))
    call.shape.batch, call.shape.heads, call.shape.kv_heads = batch, heads, kv_heads
    call.shape.queries, call.shape.keys = queries, keys
    call.shape.key_size, call.shape.value_size = size, value_size
    call.shape.window_left = -1
    call.shape.window_right = 0 if causal else -1
    call.shape.threads = thread_count()
    call.shape.scale = 1 / sqrt(<double>size) if scale is None else scale
    call.lse.data = call.row_maximum.data = call.row_scale.data = call.weights.data = NULL
    call.average_weights = 0
    dtype = q.dtype.bits == 64
    with nogil:
        status = active.attention_forward[dtype](&call)
    if status:
        raise MemoryError("attention_forward: no memory for the kernel's workspace")
    return output
