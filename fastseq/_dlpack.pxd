# The part of DLPack's C exchange table (version 1) that says what a tensor is without a call into Python:
# https://dmlc.github.io/dlpack/latest/c_api.html
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef enum:
    DLPACK_CPU = 1
    DLPACK_FLOAT = 2

ctypedef struct DLPackVersion:
    uint32_t major
    uint32_t minor

ctypedef struct DLDevice:
    int32_t device_type
    int32_t device_id

ctypedef struct DLDataType:
    uint8_t code
    uint8_t bits
    uint16_t lanes

ctypedef struct DLTensor:
    void* data
    DLDevice device
    int32_t ndim
    DLDataType dtype
    int64_t* shape    # [ndim]
    int64_t* strides  # [ndim], elements
    uint64_t byte_offset

ctypedef struct DLPackExchangeAPI:
    DLPackVersion version
    void* previous
    void* managed_tensor_allocator
    void* managed_tensor_from_py_object
    void* managed_tensor_to_py_object
    int (*tensor_from_py_object)(void* py_object, DLTensor* out) except -1
    void* current_work_stream
