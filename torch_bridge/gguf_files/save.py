"""Writes a model, merged with its adapters if it has any, as a GGUF file with a `Modelfile` for Ollama beside it."""

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxpack.data.tokenizer import Tokenizer
from jaxpack.errors import InputError, not_installed, reason
from jaxpack.model.lora import adapters, require_finite
from jaxpack.model.transformer import Transformer
from jaxpack.parallel.device import on_host
from jaxpack.parallel.processes import is_first_process
from jaxpack.utils.console import console
from jaxpack.utils.files import require_new_file, require_room, whole_file, write_new_file
from torch_bridge.config_json import CONFIG_FILE
from torch_bridge.gguf_files.architecture import (
    Architecture,
    architecture_of,
    describe,
    extra_tensors,
    gguf_names,
    laid_out,
)
from torch_bridge.gguf_files.vocabulary import Vocabulary, read_vocabulary
from torch_bridge.merged import Merging
from torch_bridge.rounding import Q8_0, Q8_0_BLOCK
from torch_bridge.tensors import model_tensors, tensor_shapes

# The form of a merged weight before it is packed, see `Merging`.
QUANTIZE = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "q8_0": Q8_0}
_LLAMA_QUANTIZES = ("q2_k", "q3_k", "q4_0", "q4_1", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k", "iq", "mxfp4", "tq")


def save_gguf(
    model: Transformer,
    path: str | Path,
    tokenizer: Tokenizer | None,
    *,
    quantize: str = "bf16",
    base: str | None = None,
) -> None:
    """Writes a model as one GGUF file, which llama.cpp and Ollama run.

    Adapters are merged into the weights as `save_merged` does it, and the difference between the logits of the merged
    and of the trained model, with the weights rounded as in the file, is printed. The file holds the tokenizer with its
    chat template, too. One tensor at a time is in the host's memory. Vectors, such as norms, stay in float32.

    Beside the file lies a `Modelfile` with the name of the file and the tokens that end an answer: `ollama create NAME
    -f model.Modelfile` makes a model of the two.

    Args:
      path: a new file whose name ends in .gguf.
      tokenizer: the tokenizer of the model.
      quantize: how matrices are stored. "bf16", "f16" and "f32" are dtypes. "q8_0" has 8 bits a weight: blocks of 32
        share a scale, which makes 8.5 bits together.
      base: as in `save_merged`, for a model in 4 bits.

    Raises:
      InputError: llama.cpp has no such model or tokenizer, or computes parts of it in another way; there is a file
        already; the disk is full; the weights are not finite; or the Python package gguf is not installed.

    Example:
      >>> import torch_bridge
      >>> model, tokenizer = torch_bridge.from_pretrained("path/to/Qwen3-4B")
      >>> torch_bridge.save_gguf(model, "model.gguf", tokenizer, quantize="q8_0")
    """
    require_gguf("`save_gguf`")
    import gguf

    path = Path(path)
    require_quantize(quantize)
    require_new_gguf(path)
    architecture = architecture_of(model.config)
    source = json.loads(dict(model.source_files).get(CONFIG_FILE, "{}"))
    bos = source.get("bos_token_id")
    vocabulary = read_vocabulary(tokenizer, model.config.vocab_size, bos=bos if type(bos) is int else None)
    merging, changed = None, []
    if adapters(model):
        merging = Merging.of(model, QUANTIZE[quantize], base)
        model, architecture = merging.model, architecture_of(merging.model.config)  # which may have become untied
        tensors = merging.tensors(changed, casts_all=False)
    elif base is not None:
        raise InputError(
            f"`base` must be None for a model without adapters, which is written as it is, got {base!r:.200}."
        )
    else:
        model.read_weights()
        require_finite(model)
        tensors = model_tensors(model)
    hosted = ((name, on_host(tensor) if isinstance(tensor, jax.Array) else tensor) for name, tensor in tensors)
    if is_first_process():
        forms = {name: _form(shape, quantize) for name, shape in tensor_shapes(model).items()}
        extra = extra_tensors(model.config)
        writer = gguf.GGUFWriter(None, architecture.name)
        _describe_file(writer, model, quantize)
        describe(writer, model.config, architecture)
        vocabulary.write(writer)
        size = _announce(writer, model, architecture, forms, extra)
        require_room(path, "path", size)
        with whole_file(path, "path") as partial:
            try:
                _write(writer, partial, _packed(hosted, model, architecture, forms), extra.values())
            finally:
                writer.close()
            if merging is not None:
                merging.require_change(changed)
        write_new_file(_modelfile(path), _modelfile_text(path, vocabulary).encode(), "path")
    else:
        for _ in hosted:  # takes part in gathering what is in shards
            pass
        if merging is not None:
            merging.require_change(changed)
    if merging is not None:
        merging.report(changed)
    if is_first_process():
        console.print(
            f"{path}: {quantize}, {path.stat().st_size / 2**20:,.1f} MiB, and {_modelfile(path).name} for Ollama"
        )


def require_gguf(what: str) -> None:
    """Refuses `what`, a function or a flag, if the Python package gguf is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise not_installed(what, "gguf", "gguf") from error


def require_quantize(quantize: str) -> None:
    """Refuses a form that is not written, and names the tool that writes it."""
    if quantize in QUANTIZE:
        return
    hint = ""
    if str(quantize).lower().startswith(_LLAMA_QUANTIZES):
        hint = (
            " Write 'bf16', and let llama.cpp quantise that file further: `llama-quantize model.gguf"
            f" model-{str(quantize).lower():.20}.gguf {str(quantize).lower():.20}`."
        )
    raise InputError(f"`quantize` must be one of {', '.join(map(repr, QUANTIZE))}, got {quantize!r:.40}.{hint}")


def require_new_gguf(path: Path) -> None:
    """Refuses a path for a GGUF file where a file lies, or one where the `Modelfile` would lie."""
    if path.suffix != ".gguf":
        raise InputError(f"`path` must end in .gguf, got {str(path)!r:.200}.")
    require_new_file(path, "path")
    require_new_file(_modelfile(path), "path")


def _modelfile(path: Path) -> Path:
    return path.with_suffix(".Modelfile")


def _modelfile_text(path: Path, vocabulary: Vocabulary) -> str:
    """Returns a `Modelfile`. Ollama makes its own template from the chat template in the file, if it knows that one."""
    lines = [f"FROM ./{path.name}"]
    lines += [f'PARAMETER stop "{stop}"' for stop in vocabulary.stops if '"' not in stop and stop.isprintable()]
    return "\n".join(lines) + "\n"


def _form(shape: tuple[int, ...], quantize: str) -> Any:
    """Returns the type of a tensor in the file. Vectors, and rows that cannot be cut into blocks, stay in float32."""
    import gguf

    if len(shape) == 1 or (quantize == "q8_0" and shape[-1] % Q8_0_BLOCK):
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType[quantize.upper()]


def _describe_file(writer: Any, model: Transformer, quantize: str) -> None:
    import gguf

    name = Path(model.config.name_or_path).name
    writer.add_type(gguf.GGUFType.MODEL)
    if name:
        writer.add_name(name)
    kind = "ALL_F32" if quantize == "f32" else f"MOSTLY_{quantize.upper()}"
    writer.add_file_type(gguf.LlamaFileType[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _announce(
    writer: Any,
    model: Transformer,
    architecture: Architecture,
    forms: dict[str, Any],
    extra: dict[str, np.ndarray],
) -> int:
    """Lists all tensors in the head of the file, in the order in which they follow. Returns their bytes."""
    import gguf

    shapes = tensor_shapes(model)
    names = gguf_names(shapes, model.config, architecture)
    listed = [(names[name], shape, forms[name]) for name, shape in shapes.items()]
    listed += [(name, array.shape, gguf.GGMLQuantizationType.F32) for name, array in extra.items()]
    size = 0
    for name, shape, form in listed:
        elements, block_bytes = gguf.GGML_QUANT_SIZES[form]
        count = math.prod(shape) // elements * block_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), count, raw_dtype=form)
        size += writer.ggml_pad(count, writer.data_alignment)
    return size


def _packed(
    tensors: Iterable[tuple[str, ArrayLike]], model: Transformer, architecture: Architecture, forms: dict[str, Any]
) -> Iterator[np.ndarray]:
    import gguf

    for name, tensor in tensors:
        array = laid_out(name, tensor, model.config, architecture).astype(np.float32)
        with np.errstate(over="ignore"):  # a weight that is too large for float16 is refused below
            packed = gguf.quants.quantize(np.ascontiguousarray(array), forms[name])
        if not np.isfinite(packed if packed.dtype == np.float16 else array).all():
            form = forms[name].name.lower()
            raise InputError(
                f"`model` must have finite weights in {form}, got NaN or infinite values in {name}. float16 ends at"
                " 65,504: choose 'bf16' as `quantize`, or check the losses of the training."
            )
        yield packed


def _write(writer: Any, path: Path, tensors: Iterable[np.ndarray], extra: Iterable[np.ndarray]) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for packed in itertools.chain(tensors, extra):
        try:
            writer.write_tensor_data(packed)
        except OSError as error:
            if error.errno is not None:
                raise
            # NumPy does not say why it could write only a part.
            raise OSError(f"the disk took only a part of the data, and is probably full ({reason(error)})") from error
