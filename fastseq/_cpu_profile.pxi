# What the profiler recorded, as plain Python values; fastseq/profiler makes sense of them. Included by _cpu.pyx.

from array import array


def profile_start(int64_t max_calls, int64_t max_slices):
    """Start recording kernel calls. RuntimeError if recording is on."""
    if not fastseq_profile_start(max_calls, max_slices):
        raise RuntimeError("the kernels are being profiled already")


def profile_stop():
    """Stop recording: what was recorded since `profile_start`. RuntimeError if recording is off.

    Times are ticks of a counter that runs at "ticks_per_second". A thread's "ticks" add up to the time between its "begin"
    and "end"; "slices" holds (phase, begin, end) again and again, phase being an index into "phases".
    """
    cdef fastseq_profile* profile = fastseq_profile_stop()
    if profile == NULL:
        raise RuntimeError("the kernels are not being profiled")
    cdef fastseq_profile_call* call = profile.calls
    try:
        calls = []
        names = [fastseq_phase_name(i).decode() for i in range(FASTSEQ_PHASE_COUNT)]
        slices_dropped = 0
        while call != NULL:
            calls.append(profiled_call(call, names))
            slices_dropped += sum([call.records[i].slices_dropped for i in range(call.threads)])
            call = call.next
        return {
            "ticks_per_second": profile.ticks_per_second,
            "begin": profile.begin,
            "end": profile.end,
            "begin_time_ns": profile.begin_time_ns,
            "phases": names,
            "calls_dropped": profile.calls_dropped,
            "slices_dropped": slices_dropped,
            "calls": calls,
        }
    finally:
        fastseq_profile_free(profile)


cdef dict profiled_call(fastseq_profile_call* call, list names):
    return {
        "kernel": call.kernel.decode(),
        "variant": call.variant.decode(),
        "dtype": "float64" if call.dtype else "float32",
        "isa": call.isa.decode(),
        "thread_id": call.thread_id,
        "begin": call.begin,
        "end": call.end,
        "shape": {call.sizes[i].name.decode(): call.sizes[i].value for i in range(call.size_count)},
        "threads": [profiled_thread(&call.records[i], names) for i in range(call.threads) if call.records[i].begin],
    }


cdef dict profiled_thread(fastseq_profile_thread* thread, list names):
    cdef int64_t i
    slices = array("q")
    if thread.slice_count:
        slices.frombytes((<char*>thread.slices)[:thread.slice_count * sizeof(thread.slices[0])])
    return {
        "begin": thread.begin,
        "end": thread.end,
        "ticks": {names[i]: thread.ticks[i] for i in range(FASTSEQ_PHASE_COUNT) if thread.ticks[i]},
        "counts": {names[i]: thread.counts[i] for i in range(FASTSEQ_PHASE_COUNT) if thread.counts[i]},
        "slices": slices,
    }
