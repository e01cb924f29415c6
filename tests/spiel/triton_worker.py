"""Compiles the Triton kernels to machine code for GPUs that need not be there, and prints what it
compiled. Run by test_triton_compiling, as Triton's interpreter, once chosen, stays in its process.
"""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spiel.ops import triton_kernels as kernels

FLOATS = ("fp32", "bf16", "fp16")


def machine_code(kernel, dtypes, sizes, constants, capability, num_warps=4):
    """The size in bytes of `kernel` for pointers to `dtypes`, sizes of that type, and constants."""
    types = [*(f"*{name}" for name in dtypes)]
    num_sizes = len(kernel.arg_names) - len(types) - len(constants)
    types += [sizes] * num_sizes + ["constexpr"] * len(constants)
    signature = dict(zip(kernel.arg_names, types, strict=True))
    first = len(types) - len(constants)
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(first + i,): value for i, value in enumerate(constants)},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(dtypes))},
    )
    target = GPUTarget("cuda", capability, 32)
    return len(triton.compile(source, target=target, options={"num_warps": num_warps}).asm["cubin"])


def main():
    assert not kernels.INTERPRETED
    # Hopper, and Ampere; sizes beyond 2^31.
    for capability, dtype, sizes in (
        *((90, dtype, "i32") for dtype in FLOATS),
        (90, "bf16", "i64"),
        (80, "bf16", "i32"),
    ):
        case = dtype, sizes, capability
        pointers = [dtype] * 2
        size = machine_code(kernels._transpose_kernel, pointers, sizes, [64], capability)
        print("transpose", *case, size)
        pointers = [dtype, dtype, "i32", "fp32"]
        size = machine_code(kernels._sampled_kernel, pointers, sizes, [8, 256], capability)
        print("sampled", *case, size)
        pointers = [dtype, "i32", dtype, "fp32"]
        constants = [tl.float32, kernels._WRITE_BLOCK]
        size = machine_code(kernels._write_kernel, pointers, sizes, constants, capability)
        print("write", *case, size)
    pointers = ["bf16", "bf16", "i64", "fp32"]
    for *blocks, num_warps in kernels._CONFIGS:
        size = machine_code(kernels._sampled_kernel, pointers, "i32", blocks, 90, num_warps)
        print("sampled", *blocks, num_warps, size)
    pointers = ["fp64", "i64", "fp64", "fp32"]
    constants = [tl.float64, kernels._WRITE_BLOCK]
    print("write", *pointers, machine_code(kernels._write_kernel, pointers, "i64", constants, 90))


if __name__ == "__main__":
    main()
