# --- One position through a whole decoder layer. Included by _cpu.pyx.
#
# At one position the weights are read once and little else happens: a dozen calls from Python would take as long as the kernels.


cdef struct Projection:
    void* weight
    void* bias
    int64_t inputs
    int64_t outputs


cdef struct Normalization:
    void* weight
    void* bias
    double eps


cdef struct LayerRun:
    # What all kernels of one layer share.
    const fastseq_kernel_table* table
    int dtype
    int threads
    int64_t rows
    int64_t heads
    int64_t size
    int status


cdef void run_linear(LayerRun* run, Projection* layer, void* input, void* residual, void* output, int activation) noexcept nogil:
    cdef fastseq_linear_forward call
    memset(&call, 0, sizeof(call))
    call.shape.rows, call.shape.inputs, call.shape.outputs = run.rows, layer.inputs, layer.outputs
    call.shape.activation, call.shape.threads = activation, run.threads
    call.x.data, call.x.row_stride = input, layer.inputs
    call.output.data, call.output.row_stride = output, layer.outputs
    call.residual.data, call.residual.row_stride = residual, layer.outputs
    call.weight, call.bias = layer.weight, layer.bias
    run.status |= run.table.linear_forward[run.dtype](&call)


cdef void run_norm(LayerRun* run, Normalization* norm, void* input, void* output) noexcept nogil:
    cdef fastseq_norm_forward call
    cdef int64_t features = run.heads * run.size
    memset(&call, 0, sizeof(call))
    call.shape.rows, call.shape.features = run.rows, features
    call.shape.threads, call.shape.eps = run.threads, norm.eps
    call.input.data, call.input.row_stride = input, features
    call.output.data, call.output.row_stride = output, features
    call.weight, call.bias = norm.weight, norm.bias
    run.status |= run.table.norm_forward[run.dtype](&call)


cdef void run_attention(LayerRun* run, void* query, int64_t query_stride, fastseq_heads keys, fastseq_heads values,
                        int64_t count, void* output) noexcept nogil:
    cdef fastseq_attention_forward call
    memset(&call, 0, sizeof(call))
    call.shape.batch, call.shape.heads, call.shape.kv_heads = run.rows, run.heads, run.heads
    call.shape.queries, call.shape.keys = 1, count
    call.shape.key_size = call.shape.value_size = run.size
    call.shape.window_left = call.shape.window_right = -1
    call.shape.threads, call.shape.scale = run.threads, 1 / sqrt(<double>run.size)
    call.query.data, call.query.batch_stride = query, query_stride
    call.query.head_stride = call.query.row_stride = run.size
    call.key, call.value = keys, values
    call.output.data, call.output.batch_stride = output, run.heads * run.size
    call.output.head_stride = call.output.row_stride = run.size
    run.status |= run.table.attention_forward[run.dtype](&call)


cdef void append_position(LayerRun* run, const char* source, int64_t source_stride, fastseq_heads held, int64_t position,
                          int64_t item) noexcept nogil:
    """source [rows, heads, size] becomes row `position` of held [rows, heads, capacity, size]."""
    cdef int64_t row, head
    for row in range(run.rows):
        for head in range(run.heads):
            memcpy(<char*>held.data + (row * held.batch_stride + head * held.head_stride + position * held.row_stride) * item,
                   source + (row * source_stride + head * run.size) * item, run.size * item)


cdef inline bint describe_projection(weight, bias, int bits, Projection* layer) except -1:
    cdef DLTensor w, b
    if not describe(weight, &w, 2, bits) or weight.is_neg():
        return False
    layer.weight, layer.outputs, layer.inputs = start(&w), w.shape[0], w.shape[1]
    layer.bias = NULL
    if bias is not None:
        if not describe(bias, &b, 1, bits) or b.shape[0] != layer.outputs or bias.is_neg():
            return False
        layer.bias = start(&b)
    return True


cdef inline bint describe_norm(weight, bias, double eps, int bits, int64_t features, Normalization* norm) except -1:
    cdef DLTensor w, b
    if not describe(weight, &w, 1, bits) or w.shape[0] != features or weight.is_neg():
        return False
    norm.weight, norm.bias, norm.eps = start(&w), NULL, eps
    if bias is not None:
        if not describe(bias, &b, 1, bits) or b.shape[0] != features or bias.is_neg():
            return False
        norm.bias = start(&b)
    return True


cdef inline bint describe_held(tensor, int bits, int64_t batch, int64_t heads, int64_t size, fastseq_heads* held,
                               int64_t* positions) except -1:
    cdef DLTensor t
    if (not describe_heads(tensor, &t, held) or t.dtype.bits != bits or t.shape[0] != batch or t.shape[1] != heads
            or t.shape[3] != size):
        return False
    positions[0] = t.shape[2]
    return True


