"""Loads dataset rows with a small tokenizer, and shows the documents that they become."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers_for_tests import small_tokenizer
from transformers import PreTrainedTokenizerFast

from jaxpack.data.documents import Documents
from jaxpack.data.reading import load_documents
from jaxpack.errors import InputError

PLAIN, CHAT = small_tokenizer(), small_tokenizer(chat=True)
VOCABULARY = len(PLAIN)
EOS_ID = PLAIN.eos_token_id


def load(dataset: Any, tokenizer: PreTrainedTokenizerFast | None = PLAIN, **options: Any) -> Documents:
    return load_documents(dataset, tokenizer, **({"vocab_size": VOCABULARY} | options))


def as_arrow(rows: list[dict]) -> Any:
    """Returns the rows as a `datasets.Dataset`. Imports it late, since a GPU machine may not have it."""
    import datasets

    return datasets.Dataset.from_list(rows)


def tokens_of(documents: Documents, which: int) -> list[int]:
    return documents.tokens[documents.starts[which] :][: documents.lengths[which]].tolist()


def labels_of(documents: Documents, which: int) -> list[int]:
    return documents.labels[documents.starts[which] :][: documents.lengths[which]].tolist()


def texts(documents: Documents) -> list[tuple[str, str]]:
    """Decodes each document: its whole text, and the text that is trained on."""
    return [
        (
            PLAIN.decode(tokens_of(documents, which)),
            PLAIN.decode([label for label in labels_of(documents, which) if label != -100]),
        )
        for which in range(len(documents))
    ]


def pieces(documents: Documents, which: int = 0) -> list[str]:
    return PLAIN.convert_ids_to_tokens(tokens_of(documents, which))


def write_jsonl(path: Path, rows: Iterable[Any], between: str = "\n") -> Path:
    path.write_text(between.join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def refusal(dataset: Any, tokenizer: PreTrainedTokenizerFast | None = PLAIN, **options: Any) -> str:
    """Returns the message with which a dataset is refused, and checks that it is one sentence."""
    with pytest.raises(InputError) as caught:
        load(dataset, tokenizer, **options)
    message = str(caught.value)
    assert "\n" not in message, message
    assert message.endswith("."), message
    assert not message.endswith(".."), message
    return message
