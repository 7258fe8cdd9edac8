"""Describes a run in the lines that it prints before its first step."""

from jaxpack.data.batching import Batches, BatchSource
from jaxpack.data.documents import Documents
from jaxpack.data.stream import StreamedBatches
from jaxpack.settings import TrainConfig


def describe(documents: Documents, batches: Batches, config: TrainConfig) -> list[str]:
    """Returns lines that describe a run: its data, truncation, layout and steps, and the shapes to compile."""
    trained = int(documents.num_targets.sum())
    lines = [
        f"{len(documents):,} documents, {documents.num_tokens:,} tokens, {trained:,} of them to train on"
        f" ({trained / documents.num_tokens:.0%})"
    ]
    cut = batches.truncation
    if cut.documents:
        lines.append(
            f"max_length {config.max_length:,} cuts {cut.documents:,} documents"
            f" and loses {cut.tokens:,} tokens ({cut.tokens / documents.num_tokens:.1%})"
        )
    if cut.dropped:
        lines.append(f"{cut.dropped:,} documents then have no token left to train on, and are dropped")
    if first := int(batches.documents.num_targets.sum()) - batches.targets_per_epoch:
        lines.append(
            f"{first:,} tokens are each the first of a piece of a split document: no token predicts them, so they are"
            " not trained on"
        )
    if config.packing:
        lines.append(
            f"packing ({config.packing_strategy}): {batches.num_rows:,} rows of {config.max_length:,} tokens,"
            f" {batches.packing_efficiency:.2%} full, {len(batches.documents) / batches.num_rows:.1f} documents each"
        )
    else:
        lines.append(
            "padding-free: the documents of a step lie end to end"
            if config.padding_free
            else "padded: each document takes a row, filled up with padding"
        )
    lines.append(
        f"steps: {batches.num_steps:,} ({batches.steps_per_epoch:,} in an epoch); {batches.padding_share:.2%} of their"
        f" positions are padding; shapes to compile (micro-batches x rows x tokens): {shapes_to_compile(batches)}"
    )
    if batches.num_devices > 1:
        each, kind = config.per_device_train_batch_size, "rows" if config.packing else "documents"
        lines.append(
            f"a step takes {batches.rows_per_step:,} {kind}: {each:,} on each of {batches.num_devices} devices, times"
            f" {config.gradient_accumulation_steps} micro-batches; the busiest device has {batches.imbalance:.1%} more"
            " work in attention than the mean"
        )
    return lines


def shapes_to_compile(batches: BatchSource) -> str:
    """Returns the shapes of a run's batches in words."""
    return ", ".join(f"{A} x {B} x {T}" for A, B, T in batches.shapes)


def describe_stream(batches: StreamedBatches, config: TrainConfig) -> list[str]:
    """Returns lines that describe a run on a stream, of which only the first rows are known."""
    documents, sample = batches.documents, batches.sample
    trained = int(documents.num_targets.sum())
    lines = [
        f"a stream: its first {len(documents):,} documents have {documents.num_tokens:,} tokens, {trained:,} of them to"
        f" train on ({trained / documents.num_tokens:.0%})"
    ]
    if sample.truncation.documents:
        lines.append(f"max_length {config.max_length:,} cuts {sample.truncation.documents:,} of these documents")
    again = "after its last row the stream begins again" if batches.begins_again else "the stream may end before them"
    lines += [
        f"packing ({config.packing_strategy}) of {batches.window:,} documents at a time: rows of"
        f" {config.max_length:,} tokens, {len(sample.documents) / sample.num_rows:.1f} documents each",
        f"steps: {batches.num_steps:,}; {again}; shapes to compile (micro-batches x rows x tokens):"
        f" {shapes_to_compile(batches)}",
    ]
    return lines
