# The C ABI of csrc/fastseq.h for Cython.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t


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

    struct fastseq_heads:
        void* data
        int64_t batch_stride
        int64_t head_stride
        int64_t row_stride

    struct fastseq_scores:
        void* data
        int64_t batch_stride
        int64_t head_stride
        int64_t query_stride
        int64_t key_stride

    struct fastseq_rows:
        void* data
        int64_t batch_stride
        int64_t head_stride

    struct fastseq_attention_shape:
        int64_t batch
        int64_t heads
        int64_t kv_heads
        int64_t queries
        int64_t keys
        int64_t key_size
        int64_t value_size
        const int64_t* query_starts
        const int64_t* key_starts
        const int64_t* query_lengths
        const int64_t* key_lengths
        const int64_t* block_table
        int64_t blocks_per_sequence
        int64_t block_size
        int64_t window_left
        int64_t window_right
        int32_t bottom_right
        int32_t threads
        double scale
        double softcap
        double dropout
        uint64_t dropout_seed
        uint64_t dropout_offset
        fastseq_scores bias
        fastseq_scores mask
        const uint8_t* key_padding
        int64_t key_padding_stride
        const void* alibi_slopes
        int64_t alibi_batch_stride
        const void* sinks

    struct fastseq_attention_forward:
        fastseq_attention_shape shape
        fastseq_heads query
        fastseq_heads key
        fastseq_heads value
        fastseq_heads output
        fastseq_rows lse
        fastseq_rows row_maximum
        fastseq_rows row_scale
        fastseq_scores weights
        int32_t average_weights

    struct fastseq_attention_backward:
        fastseq_attention_shape shape
        fastseq_heads query
        fastseq_heads key
        fastseq_heads value
        fastseq_heads output
        fastseq_rows row_maximum
        fastseq_rows row_scale
        fastseq_heads grad_output
        fastseq_rows grad_lse
        fastseq_heads grad_query
        fastseq_heads grad_key
        fastseq_heads grad_value
        fastseq_scores grad_bias
        int64_t grad_bias_elements
        void* grad_sinks

    struct fastseq_matrix:
        void* data
        int64_t row_stride

    struct fastseq_norm_shape:
        int64_t rows
        int64_t features
        int32_t rms
        int32_t threads
        double eps
        double dropout
        uint64_t dropout_seed
        uint64_t dropout_offset

    struct fastseq_norm_statistics:
        void* inverse_deviation
        void* mean
        void* mean_correction

    struct fastseq_norm_forward:
        fastseq_norm_shape shape
        fastseq_matrix input
        fastseq_matrix residual
        const void* weight
        const void* bias
        fastseq_matrix output
        fastseq_matrix sum
        fastseq_norm_statistics statistics

    struct fastseq_norm_backward:
        fastseq_norm_shape shape
        fastseq_matrix grad_output
        fastseq_matrix grad_sum
        fastseq_matrix x
        const void* weight
        fastseq_norm_statistics statistics
        fastseq_matrix grad_x
        fastseq_matrix grad_input
        void* grad_weight
        void* grad_bias

    ctypedef int (*fastseq_norm_forward_function)(const fastseq_norm_forward*) noexcept nogil
    ctypedef int (*fastseq_norm_backward_function)(const fastseq_norm_backward*) noexcept nogil

    ctypedef int (*fastseq_attention_forward_function)(const fastseq_attention_forward*) noexcept nogil
    ctypedef int (*fastseq_attention_backward_function)(const fastseq_attention_backward*) noexcept nogil
    ctypedef void (*fastseq_dropout_mask_function)(const fastseq_attention_shape*, uint8_t*) noexcept nogil

    struct fastseq_linear_shape:
        int64_t rows
        int64_t inputs
        int64_t outputs
        int32_t activation
        int32_t threads
        double dropout
        uint64_t dropout_seed
        uint64_t dropout_offset

    struct fastseq_linear_forward:
        fastseq_linear_shape shape
        fastseq_matrix x
        const void* weight
        const void* bias
        fastseq_matrix residual
        fastseq_matrix output
        void* pre_activation

    struct fastseq_linear_backward:
        fastseq_linear_shape shape
        fastseq_matrix grad_output
        fastseq_matrix x
        const void* weight
        const void* pre_activation
        fastseq_matrix grad_x
        void* grad_weight
        void* grad_bias

    ctypedef int (*fastseq_linear_forward_function)(const fastseq_linear_forward*) noexcept nogil
    ctypedef int (*fastseq_linear_backward_function)(const fastseq_linear_backward*) noexcept nogil
    ctypedef void (*fastseq_element_dropout_mask_function)(int64_t, int64_t, double, uint64_t, uint64_t, uint8_t*) noexcept nogil

    ctypedef int (*fastseq_rnn_forward_function)(const fastseq_rnn_forward*) noexcept nogil
    ctypedef int (*fastseq_rnn_backward_function)(const fastseq_rnn_backward*) noexcept nogil
    ctypedef size_t (*fastseq_rnn_reserve_function)(int64_t, int64_t, int64_t, int64_t) noexcept nogil
    ctypedef void (*fastseq_unary_function)(const void*, void*, int64_t) noexcept nogil
    ctypedef double (*fastseq_peak_function)(int, double) noexcept nogil
    ctypedef double (*fastseq_memory_function)(int, int64_t, int, double) noexcept nogil

    struct fastseq_kernel_table:
        const char* isa
        fastseq_rnn_forward_function rnn_forward[1][2]
        fastseq_rnn_backward_function rnn_backward[1][2]
        fastseq_rnn_reserve_function rnn_reserve_bytes[1][2]
        fastseq_unary_function unary[1][2]
        fastseq_attention_forward_function attention_forward[2]
        fastseq_attention_backward_function attention_backward[2]
        fastseq_dropout_mask_function dropout_mask
        fastseq_linear_forward_function linear_forward[2]
        fastseq_linear_backward_function linear_backward[2]
        fastseq_element_dropout_mask_function element_dropout_mask
        fastseq_norm_forward_function norm_forward[2]
        fastseq_norm_backward_function norm_backward[2]
        fastseq_peak_function fma_gflops[2]
        fastseq_memory_function memory_gbytes

    int fastseq_isa_count()
    const char* fastseq_isa_name(int index)
    int fastseq_isa_usable(int index)
    const fastseq_kernel_table* fastseq_table(int index)
    const char* fastseq_cell_name(int cell)
    const char* fastseq_openmp_library()
    int fastseq_max_threads()


