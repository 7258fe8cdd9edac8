"""Measures the torch opponents of `bench_kernels.py`: reads a request, writes a JSON line per column.

    python peers_kernels.py REQUEST.json LINES.jsonl

Each process runs one group of opponents ("torch", "liger" or "unsloth"), so that no group patches another's code. A
column that cannot be measured is written as missing, with the reason, and the next one runs. Outputs are compared with
float32 references before anything is timed.
"""

import functools
import inspect
import json
import math
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from timing import num_sets, time_torch

EPS = 1e-6
BLOCK = 128  # block size of flex_attention's masks
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Measures one group of opponents."""
    request, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    with out.open("w", buffering=1) as file:
        recorder = Recorder(request, file)
        names = {"torch": ("torch", "triton"), "liger": ("liger_kernel",), "unsloth": ("unsloth", "unsloth_zoo")}
        recorder.write({"peer": request["peer"], "versions": {x: _version(x) for x in names[request["peer"]]}})
        for tokens in request["tokens"]:
            {"torch": torch_itself, "liger": liger, "unsloth": unsloth}[request["peer"]](recorder, tokens)
            if DEVICE == "cuda":
                torch.cuda.empty_cache()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Recorder:
    """Checks and times columns, and writes their lines."""

    def __init__(self, request: dict[str, Any], file: Any) -> None:
        self.request, self.file = request, file
        self.shape = SimpleNamespace(**request["shape"])
        self.deadline = time.monotonic() + request["seconds"]

    def write(self, line: dict[str, Any]) -> None:
        """Prints one line, and writes it to the file."""
        print(json.dumps(line), flush=True)
        self.file.write(json.dumps(line) + "\n")

    def column(
        self,
        row: tuple[str, str, str | None, int],
        column: str,
        build: Callable[[], Callable],
        make: Callable[[], tuple],
        reference: Callable | None,
        bytes_moved: int,
        *,
        consumed: bool = False,
        arrange: Callable = lambda outputs: outputs,
        note: str = "",
    ) -> None:
        """Measures `build()(*make())`.

        Args:
          build: does its imports and returns the function; if it raises, the column is missing.
          reference: takes the same inputs, and returns what `arrange` returns for the outputs.
          consumed: whether the function overwrites its inputs.
        """
        operation, direction, mix, tokens = row
        if operation not in self.request["only"]:
            return
        line = {"operation": operation, "direction": direction, "mix": mix, "tokens": tokens, "column": column}
        if note:
            line["note"] = note
        try:
            if time.monotonic() > self.deadline:
                raise TimeoutError("not measured, because the time ran out")
            function = build()
            errors = []
            if reference is not None:
                torch.manual_seed(1000)
                inputs = make()
                want = [x.detach().clone() for x in reference(*inputs)]  # before the inputs are overwritten
                got = arrange(function(*inputs))
                assert [x.shape for x in got] == [x.shape for x in want], "the outputs are not those of the reference"
                errors = [_relative_error(x, y) for x, y in zip(got, want, strict=True)]
                del inputs, want, got
            sets = num_sets(bytes_moved)
            times = time_torch(function, lambda: [make() for _ in range(sets)], consumed=consumed)
            line |= {"errors": errors, **times._asdict()}
        except Exception as error:
            line["missing"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.write(line)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()

    def missing(self, row: tuple[str, str, str | None, int], column: str, why: str) -> None:
        """Writes the reason why a column has no time."""
        if row[0] in self.request["only"]:
            keys = ("operation", "direction", "mix", "tokens")
            self.write({**dict(zip(keys, row, strict=True)), "column": column, "missing": why})


def _relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    want = want.float()
    return float(torch.linalg.vector_norm(got.detach().float() - want) / torch.linalg.vector_norm(want))


def normal(*shape: int) -> torch.Tensor:
    """Returns a standard normal bfloat16 tensor."""
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


# RoPE, with and without the heads' norm. Tensors are [1, T, heads, H] in memory; both opponents take them transposed.


class Rotary:
    """Makes inputs and references at one length, with bfloat16 tables as in both opponents' bfloat16 models."""

    def __init__(self, shape: SimpleNamespace, tokens: int) -> None:
        self.N, self.K, self.H, self.T = shape.num_heads, shape.num_kv_heads, shape.head_dim, tokens
        frequencies = 1e6 ** -(torch.arange(0, self.H, 2, device=DEVICE) / self.H)
        angles = torch.outer(torch.arange(tokens, device=DEVICE, dtype=torch.float32), frequencies)
        self.cos, self.sin = (torch.cat([x, x], dim=-1).bfloat16() for x in (angles.cos(), angles.sin()))
        self.q_scale, self.k_scale = normal(self.H), normal(self.H)
        self.bytes = 2 * 2 * tokens * (self.N + self.K) * self.H

    def make(self) -> tuple[torch.Tensor, ...]:
        """Returns random q and k, `[1, T, heads, H]`."""
        return normal(1, self.T, self.N, self.H), normal(1, self.T, self.K, self.H)

    def turn(self, x: torch.Tensor, sign: int = 1) -> torch.Tensor:
        """Applies RoPE in float32 with the rounded tables; `sign=-1` rotates back."""
        x, cos, sin = x.float(), self.cos.float()[:, None], sign * self.sin.float()[:, None]
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def rope(self, q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        """Returns the reference of RoPE's forward pass."""
        return [self.turn(q), self.turn(k)]

    def rope_backward(self, dq: torch.Tensor, dk: torch.Tensor) -> list[torch.Tensor]:
        """Returns the reference of RoPE's backward pass."""
        return [self.turn(dq, -1), self.turn(dk, -1)]

    def norm_rope(self, q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        """Returns the reference of norm and RoPE."""
        return [self.turn(self.norm(q) * self.q_scale.float()), self.turn(self.norm(k) * self.k_scale.float())]

    @staticmethod
    def norm(x: torch.Tensor) -> torch.Tensor:
        """Divides each head by its root mean square, in float32."""
        x = x.float()
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPS)

    def norm_rope_backward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the reference gradients of q and k through norm and RoPE."""
        dq, dk, q, k = (x.float() for x in inputs)
        q.requires_grad_(), k.requires_grad_()
        return torch.autograd.grad(self.norm_rope(q, k), (q, k), (dq, dk))


def through_autograd(function: Callable) -> Callable:
    """Returns only the backward pass of `function(q, k)`; each set's graph is built once and kept."""
    graphs: dict[int, Any] = {}

    def backward(dq: torch.Tensor, dk: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> Any:
        key = q.data_ptr()
        if key not in graphs or graphs[key][0][0] is not q:
            q.requires_grad_(), k.requires_grad_()
            graphs[key] = (q, k), function(q, k)
        leaves, outputs = graphs[key]
        return torch.autograd.grad(outputs, leaves, (dq.transpose(1, 2), dk.transpose(1, 2)), retain_graph=True)

    return backward


def turned_back(outputs: Any) -> list[torch.Tensor]:
    """Transposes q and k from `[1, heads, T, H]` to `[1, T, heads, H]`."""
    return [x.transpose(1, 2) for x in outputs[:2]]


# Gated activations.


def gate_reference(operation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Returns `act(gate) * up` for the activation of `operation`."""
    if operation == "swiglu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if operation == "geglu_tanh" else "none") * up


def gate_backward_reference(operation: str, d_out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, product: bool):
    """Returns the gradients of gate and up and, if `product`, also the product, in float32."""
    gate, up = (x.float().requires_grad_() for x in (gate, up))
    out = gate_reference(operation, gate, up)
    gradients = torch.autograd.grad(out, (gate, up), d_out.float())
    return [*gradients, out] if product else list(gradients)


def measure_gates(
    recorder: Recorder,
    tokens: int,
    column: str,
    forward: dict[str, Callable],
    backward: dict[str, Callable],
    *,
    product: bool,
    arrange: Callable,
) -> None:
    """Measures an opponent's gated activations: `forward()(gate, up)`, and in-place `backward()(d_out, gate, up)`."""
    F = recorder.shape.intermediate_size
    size = 2 * tokens * F
    direction, other = ("backward_product", "backward") if product else ("backward", "backward_product")
    for operation in ("swiglu", "geglu_tanh", "geglu_exact"):
        if operation not in forward:
            for each in ("forward", direction, other):
                recorder.missing((operation, each, None, tokens), column, "has no such kernel")
            continue
        recorder.column(
            (operation, "forward", None, tokens),
            column,
            forward[operation],
            lambda: (normal(1, tokens, F), normal(1, tokens, F)),
            lambda gate, up, operation=operation: [gate_reference(operation, gate.float(), up.float())],
            3 * size,
            arrange=lambda out: [out],
        )
        recorder.column(
            (operation, direction, None, tokens),
            column,
            backward[operation],
            lambda: tuple(normal(tokens, F) for _ in range(3)),
            lambda d, gate, up, operation=operation: gate_backward_reference(operation, d, gate, up, product),
            (6 if product else 5) * size,
            consumed=True,
            arrange=arrange,
            note="in place",
        )
        why = "always with the product" if product else "never with the product"
        recorder.missing((operation, other, None, tokens), column, why)


# Unsloth and Liger.


def unsloth(recorder: Recorder, tokens: int) -> None:
    """Measures Unsloth's kernels. Its import patches torch, so nothing else runs in this process."""
    column = "Unsloth"

    def kernel(module: str, name: str) -> Callable:
        import unsloth  # noqa: F401

        return getattr(__import__(f"unsloth.kernels.{module}", fromlist=[name]), name)

    if {"rope", "norm_rope"} & set(recorder.request["only"]):
        rotary = Rotary(recorder.shape, tokens)
        indices = torch.arange(tokens, device=DEVICE, dtype=torch.int32)

        def rope() -> Callable:
            function = kernel("rope_embedding", "fast_rope_embedding")
            return lambda q, k: function(q.transpose(1, 2), k.transpose(1, 2), rotary.cos, rotary.sin, indices)

        def norm_rope() -> Callable:
            function = kernel("qk_norm_rope", "fast_qk_norm_rope")
            norms = [SimpleNamespace(weight=w, variance_epsilon=EPS) for w in (rotary.q_scale, rotary.k_scale)]
            return lambda q, k: function(*norms, q, k, rotary.cos, rotary.sin, indices)

        both = lambda: (*rotary.make(), *rotary.make())  # noqa: E731
        recorder.column(
            ("rope", "forward", None, tokens), column, rope, rotary.make, rotary.rope, 2 * rotary.bytes,
            arrange=turned_back,
        )  # fmt: skip
        recorder.column(
            ("rope", "backward", None, tokens), column, lambda: through_autograd(rope()), both,
            lambda dq, dk, q, k: rotary.rope_backward(dq, dk), 2 * rotary.bytes, arrange=list,
        )  # fmt: skip
        recorder.column(
            ("norm_rope", "forward", None, tokens), column, norm_rope, rotary.make, rotary.norm_rope,
            2 * rotary.bytes, arrange=turned_back,
        )  # fmt: skip
        recorder.column(
            ("norm_rope", "backward", None, tokens), column, lambda: through_autograd(norm_rope()), both,
            rotary.norm_rope_backward, 3 * rotary.bytes, arrange=list, note="without the gradients of the scales",
        )  # fmt: skip
        del rotary
    forward = {
        "swiglu": lambda: kernel("swiglu", "swiglu_fg_kernel"),
        "geglu_tanh": lambda: kernel("geglu", "geglu_approx_forward_kernel"),
        "geglu_exact": lambda: kernel("geglu", "geglu_exact_forward_kernel"),
    }
    backward = {
        "swiglu": lambda: kernel("swiglu", "swiglu_DWf_DW_dfg_kernel"),
        "geglu_tanh": lambda: kernel("geglu", "geglu_approx_backward_kernel"),
        "geglu_exact": lambda: kernel("geglu", "geglu_exact_backward_kernel"),
    }
    # Unsloth returns the product, the gradient of up and the gradient of gate.
    measure_gates(
        recorder, tokens, column, forward, backward, product=True, arrange=lambda out: [out[2], out[1], out[0]]
    )


def liger(recorder: Recorder, tokens: int) -> None:
    """Measures Liger's kernels."""
    column = "Liger"
    if {"rope", "norm_rope"} & set(recorder.request["only"]):
        rotary = Rotary(recorder.shape, tokens)
        cos, sin = rotary.cos[None], rotary.sin[None]

        def rope(name: str) -> Callable:
            function = getattr(__import__("liger_kernel.ops.rope", fromlist=[name]), name)
            return lambda q, k: function(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

        def norm_rope(*, scales_too: bool) -> Callable:
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction
            from liger_kernel.ops.rope import LigerRopeFunction

            scales = [w.clone().requires_grad_(scales_too) for w in (rotary.q_scale, rotary.k_scale)]

            def function(q: torch.Tensor, k: torch.Tensor) -> Any:
                q, k = (LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False) for x, w in zip((q, k), scales))  # noqa: B905
                return LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

            return function

        # Rotations keep the norm of the inputs that they overwrite, so each set serves many times.
        recorder.column(
            ("rope", "forward", None, tokens), column, lambda: rope("rope_forward"), rotary.make, rotary.rope,
            2 * rotary.bytes, arrange=turned_back, note="in place",
        )  # fmt: skip
        recorder.column(
            ("rope", "backward", None, tokens), column, lambda: rope("rope_backward"), rotary.make,
            rotary.rope_backward, 2 * rotary.bytes, arrange=turned_back, note="in place",
        )  # fmt: skip
        recorder.column(
            ("norm_rope", "forward", None, tokens), column,
            lambda: torch.no_grad()(norm_rope(scales_too=False)), rotary.make, rotary.norm_rope, 2 * rotary.bytes,
            arrange=turned_back, note="two norms, then RoPE: three launches",
        )  # fmt: skip
        recorder.column(
            ("norm_rope", "backward", None, tokens), column,
            lambda: through_autograd(norm_rope(scales_too=True)), lambda: (*rotary.make(), *rotary.make()),
            rotary.norm_rope_backward, 3 * rotary.bytes, arrange=list, note="RoPE, then two norms",
        )  # fmt: skip
        del rotary

    def kernel(module: str, name: str) -> Callable:
        return getattr(__import__(f"liger_kernel.ops.{module}", fromlist=[name]), name)

    def forward(module: str) -> Callable:
        function = kernel(module, f"{module}_forward")
        return lambda gate, up: function(gate, up)[2]

    def backward(module: str) -> Callable:
        function = kernel(module, f"{module}_backward")
        return lambda d_out, gate, up: function(gate, up, d_out)

    modules = {"swiglu": "swiglu", "geglu_tanh": "geglu"}
    measure_gates(
        recorder,
        tokens,
        column,
        {operation: functools.partial(forward, module) for operation, module in modules.items()},
        {operation: functools.partial(backward, module) for operation, module in modules.items()},
        product=False,
        arrange=list,
    )


# Torch itself.


def torch_itself(recorder: Recorder, tokens: int) -> None:
    """Measures a copy of q and k, and three ways to attend within documents."""
    rotary = Rotary(recorder.shape, tokens)
    recorder.column(
        ("rope", "forward", None, tokens), "copy (torch)", lambda: lambda q, k: (q.clone(), k.clone()), rotary.make,
        None, 2 * rotary.bytes,
    )  # fmt: skip
    if "attention" not in recorder.request["only"]:
        return
    N, K, H = rotary.N, rotary.K, rotary.H
    del rotary
    for mix, lengths in recorder.request["lengths"][str(tokens)].items():

        def make_forward(gradient: bool = False) -> tuple[torch.Tensor, ...]:
            shapes = [(tokens, heads, H) for heads in (N, K, K, *([N] if gradient else []))]
            return tuple(normal(*shape) for shape in shapes)

        def make_both() -> tuple[torch.Tensor, ...]:
            q, k, v, d_out = make_forward(gradient=True)
            return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), d_out

        def both(function: Callable) -> Callable:
            def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d_out: torch.Tensor) -> tuple:
                out = function(q, k, v)
                return (out.detach(), *torch.autograd.grad(out, (q, k, v), d_out))

            return run

        ways: list[tuple[str, Callable[[], Callable], str]] = [
            ("torch varlen", functools.partial(varlen, lengths, tokens, H), "FlashAttention-2"),
            ("torch flex", functools.partial(flex, lengths, tokens, recorder.request["smoke"]), ""),
        ]
        if len(set(lengths)) == 1:
            ways.insert(1, ("cuDNN (torch)", functools.partial(cudnn, len(lengths), H), ""))
        moved = 4 * tokens * (N + K) * H
        for column, build, note in ways:
            for direction in ("forward", "forward_backward"):
                grad = direction == "forward_backward"

                def wrapped(build: Callable = build, grad: bool = grad) -> Callable:
                    return both(build()) if grad else torch.no_grad()(build())

                recorder.column(
                    ("attention", direction, mix, tokens), column, wrapped, make_both if grad else make_forward,
                    functools.partial(attention_reference, lengths), moved,
                    arrange=list if grad else lambda out: [out], note=note,
                )  # fmt: skip
        if len(set(lengths)) > 1:
            for direction in ("forward", "forward_backward"):
                recorder.missing(
                    ("attention", direction, mix, tokens), "cuDNN (torch)", "documents of different lengths"
                )


def attention_reference(
    lengths: list[int], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d_out: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Returns the output and, with `d_out`, the gradients, in float32, one document at a time."""
    K, group = k.shape[1], q.shape[1] // k.shape[1]
    results = [torch.empty(x.shape, device=x.device) for x in ((q,) if d_out is None else (q, q, k, v))]
    begin = 0
    for length in lengths:
        at, begin = slice(begin, begin + length), begin + length
        later = torch.ones(length, length, device=q.device, dtype=torch.bool).triu(1)
        step = K if length <= 2048 else 1
        for head in range(0, K, step):
            heads = slice(head * group, (head + step) * group)
            one_q, one_k, one_v = (
                x[at, here].detach().float().requires_grad_(d_out is not None)
                for x, here in ((q, heads), (k, slice(head, head + step)), (v, slice(head, head + step)))
            )
            keys, values = (x.repeat_interleave(group, dim=1) for x in (one_k, one_v))
            scores = torch.einsum("tnh,snh->nts", one_q, keys) / math.sqrt(q.shape[2])
            out = torch.einsum("nts,snh->tnh", scores.masked_fill(later, -math.inf).softmax(dim=-1), values)
            results[0][at, heads] = out.detach()
            if d_out is not None:
                gradients = torch.autograd.grad(out, (one_q, one_k, one_v), d_out[at, heads].float())
                for result, gradient, here in zip(
                    results[1:], gradients, (heads, *[slice(head, head + step)] * 2), strict=True
                ):
                    result[at, here] = gradient
    return results


def varlen(lengths: list[int], tokens: int, head_dim: int) -> Callable:
    """Returns `torch.nn.attention.varlen`; repeats key and value heads within the timed call if torch does not."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    if "enable_gqa" in known:
        options["enable_gqa"] = True

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: Any = varlen_attn(q, k, v, ends, ends, max(lengths), max(lengths), **options)
        return out

    def attend_repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, *repeated(q, k, v))

    return attend if takes_fewer_kv_heads(attend, tokens, head_dim) else attend_repeated


def repeated(q: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """Repeats key and value heads so that every query head has one."""
    return [x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in others]


def takes_fewer_kv_heads(attend: Callable, tokens: int, head_dim: int) -> bool:
    """Returns whether grouped heads work, forward and backward."""
    q, k = (normal(tokens, heads, head_dim).requires_grad_() for heads in (4, 1))
    try:
        (d_k,) = torch.autograd.grad(attend(q, k, k).float().square().sum(), k)
    except Exception as error:
        print(f"key and value heads are repeated, because grouped heads failed: {error!r}", flush=True)
        return False
    return d_k.shape == k.shape


def cudnn(documents: int, head_dim: int) -> Callable:
    """Returns cuDNN's `scaled_dot_product_attention` for documents of one length."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = SDPBackend.CUDNN_ATTENTION if DEVICE == "cuda" else SDPBackend.MATH

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.unflatten(0, (documents, -1)).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    def attend_repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, *repeated(q, k, v))

    return attend if takes_fewer_kv_heads(attend, documents * 128, head_dim) else attend_repeated


def block_mask(first: torch.Tensor) -> Any:
    """Builds flex_attention's mask from each token's first key, block by block, never from all pairs."""
    from torch.nn.attention.flex_attention import BlockMask

    tokens = len(first)
    count = tokens // BLOCK
    rows = first.cpu().view(count, BLOCK)
    begin = rows[:, 0] // BLOCK  # each token's first key never decreases
    whole = -(-rows[:, -1] // BLOCK)  # from here to the diagonal every pair is allowed
    partial_lists, full_lists = [], []
    for i in range(count):
        full = list(range(min(int(whole[i]), i), i))
        partial_lists.append([j for j in range(int(begin[i]), i + 1) if j not in set(full)])
        full_lists.append(full)

    def tensors(lists: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        indices = torch.zeros(1, 1, count, count, dtype=torch.int32)
        for i, blocks in enumerate(lists):
            rest = sorted(set(range(count)) - set(blocks))  # torch wants every block named once
            indices[0, 0, i] = torch.tensor([*blocks, *rest], dtype=torch.int32)
        sizes = torch.tensor([[[len(blocks) for blocks in lists]]], dtype=torch.int32)
        return sizes.to(first.device), indices.to(first.device)

    def allowed(b: Any, h: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (key >= first[query])

    return BlockMask.from_kv_blocks(
        *tensors(partial_lists), *tensors(full_lists), BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(tokens, tokens)
    )


def first_keys(lengths: list[int]) -> torch.Tensor:
    """Returns the first token of each token's document."""
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).repeat_interleave(torch.tensor(lengths))
    return starts.to(torch.int32).to(DEVICE)


def flex(lengths: list[int], tokens: int, smoke: bool) -> Callable:
    """Returns `flex_attention`, compiled for these shapes."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(first_keys(lengths))
    torch._dynamo.reset()
    function = flex_attention if smoke else torch.compile(flex_attention, dynamic=False)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))
        return function(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attend


if __name__ == "__main__":
    main()
