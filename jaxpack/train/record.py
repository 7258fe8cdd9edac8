"""Reads the JSON of a checkpoint, and checks each field before it is used."""

import dataclasses
import datetime
import re
import reprlib
from pathlib import Path
from typing import Any

from jaxpack.errors import reason
from jaxpack.utils.checks import is_date
from jaxpack.utils.checksums import CHECKSUMS, DamagedError, read_checked
from jaxpack.utils.json_file import parse_json

FILE = "run/metadata"  # where orbax writes the part `run`

_REQUIRED = ("identity", "notes", "step", "evaluations")
_OPTIONAL = ("date", "checksums", "base", "stream", "chat_template")  # Checkpoints of older versions lack them.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
ARRAY = "array "  # how the names of the state's arrays begin in an identity
_DESCRIBED = re.compile(r"(\w+)\[([\d, ]*)\]")  # such as float32[2, 8, 64]
_STEP = re.compile("0|[1-9][0-9]{0,11}")  # of an evaluation, which may come before the first step


@dataclasses.dataclass(frozen=True)
class Record:
    """Holds the JSON of a checkpoint, see `checkpoint.identity_of` and `checkpoint.notes_of`."""

    identity: dict[str, Any]
    notes: dict[str, str]
    date: datetime.date | None
    step: int
    evaluations: dict[int, float]
    base: str = ""  # the name or path of the model that is trained, if it is known
    stream: dict[str, str] = dataclasses.field(default_factory=dict)  # describes the arrays of the place in a stream
    chat_template: str = ""  # the text of the tokenizer's template, if it has one

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns the shape and the dtype of each array of the state by its name, as the identity describes them."""
        return _read_shapes(
            {name.removeprefix(ARRAY): text for name, text in self.identity.items() if name.startswith(ARRAY)}
        )

    @property
    def stream_arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns the shape and the dtype of each array of the place in a stream; empty without a stream."""
        return _read_shapes(self.stream)

    def to_json(self) -> dict[str, Any]:
        """Returns the record in the form that `read_record` reads."""
        assert self.date is not None
        evaluations = {str(step): loss for step, loss in self.evaluations.items()}
        # The name of the list of checksums stands here, so that it is missed if it is lost.
        more = {"date": self.date.isoformat(), "checksums": CHECKSUMS, "base": self.base}
        more |= {"stream": self.stream} if self.stream else {}
        more |= {"chat_template": self.chat_template} if self.chat_template else {}
        return {"identity": self.identity, "notes": self.notes, "step": self.step, "evaluations": evaluations} | more


def read_record(path: Path) -> Record:
    """Returns the record of a checkpoint.

    Raises:
      DamagedError: the file or a field of it is missing, damaged, or not of the type and range that it must have.
      OSError: the file must not be read by this user.
    """
    content = read_checked(path, FILE)
    try:
        fields = parse_json(content, finite=False)
    except ValueError as error:
        raise DamagedError(f"{FILE} is not valid JSON: {reason(error):.200}") from error
    if not isinstance(fields, dict):
        raise DamagedError(f"{FILE} must be a JSON object, got {shown(fields)}")
    if missing := [name for name in _REQUIRED if name not in fields]:
        raise DamagedError(f"{FILE} is without the fields {missing}")
    if unknown := [name for name in fields if name not in _REQUIRED + _OPTIONAL]:
        raise DamagedError(f"{FILE} has the unknown field {unknown[0]!r:.80}")
    if "checksums" in fields:
        _check("checksums", fields["checksums"] == CHECKSUMS, f"be {CHECKSUMS!r}", fields["checksums"])
        if not (path / CHECKSUMS).exists():
            raise DamagedError(f"{CHECKSUMS} is missing")
    identity, step = _object("identity", fields["identity"]), _step(fields["step"])
    evaluations = _evaluations(fields["evaluations"], step)
    without = "eval_dataset" in identity and identity["eval_dataset"] is None
    _check("evaluations", not (without and evaluations), "be empty in a run without `eval_dataset`", evaluations)
    base, template = (fields.get(name, "") for name in ("base", "chat_template"))
    _check("base", isinstance(base, str), "be a text", base)
    _check("chat_template", isinstance(template, str), "be a text", template)
    notes, date, stream = _notes(fields["notes"]), _date(fields), _stream(fields)
    return Record(identity, notes, date, step, evaluations, base, stream, template)


def describe_array(array: Any) -> str:
    """Returns the shape and the dtype of an array as a record has them, such as float32[2, 8, 64]."""
    return f"{array.dtype}{list(array.shape)}"


def _read_shapes(described: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    matches = {name: _DESCRIBED.fullmatch(str(text)) for name, text in described.items()}
    return {
        name: (tuple(map(int, match[2].replace(",", " ").split())), match[1])
        for name, match in matches.items()
        if match is not None
    }


def shown(value: object) -> str:
    """Returns a short form of a value from a file, for a message."""
    return _SHORT.repr(value)


def _check(field: str, ok: bool, rule: str, value: object) -> None:
    if not ok:
        raise DamagedError(f"the field `{field}` of {FILE} must {rule}, got {shown(value)}")


def _object(field: str, value: Any) -> dict[str, Any]:
    _check(field, isinstance(value, dict), "be a JSON object", value)
    return value


def _notes(value: Any) -> dict[str, str]:
    for name, note in _object("notes", value).items():
        is_text = isinstance(note, str) and 0 < len(note) <= 200
        _check("notes", is_text, f"have a text of 1 to 200 characters as {shown(name)}", note)
    return value


def _date(fields: dict[str, Any]) -> datetime.date | None:
    if "date" not in fields:
        return None
    value = fields["date"]
    _check("date", isinstance(value, str) and is_date(value), "be a date in the form YYYY-MM-DD", value)
    return datetime.date.fromisoformat(value)


def _stream(fields: dict[str, Any]) -> dict[str, str]:
    value = _object("stream", fields.get("stream", {}))
    for name, text in value.items():
        is_shape = isinstance(text, str) and _DESCRIBED.fullmatch(text) is not None
        _check("stream", is_shape, f"have a shape such as int32[2, 8] as {shown(name)}", text)
    return value


def _step(value: Any) -> int:
    _check("step", type(value) is int and value > 0, "be a whole number above 0", value)
    return value


def _evaluations(value: Any, last: int) -> dict[int, float]:
    for step, loss in _object("evaluations", value).items():
        is_step = _STEP.fullmatch(step) is not None and int(step) <= last
        _check("evaluations", is_step, f"have whole numbers from 0 to {last} as names", step)
        _check("evaluations", isinstance(loss, float), f"have a loss (a number with a point) as {step!r}", loss)
    return {int(step): loss for step, loss in sorted(value.items(), key=lambda item: int(item[0]))}