cdef extern from "cpu/cell_library.h" nogil:
    struct fastseq_cell_library:
        int32_t dtype
        const char* isa
        fastseq_rnn_forward_function forward
        fastseq_rnn_backward_function backward
        fastseq_rnn_reserve_function reserve_bytes

    const fastseq_cell_library* fastseq_cell_open(const char* path, char* reason, size_t reason_bytes)


cdef extern from "profile.h" nogil:
    enum: FASTSEQ_PHASE_COUNT

    struct fastseq_profile_slice:
        int64_t phase
        int64_t begin
        int64_t end

    struct fastseq_profile_thread:
        int64_t begin
        int64_t end
        int64_t ticks[1]
        int64_t counts[1]
        int64_t slice_count
        int64_t slices_dropped
        fastseq_profile_slice* slices

    struct fastseq_profile_size:
        const char* name
        int64_t value

    struct fastseq_profile_call:
        const char* kernel
        const char* variant
        const char* isa
        int32_t dtype
        int32_t threads
        int64_t thread_id
        int64_t begin
        int64_t end
        int64_t size_count
        fastseq_profile_size sizes[1]
        fastseq_profile_thread* records
        fastseq_profile_call* next

    struct fastseq_profile:
        double ticks_per_second
        int64_t begin
        int64_t end
        int64_t begin_time_ns
        int64_t calls_dropped
        fastseq_profile_call* calls

    int fastseq_profile_start(int64_t max_calls, int64_t max_slices)
    fastseq_profile* fastseq_profile_stop()
    void fastseq_profile_free(fastseq_profile* profile)
    const char* fastseq_phase_name(int phase)