def plain_decoder_step(x, int64_t batch, int64_t heads, bint norm_first, int activation, tuple self_attention,
                       tuple feed_forward, tuple norms, keys, values, int64_t length, tuple cross_attention, memory_keys,
                       memory_values):
    """One position per sequence through a decoder layer, without gradients: the output.

    `x` is dense with `batch` rows. `self_attention` and `cross_attention` are (in_proj weight, bias, out_proj weight, bias), the
    latter None without memory; `feed_forward` is (linear1 weight, bias, linear2 weight, bias); `norms` is (weight, bias, eps) of
    norm1, norm2 and norm3. The position is added to `keys` and `values` (B, H, capacity, size), which hold `length`.

    None, with nothing changed, when anything is not as plain as that, or wrong: the caller's general way then finds out.
    """
    cdef LayerRun run
    cdef DLTensor t
    cdef Projection in_proj, out_proj, cross_in, cross_out, inner, outer
    cdef Normalization norm1, norm2, norm3
    cdef fastseq_heads held_keys, held_values, known_keys, known_values
    cdef int64_t capacity, value_capacity, known = 0, known_values_count, features, item
    cdef int bits
    if exchange == NULL:
        return None
    bits = 64 if x.dtype is float64 else 32
    if not describe(x, &t, 3, bits) or x.is_neg():
        return None
    features = t.shape[2]
    if t.shape[0] * t.shape[1] != batch or features % heads:
        return None
    run.table, run.dtype, run.threads, run.status = active, bits == 64, thread_count(), 0
    run.rows, run.heads, run.size = batch, heads, features // heads
    item = bits // 8
    if (not describe_projection(self_attention[0], self_attention[1], bits, &in_proj)
            or not describe_projection(self_attention[2], self_attention[3], bits, &out_proj)
            or not describe_projection(feed_forward[0], feed_forward[1], bits, &inner)
            or not describe_projection(feed_forward[2], feed_forward[3], bits, &outer)
            or not describe_norm(norms[0][0], norms[0][1], norms[0][2], bits, features, &norm1)
            or not describe_norm(norms[2][0], norms[2][1], norms[2][2], bits, features, &norm3)
            or not describe_held(keys, bits, batch, heads, run.size, &held_keys, &capacity)
            or not describe_held(values, bits, batch, heads, run.size, &held_values, &value_capacity)):
        return None
    if (in_proj.inputs != features or in_proj.outputs != 3 * features or out_proj.inputs != features
            or out_proj.outputs != features or inner.inputs != features or outer.inputs != inner.outputs
            or outer.outputs != features or length >= capacity or length >= value_capacity):
        return None
    cdef bint crosses = cross_attention is not None
    if crosses:
        if (not describe_projection(cross_attention[0], cross_attention[1], bits, &cross_in)
                or not describe_projection(cross_attention[2], cross_attention[3], bits, &cross_out)
                or not describe_norm(norms[1][0], norms[1][1], norms[1][2], bits, features, &norm2)
                or not describe_held(memory_keys, bits, batch, heads, run.size, &known_keys, &known)
                or not describe_held(memory_values, bits, batch, heads, run.size, &known_values, &known_values_count)):
            return None
        if (cross_in.inputs != features or cross_in.outputs != 3 * features or cross_out.inputs != features
                or cross_out.outputs != features or known != known_values_count):
            return None
        cross_in.outputs = features  # the rows of the query
    output = empty_like(x)
    cdef char* result = <char*>address(output)
    cdef int64_t row_bytes = batch * features * item
    cdef int64_t hidden_bytes = batch * (inner.outputs if inner.outputs > 3 * features else 3 * features) * item
    cdef char* scratch = <char*>malloc(hidden_bytes + 3 * row_bytes)
    if scratch == NULL:
        raise MemoryError("decoder step: no memory for intermediate results")
    cdef char* wide = scratch
    cdef char* normed = scratch + hidden_bytes
    cdef char* attended = normed + row_bytes
    cdef char* stream = attended + row_bytes  # the residual stream between the sub-layers
    cdef char* current = start(&t)
    with nogil:
        # Pre-norm: stream += f(norm(stream)); post-norm: stream = norm(stream + f(stream)).
        if norm_first:
            run_norm(&run, &norm1, current, normed)
        run_linear(&run, &in_proj, normed if norm_first else current, NULL, wide, 0)
        append_position(&run, wide + features * item, 3 * features, held_keys, length, item)
        append_position(&run, wide + 2 * features * item, 3 * features, held_values, length, item)
        run_attention(&run, wide, 3 * features, held_keys, held_values, length + 1, attended)
        run_linear(&run, &out_proj, attended, current, stream, 0)
        if not norm_first:
            run_norm(&run, &norm1, stream, stream)
        if crosses:
            if norm_first:
                run_norm(&run, &norm2, stream, normed)
            run_linear(&run, &cross_in, normed if norm_first else stream, NULL, wide, 0)
            run_attention(&run, wide, features, known_keys, known_values, known, attended)
            # Not in place: with many rows the kernel puts its sums where the output goes before it reads the residual.
            run_linear(&run, &cross_out, attended, stream, normed, 0)
            stream, normed = normed, stream
            if not norm_first:
                run_norm(&run, &norm2, stream, stream)
        if norm_first:
            run_norm(&run, &norm3, stream, normed)
        run_linear(&run, &inner, normed if norm_first else stream, NULL, wide, activation)
        run_linear(&run, &outer, wide, stream, result, 0)
        if not norm_first:
            run_norm(&run, &norm3, result, result)
        free(scratch)
    if run.status:
        raise MemoryError("decoder step: no memory for the kernels' workspace")
    return output
