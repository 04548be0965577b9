# The C ABI of csrc/fastseq.h for Cython.
from libc.stdint cimport int32_t, int64_t


cdef extern from "fastseq.h" nogil:
    int FASTSEQ_CELL_COUNT
    int FASTSEQ_UNARY_COUNT

    struct fastseq_rnn_shape:
        int64_t steps
        int64_t batch
        int64_t input_size
        int64_t hidden_size
        int64_t projection_size
        int64_t directions
        const int64_t* batch_sizes
        const int64_t* row_order
        int32_t packed
        int32_t threads

    struct fastseq_sequence:
        void* data
        int64_t step_stride
        int64_t row_stride

    struct fastseq_rnn_weights:
        const void* input
        const void* hidden
        const void* input_bias
        const void* hidden_bias
        const void* projection

    struct fastseq_rnn_forward:
        fastseq_rnn_shape shape
        fastseq_sequence x
        fastseq_sequence y
        const void* initial_hidden
        const void* initial_cell
        void* final_hidden
        void* final_cell
        void* reserve
        fastseq_rnn_weights weights[2]

    struct fastseq_rnn_weight_gradients:
        void* input
        void* hidden
        void* input_bias
        void* hidden_bias
        void* projection

    struct fastseq_rnn_backward:
        fastseq_rnn_shape shape
        fastseq_sequence x
        fastseq_sequence y
        fastseq_sequence grad_y
        fastseq_sequence grad_x
        const void* initial_hidden
        const void* initial_cell
        const void* grad_final_hidden
        const void* grad_final_cell
        void* grad_initial_hidden
        void* grad_initial_cell
        const void* reserve
        fastseq_rnn_weights weights[2]
        fastseq_rnn_weight_gradients grad_weights[2]

    ctypedef int (*fastseq_rnn_forward_function)(const fastseq_rnn_forward*) noexcept nogil
    ctypedef int (*fastseq_rnn_backward_function)(const fastseq_rnn_backward*) noexcept nogil
    ctypedef size_t (*fastseq_rnn_reserve_function)(int64_t, int64_t, int64_t, int64_t) noexcept nogil
    ctypedef void (*fastseq_unary_function)(const void*, void*, int64_t) noexcept nogil
    ctypedef double (*fastseq_peak_function)(int, double) noexcept nogil

    struct fastseq_kernel_table:
        const char* isa
        fastseq_rnn_forward_function rnn_forward[1][2]
        fastseq_rnn_backward_function rnn_backward[1][2]
        fastseq_rnn_reserve_function rnn_reserve_bytes[1][2]
        fastseq_unary_function unary[1][2]
        fastseq_peak_function fma_gflops[2]

    int fastseq_isa_count()
    const char* fastseq_isa_name(int index)
    int fastseq_isa_usable(int index)
    const fastseq_kernel_table* fastseq_table(int index)
    const char* fastseq_cell_name(int cell)
    const char* fastseq_openmp_library()
    int fastseq_max_threads()
