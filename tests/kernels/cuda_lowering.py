"""Lowers programs for CUDA on a machine without a GPU, and reads the Triton modules in them."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jaxlib.mlir import ir
from jaxlib.triton import dialect as triton

# For each operation of Triton's dialect, MLIR looks for a module of this name, which jaxlib lacks: the search took a
# third of the time of lowering a step.
sys.modules.setdefault("jaxlib.mlir.dialects.tt", triton)

TRITON_CALL = "__gpu$xla.gpu.triton"

# jax 0.11 takes the instruction set from the device of the mesh in context; jax 0.10 assumes a Hopper.
H200 = AbstractMesh(
    (1,),
    ("data",),
    (AxisType.Auto,),
    abstract_device=AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu"),
)


class KernelArray(NamedTuple):
    """An array of a launch, with its size and the widths of the integers that are added to its pointer."""

    num_elements: int
    offset_bits: frozenset[int]


class TritonModule(NamedTuple):
    """One launch, with the kernel's name, its arrays (inputs, then outputs) and the Triton module as text."""

    name: str
    arrays: tuple[KernelArray, ...]
    text: str


def lower_for_cuda(f: Callable, *args: Any, platform: str = "cuda") -> jax.stages.Lowered:
    """Lowers `jax.jit(f)` for an H200 without running Triton (no PTX); `args` may be `jax.ShapeDtypeStruct`s."""
    with jax.sharding.use_abstract_mesh(H200):
        return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,))


def triton_modules(lowered: jax.stages.Lowered) -> list[TritonModule]:
    """Returns the kernels that a lowered program launches, in program order."""
    modules = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.name == "stablehlo.custom_call" and op.attributes["call_target_name"].value == TRITON_CALL:
            sizes = [_num_elements(value.type) for value in (*op.operands, *op.results)]
            modules.append(_decoded(op.attributes["mhlo.backend_config"], sizes))
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return modules


def _num_elements(array: ir.Type) -> int:
    size = 1
    for length in ir.RankedTensorType(array).shape:
        size *= length
    return size


def _decoded(config: ir.DictAttr, sizes: list[int]) -> TritonModule:
    with ir.Context() as context:
        triton.register_dialect(context)
        module = ir.Module.parse(config["ir"].value_bytes)
        bits: list[set[int]] = [set() for _ in sizes]

        def visit(op: ir.Operation) -> ir.WalkResult:
            if op.name == "tt.addptr":
                pointer, offset = op.operands
                while not isinstance(pointer.owner, ir.Block):  # pass splat and broadcast of the argument
                    pointer = pointer.owner.operands[0]
                width = offset.type.element_type if isinstance(offset.type, ir.ShapedType) else offset.type
                bits[ir.BlockArgument(pointer).arg_number].add(ir.IntegerType(width).width)
            return ir.WalkResult.ADVANCE

        module.operation.walk(visit)
        arrays = tuple(KernelArray(size, frozenset(widths)) for size, widths in zip(sizes, bits, strict=True))
        return TritonModule(config["name"].value, arrays, str(module))
