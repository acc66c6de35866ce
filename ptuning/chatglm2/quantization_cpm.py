"""Int4 weights turned into floats by a kernel that cpm_kernels loads and launches: `--quantization_backend cpm_kernels`.

Answers to `extract_weight_to_half` of the official `quantization.py`, which hands a blob of compiled kernels to the same
loader. That blob holds machine code up to compute capability 8.6, and has no bfloat16 kernel, though one is called.
The kernel here is PTX text, which the driver compiles for whatever GPU it finds, for every activation dtype.

cpm_kernels 1.0.11 calls the CUDA runtime while it is imported, needs `pkg_resources`, and finds libcudart, libcublasLt
and libcuda only in $CUDA_PATH/lib64, /usr/local/cuda/lib64 or the system's library path, so that the libraries PyTorch
brings do not count. It is therefore imported on demand, and each of these is a message of its own.
"""

import ctypes
import importlib.util
from functools import cache

import torch
from torch import Tensor

THREADS = 256

# One thread turns one byte, with the even column in its high nibble, into two neighbouring floats. The block's second
# index is the row. PTX 6.0 for compute capability 6.0 is understood by every driver since 2017 and runs on every GPU
# since Pascal.
EXTRACTION_PTX = """
.version 6.0
.target sm_60
.address_size 64

.visible .entry extract_int4(
    .param .u64 packed,     // int8 (rows, num_bytes)
    .param .u64 scale,      // float32 (rows,)
    .param .u64 output,     // (rows, 2 * num_bytes)
    .param .u32 num_bytes
)
{
    .reg .pred %outside;
    .reg .b16  %half<2>;
    .reg .b32  %row, %column, %width, %block, %size, %thread, %byte, %even, %odd, %tie;
    .reg .f32  %factor, %even_value, %odd_value;
    .reg .b64  %index, %wide, %address;

    mov.u32      %block, %ctaid.x;
    mov.u32      %size, %ntid.x;
    mov.u32      %thread, %tid.x;
    mad.lo.u32   %column, %block, %size, %thread;
    ld.param.u32 %width, [num_bytes];
    setp.ge.u32  %outside, %column, %width;
    @%outside bra done;

    mov.u32      %row, %ctaid.y;
    mul.wide.u32 %index, %row, %width;
    cvt.u64.u32  %wide, %column;
    add.u64      %index, %index, %wide;

    ld.param.u64 %address, [packed];
    cvta.to.global.u64 %address, %address;
    add.u64      %address, %address, %index;
    ld.global.s8 %byte, [%address];

    ld.param.u64 %address, [scale];
    cvta.to.global.u64 %address, %address;
    mul.wide.u32 %wide, %row, 4;
    add.u64      %address, %address, %wide;
    ld.global.f32 %factor, [%address];

    shr.s32      %even, %byte, 4;
    shl.b32      %odd, %byte, 28;
    shr.s32      %odd, %odd, 28;
    cvt.rn.f32.s32 %even_value, %even;
    cvt.rn.f32.s32 %odd_value, %odd;
    mul.rn.f32   %even_value, %even_value, %factor;
    mul.rn.f32   %odd_value, %odd_value, %factor;

    ld.param.u64 %address, [output];
    cvta.to.global.u64 %address, %address;
    mul.lo.u64   %index, %index, PAIR_BYTES;
    add.u64      %address, %address, %index;
    STORE
done:
    ret;
}
"""
# Bytes of two values, and how they are stored. For bfloat16, whose conversion needs compute capability 8.0: the upper
# half of the float32, rounded to even.
STORES = {
    torch.float32: (8, "st.global.v2.f32 [%address], {%even_value, %odd_value};"),
    torch.float16: (
        4,
        """cvt.rn.f16.f32 %half0, %even_value;
    cvt.rn.f16.f32 %half1, %odd_value;
    st.global.v2.b16 [%address], {%half0, %half1};""",
    ),
    torch.bfloat16: (
        4,
        """mov.b32      %even, %even_value;
    shr.u32      %tie, %even, 16;
    and.b32      %tie, %tie, 1;
    add.u32      %tie, %tie, 0x7FFF;
    add.u32      %even, %even, %tie;
    shr.u32      %even, %even, 16;
    mov.b32      %odd, %odd_value;
    shr.u32      %tie, %odd, 16;
    and.b32      %tie, %tie, 1;
    add.u32      %tie, %tie, 0x7FFF;
    add.u32      %odd, %odd, %tie;
    and.b32      %odd, %odd, 0xFFFF0000;
    or.b32       %even, %even, %odd;
    st.global.b32 [%address], %even;""",
    ),
}


def extraction_ptx(dtype: torch.dtype) -> str:
    """The kernel's text for outputs of `dtype`."""
    pair_bytes, store = STORES[dtype]
    return EXTRACTION_PTX.replace("PAIR_BYTES", str(pair_bytes)).replace("STORE", store)


def import_cpm_kernels() -> None:
    """Import cpm_kernels and reach the GPU with it. RuntimeError says what is missing and how to get it."""
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device, and cpm_kernels cannot be imported without one")
    if importlib.util.find_spec("cpm_kernels") is None:
        raise RuntimeError("cpm_kernels is not installed: pip install cpm_kernels")
    if importlib.util.find_spec("pkg_resources") is None:
        raise RuntimeError('cpm_kernels needs pkg_resources, which setuptools 81 dropped: pip install "setuptools<81"')
    try:
        from cpm_kernels.device import num_devices

        found = num_devices()
    except (RuntimeError, OSError, AttributeError) as error:
        raise RuntimeError(f"cpm_kernels fails while it is imported: {error}") from error
    if not found:
        raise RuntimeError(
            "cpm_kernels finds no CUDA runtime: install the CUDA toolkit, or point CUDA_PATH at the folder whose lib64 "
            "holds libcudart.so and libcublasLt.so"
        )


@cache
def _kernel(dtype: torch.dtype):
    from cpm_kernels.kernels.base import KernelFunction, LazyKernelCModule

    return KernelFunction(LazyKernelCModule(extraction_ptx(dtype).encode() + b"\0"), "extract_int4")


def dequantize_int4(weight: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """`quantization.dequantize_weight` for 4 bits on a CUDA device: float (out, in), rounded to `dtype` once."""
    assert bits == 4
    from cpm_kernels.library import cudart

    num_rows, num_bytes = weight.shape
    weight, scale = weight.contiguous(), scale.float()
    output = torch.empty(num_rows, 2 * num_bytes, dtype=dtype, device=weight.device)
    with torch.cuda.device(weight.device):
        cudart.cudaSetDevice(weight.device.index)  # of its own copy of the runtime
        stream = torch.cuda.current_stream().cuda_stream
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, scale, output)]
        grid = (-(-num_bytes // THREADS), num_rows, 1)
        _kernel(dtype)(grid, (THREADS, 1, 1), 0, ctypes.c_void_p(stream), [*pointers, ctypes.c_uint32(num_bytes)])
    return output
