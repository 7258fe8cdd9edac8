"""Implements `jaxpack generate`, which completes prompts with an adapter, without it, or both."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

import torch_bridge
from jaxpack.cli.options import from_flags, with_flags
from jaxpack.cli.reading import (
    LOAD_IN_4BIT_HELP,
    AdapterOption,
    BaseOption,
    DtypeOption,
    check_sources,
    read_base,
    require_model_or_adapter,
    require_new_output,
)
from jaxpack.data.conversation import Conversation
from jaxpack.data.formats import text_prompt
from jaxpack.data.named_templates import set_chat_template
from jaxpack.data.reading import load_prompts
from jaxpack.errors import InputError, errors_name, visible
from jaxpack.generation.text import generate_text
from jaxpack.settings import GenerateConfig
from jaxpack.utils.compilation_cache import ProgramCache
from jaxpack.utils.console import TextConsole, console
from jaxpack.utils.files import write_new_file


@with_flags(GenerateConfig)
def generate(
    model: BaseOption = None,
    adapter: AdapterOption = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to answer or to continue; may be given several times.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="JSON, JSONL or Parquet file of prompts, instead of --prompt. Each row has prompt; messages;"
            " conversations; or instruction and input. Answers at the end of messages are left out."
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Answer each text as a user's message in a chat, or continue it as plain text.",
            show_default="as a message if the tokenizer has a chat template",
        ),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            help="Chat template, instead of the tokenizer's own: alpaca, chatml, gemma, llama3, phi3, phi4 or vicuna,"
            " or a file with a Jinja template, as in jaxpack train. An adapter is best used with the template of its"
            " training, which lies beside it.",
            show_default="the one beside the adapter, or else the model's",
        ),
    ] = None,
    compare: Annotated[bool, typer.Option(help="Also generate without the adapter, for comparison.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="New JSONL file for prompts and completions. Without it, they are shown.")
    ] = None,
    dtype: DtypeOption = None,
    load_in_4bit: Annotated[bool, typer.Option(help=LOAD_IN_4BIT_HELP)] = False,
    **flags: object,
) -> None:
    """Generate text from a model, with or without an adapter."""
    config = from_flags(GenerateConfig, flags)
    _check_arguments(model, adapter, prompt, prompts, compare, output)
    if chat_template is not None and chat is False:
        raise InputError("`chat_template` must be left out with `--no-chat`, which writes no template, got both.")
    network, tokenizer = read_base(model, adapter, dtype, load_in_4bit=load_in_4bit)
    if tokenizer is None:
        raise InputError("`model` must have a tokenizer, got a model without one.")
    if chat_template is not None:
        set_chat_template(tokenizer, chat_template)
    if chat is None:
        chat = tokenizer.chat_template is not None
        if chat:
            console.print(
                "each text is asked as in a chat, with the tokenizer's chat template; `--no-chat` continues it as plain"
                " text instead"
            )
    if prompts is None:
        asked = [text_prompt(text, chat=chat) for text in prompt or ()]
    else:
        with errors_name(dataset="prompts"):
            asked = load_prompts(prompts, chat=chat)

    def write() -> list[str]:
        return generate_text(network, tokenizer, asked, **dataclasses.asdict(config))

    written = {}
    with ProgramCache("auto").in_use():
        if compare:
            written["without the adapter"] = write()
        if adapter is not None:
            torch_bridge.load_adapter(network, str(adapter))
        written["completion" if adapter is None else "with the adapter"] = write()
    if output is None:
        _show(asked, written)
        return
    try:
        _save(asked, written, output)
    except InputError:
        _show(asked, written)  # generation may have taken long: the result is shown rather than lost
        raise


def _check_arguments(
    model: str | None,
    adapter: Path | None,
    prompt: list[str] | None,
    prompts: Path | None,
    compare: bool,
    output: Path | None,
) -> None:
    require_model_or_adapter(model, adapter)
    if compare and adapter is None:
        raise InputError("`compare` must be given with an `adapter`, got none.")
    if bool(prompt) == (prompts is not None):
        raise InputError(f"`prompt` or `prompts` must be given, and not both, got {'both' if prompt else 'none'}.")
    if prompt and not all(prompt):
        raise InputError("`prompt` must have text, got ''.")
    if prompts is not None:
        check_sources([str(prompts)], "prompts")
    require_new_output(output)


def _show(asked: Sequence[str | Conversation], written: dict[str, list[str]]) -> None:
    shown = TextConsole(width=None if sys.stdout.isatty() else 120)
    for number, (prompt, *texts) in enumerate(zip(asked, *written.values(), strict=True), 1):
        shown.print(Rule(f"prompt {number}", align="left", style="bold"))
        shown.print(Text(visible(_text(prompt)), "grey50"))
        texts = [Text(visible(text), "green") for text in texts]
        if len(texts) > 1:
            table = Table(*written, expand=True, header_style="cyan")
            table.add_row(*texts)
            shown.print(table)
        else:
            shown.print(Rule(*written, align="left", style="cyan"), *texts)


def _text(prompt: str | Conversation) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role')}: {message.get('content', '')}" for message in prompt.messages)


def _save(asked: Sequence[str | Conversation], written: dict[str, list[str]], output: Path) -> None:
    """Writes one JSON line per prompt: `prompt`, `completion` and, with `compare`, `without_adapter`."""
    lines = []
    *others, completions = written.values()
    for i, prompt in enumerate(asked):
        line = {"prompt": prompt if isinstance(prompt, str) else prompt.messages, "completion": completions[i]}
        if others:
            line["without_adapter"] = others[0][i]
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_new_file(output, "".join(lines).encode(), "output")
    console.print(f"saved {output}")
