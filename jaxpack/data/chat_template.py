"""Writes conversations with a chat template, and finds the characters that the assistant has to learn.

These are the characters that the assistant would generate: from the end of the generation prompt to the token that
ends the assistant's turn. A template with `{% generation %}` tags marks them itself. With any other template, a similar
conversation is written, with marks in the place of its contents: around the marks is the template's own text. The
row's text must then equal that text, to the letter, with the row's contents in the place of the marks. If it does not
(dropped thoughts, tool calls), each turn is replaced alone by a mark, and the row must begin and end as the text with
the mark does. A row that neither way decides is refused.
"""

import contextlib
import dataclasses
import datetime
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxpack.data import written
from jaxpack.data.conversation import Conversation, Message, with_arguments
from jaxpack.data.template_limits import limited
from jaxpack.data.tokenizer import ChatTokenizer
from jaxpack.data.written import MARK, MARKS
from jaxpack.errors import InputError, reason

Span = tuple[int, int]  # the first character, and the one after the last

_QUESTION = {"role": "user", "content": MARK.format(0)}
_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# transformers gives templates a function, `strftime_now`, which reads the clock. This macro takes its place, and writes
# the date of the run. The line break belongs to the last tag and is not written.
_CLOCK = (
    "{%- macro strftime_now(format) %}{% set now = namespace(text=format) %}"
    "{% for code, value in CODES.items() %}{% set now.text = now.text | replace(code, value) %}{% endfor %}"
    "{{ now.text }}{% endmacro %}\n"
)
_CODES = [f"%{dash}{letter}" for dash in ("-", "") for letter in "aAbBcCdDeFgGhHIjklmMnpPrRStTuUVwWxXyYzZ%"]
_FORMAT = re.compile(r"""(['"])([^'"\n]*%-?[a-zA-Z][^'"\n]*)\1""")
_MAX_KNOWN = 1024  # most forms of conversations, and most edges of turns, to keep


class _Undecided(Exception):
    """Says why the assistant's part of a text cannot be told from the template's."""


class _Edges(NamedTuple):
    """Counts characters around an assistant's content that are trained on with it.

    `lead` characters stand before the content and `tail` after it; the last `end` of these must end the turn.
    """

    lead: int
    tail: int
    end: int


@dataclasses.dataclass(frozen=True)
class _Form:
    """Describes conversations with the same roles: the template's text around contents, and whose contents they are."""

    between: list[str]  # one text more than there are slots
    slots: list[int]  # the number of the message whose content fills each slot
    edges: dict[int, _Edges]  # by slot, for the assistant's turns that are trained on


class ChatTemplate:
    """Writes conversations with the chat template of a tokenizer, which must have one.

    Attributes:
      endless: the number of conversations so far whose last turn to learn ends without an added token, so that no end
        of a turn is learned.
      date_used: the date that the template has asked for, or None if it has not.
      left_out: by kind, the number of conversations in which the template leaves out thoughts, tools or system texts,
        and the first of them in words.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, *, allow_lost_thoughts: bool = False, date: datetime.date | None = None
    ):
        self.endless = 0
        self.left_out: dict[str, tuple[int, str]] = {}
        self.date_used: datetime.date | None = None
        self._allow_lost_thoughts = allow_lost_thoughts
        self._date = datetime.date.today() if date is None else date
        self._dated: dict[str, tuple[str, list[str]]] = {}
        self._written: dict[Any, Mapping[written.Piece, int] | None] = {}
        self._tokenizer = tokenizer
        self._tokens = tuple(token for token in tokenizer.get_added_vocab() if token.strip())
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._forms: dict[Any, _Form] = {}
        self._edges: dict[Any, _Edges] = {}
        self._checked: set[tuple[str, bool]] = set()

    def write(self, conversation: Conversation, where: str) -> str:
        """Returns the text of a conversation. `where` names its row in errors.

        Raises:
          InputError: the template refuses the conversation, or leaves a part of it out.
        """
        conversation = self._with_readable_calls(conversation)
        text = self._write(conversation, where)
        self._require_all(conversation, text, where)
        return text

    def write_question(self, conversation: Conversation, where: str) -> str:
        """Returns the text of a conversation, followed by what the template puts before an answer."""
        conversation = self._with_readable_calls(conversation)
        return self._write(conversation, where, add_generation_prompt=True)

    def answer_end(self) -> str | None:
        """Returns the token that ends a plain answer, or None if there is none or the template leaves it undecided."""
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        trial = ChatTemplate(self._tokenizer)  # this question is no row, and must not be counted as one
        with contextlib.suppress(InputError):
            text, spans = trial.write_with_spans(Conversation(messages), "a question")
            trained = text[: spans[-1][1]].rstrip() if spans else ""
            return max((token for token in self._tokens if trained.endswith(token)), key=len, default=None)
        return None

    def write_with_spans(self, conversation: Conversation, where: str) -> tuple[str, list[Span]]:
        """Returns the text of a conversation, and the spans of it that are trained on: ascending, without overlap.

        Raises:
          InputError: the template refuses the conversation, leaves a part of it out, or does not show which parts are
            the assistant's.
        """
        conversation = self._with_readable_calls(conversation)
        try:
            template = self._tokenizer.get_chat_template(tools=conversation.tools)
        except ValueError as error:  # there are several templates, and none is the default
            raise _refused(error, where) from error
        tagged = _TAG.search(template) is not None
        try:
            if tagged:
                text, spans = self._tagged(conversation, template, where)
                self._require_all(conversation, text, where)
                roles = [message.get("role") for message in conversation.messages]
                if any(role == "assistant" and not conversation.is_trained(i) for i, role in enumerate(roles)):
                    spans = list(_overlaps(spans, self._compared(conversation, text, where)))
            else:
                text = self._write(conversation, where)
                self._require_all(conversation, text, where)
                spans = self._compared(conversation, text, where)
        except _Undecided as why:
            tags = "its {% generation %} tags" if tagged else "{% generation %} and {% endgeneration %}"
            raise InputError(
                f"The chat template must show which part of its text the assistant writes, but {why}, in {where}. Put"
                f" {tags} around that part in the template, or turn `assistant_only_loss` off to train on every token."
            ) from None
        if spans:
            self.endless += not text[: spans[-1][1]].rstrip().endswith(self._tokens)
        return text, spans

    def _require_all(self, conversation: Conversation, text: str, where: str) -> None:
        """Refuses a conversation of which the template leaves a part out; counts parts that may be left out."""
        key = written.form_of(conversation)
        if key not in self._written:
            try:
                form = written.written_pieces(conversation, lambda messages: self._apply(conversation, messages))
            except Exception:  # the template may parse what it gets
                form = None
            _keep(self._written, key, form)
        assistants = [i for i, message in enumerate(conversation.messages) if message.get("role") == "assistant"]
        counted = set()
        for piece in written.unwritten(conversation, text, self._written[key]):
            is_last = piece.kind == written.THOUGHT and assistants[-1:] == [piece.message]
            is_learned = is_last and conversation.is_trained(piece.message)
            # Some templates write tools and system texts only if the last message is a question (Mistral's), and most
            # write only the thoughts of the last answer.
            may_be_lost = piece.kind in (written.TOOL, written.SYSTEM) or (
                piece.kind == written.THOUGHT and not is_learned
            )
            if piece.is_doubled or not (may_be_lost or (is_learned and self._allow_lost_thoughts)):
                raise _unwritten(conversation, piece, where)
            if piece.kind not in counted:
                counted.add(piece.kind)
                count, first = self.left_out.get(piece.kind, (0, f"{where}: {piece.text.strip()[:80]!r}"))
                self.left_out[piece.kind] = count + 1, first

    def _write(self, conversation: Conversation, where: str, **options: Any) -> str:
        try:
            return self._apply(conversation, conversation.messages, **options)
        except Exception as error:  # a template may raise any exception
            raise _refused(error, where) from error

    def _apply(self, conversation: Conversation, messages: Sequence[Message], **options: Any) -> str:
        template = self._tokenizer.get_chat_template(tools=conversation.tools)
        dated, dates = self._with_date(template)
        given = {"chat_template": dated} if dated != template else {}
        with limited(template):
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=conversation.tools, tokenize=False, **{**given, **conversation.options, **options}
            )
        if any(date in text for date in dates):
            self.date_used = self._date
        return text

    def _with_date(self, template: str) -> tuple[str, list[str]]:
        """Returns a template that writes the date of the run in the place of today's, and that date as it writes it."""
        if "strftime_now" not in template:
            return template, []
        if template not in self._dated:
            codes = json.dumps({code: self._date.strftime(code) for code in _CODES})
            dates = [self._date.strftime(match[2]) for match in _FORMAT.finditer(template)]
            self._dated[template] = _CLOCK.replace("CODES", codes) + template, dates
        return self._dated[template]

    def _with_readable_calls(self, conversation: Conversation) -> Conversation:
        """Returns the conversation with calls in the form in which the template writes them.

        Some templates take arguments as JSON text (DeepSeek's), or an empty content beside calls but no missing one, or
        the reverse.
        """
        if not any(message.get("tool_calls") for message in conversation.messages):
            return conversation
        readable = []
        for other_content, as_json in itertools.product((False, True), repeat=2):
            messages = [_with_calls(message, other_content, as_json) for message in conversation.messages]
            candidate = dataclasses.replace(conversation, messages=messages)
            with contextlib.suppress(Exception):
                text = self._apply(candidate, messages)
                if not any(piece.kind == written.CALL for piece in written.unwritten(candidate, text, None)):
                    return candidate
                readable.append(candidate)
        return readable[0] if readable else conversation

    # Finding the assistant's parts by the template's tags.

    def _tagged(self, conversation: Conversation, template: str, where: str) -> tuple[str, list[Span]]:
        try:
            text, spans = self._track(conversation, template, conversation.messages)
        except Exception as error:
            raise _refused(error, where) from error
        calls = [i for i, message in enumerate(conversation.messages) if message.get("tool_calls")]
        if (template, bool(calls)) not in self._checked:
            marked = [_marked(message, i) for i, message in enumerate(conversation.messages)]
            try:
                trial, trial_spans = self._track(conversation, template, marked)
            except Exception as error:
                raise _Undecided(f"it refuses a similar conversation ({reason(error)})") from None
            slots = _split(trial)[1]
            tagged = [trial[begin:end] for begin, end in trial_spans]
            answers = any(marked[i].get("role") == "assistant" for i in slots)
            if answers and any(tagged) and not any(map(MARKS.search, tagged)):
                # transformers places tags that are within a macro at the beginning of the macro's text.
                raise _Undecided("its tags are not where they seem to be: tags within a macro are misplaced")
            if answers:
                self._checked.add((template, bool(calls)))
        return text, [span for span in sorted(spans) if span[0] < span[1]]

    def _track(self, conversation: Conversation, template: str, messages: list[Message]) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        template, dates = self._with_date(template)
        with limited(template):
            rendered: Any = render_jinja_template(
                conversations=[messages],
                tools=conversation.tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **{**self._tokenizer.special_tokens_map, **conversation.options},
            )
        texts, spans = rendered
        if any(date in texts[0] for date in dates):
            self.date_used = self._date
        return texts[0], spans[0]

    # Finding the assistant's parts by comparing the texts that the template writes.

    def _compared(self, conversation: Conversation, text: str, where: str) -> list[Span]:
        messages = conversation.messages
        if not any(map(conversation.is_trained, range(len(messages)))):
            return []
        if "\ufdd0" in text:
            raise _Undecided("the row holds U+FDD0, which is not a character")
        if any(message.get("tool_calls") for message in messages if message.get("role") == "assistant"):
            return self._one_by_one(conversation, text, self._form(conversation, where))
        key = self._key(conversation)
        form = self._forms.get(key)
        spans = _matched(text, form, messages) if form is not None else None
        if spans is not None:
            return spans
        form = self._form(conversation, where)
        _keep(self._forms, key, form)
        spans = _matched(text, form, messages)
        return self._one_by_one(conversation, text, form) if spans is None else spans

    def _key(self, conversation: Conversation) -> Any:
        kinds = tuple(
            (message.get("role"), written.inline_thought(message) is not None, *sorted(message))
            for message in conversation.messages
        )
        trained = conversation.prompt, conversation.untrained
        return kinds, trained, repr(conversation.tools), repr(conversation.options)

    def _form(self, conversation: Conversation, where: str) -> _Form:
        marked = [_marked(message, i) for i, message in enumerate(conversation.messages)]
        between, slots = _split(self._try(conversation, marked))
        edges = {}
        for i, message in enumerate(marked):
            if not conversation.is_trained(i):
                continue
            if i not in slots:
                raise _Undecided(f"it leaves out message {i} of a similar conversation")
            if slots.count(i) > 1:
                raise _Undecided(f"it writes message {i} more than once")
            slot = slots.index(i)
            previous = slots[slot - 1] if slot else None
            key = between[slot], between[slot + 1], previous is None, i + 1 == len(marked), repr(conversation.options)
            if key not in self._edges:
                plain = set(message) <= set(_QUESTION) and written.inline_thought(message) is None
                lead = self._lead(conversation, marked[:i], between[slot], previous, plain=plain)
                _keep(self._edges, key, _Edges(lead, *self._tail(conversation, marked, i, between[slot + 1])))
            edges[slot] = self._edges[key]
        return _Form(between, slots, edges)

    def _lead(
        self, conversation: Conversation, before: list[Message], opening: str, previous: int | None, *, plain: bool
    ) -> int:
        """Returns how many characters before a content the assistant writes: those that the generation prompt lacks."""
        given = self._given(conversation, before, previous)
        if given is None:
            prompt = self._generation_prompt(conversation)
            if not prompt or opening.count(prompt) != 1:
                raise _Undecided(
                    f"its generation prompt {prompt!r} is not found once in the text before a turn, {opening!r:.200}"
                )
            return len(opening) - opening.index(prompt) - len(prompt)
        shared = common_prefix(opening, given)
        if shared < min(len(opening), len(given)):  # the prompt may open a thought and the turn not, or the reverse
            if opening.rstrip() == given.rstrip():  # the row may open its thought with other white space
                return 0
            others = (
                self._given(conversation, before, previous, enable_thinking=thinking) or given
                for thinking in (False, True)
            )
            shares = ((common_prefix(opening, other), min(len(opening), len(other))) for other in others)
            shared = next((share for share, least in shares if share == least), None)
            if shared is None:
                for header in () if plain else self._headers(conversation, before, previous):
                    if opening.startswith(header):
                        return len(opening) - len(header)
                raise _Undecided(f"a turn begins after {opening!r:.200}, but its generation prompt is {given!r:.200}")
        if shared == len(opening):
            return 0
        rest = opening[shared:]
        prompt = self._generation_prompt(conversation) if rest.strip() else ""
        if prompt and rest.lstrip().startswith(prompt.lstrip()):  # it is omitted only after this message
            return len(rest.lstrip()) - len(prompt.lstrip())
        if rest.strip() and not prompt and self._writes_headers(conversation):
            raise _Undecided(f"it has no generation prompt that tells {rest!r:.200} from an answer")
        return len(rest)

    def _headers(self, conversation: Conversation, before: list[Message], previous: int | None) -> Iterator[str]:
        """Yields the text that opens a plain answer in the place of one that calls tools or thinks.

        The answer is tried as the last turn, and as one before a user's message.
        """
        i = len(before)
        answer = {"role": "assistant", "content": MARK.format(i)}
        for after in ([], [{"role": "user", "content": MARK.format(i + 1)}]):
            with contextlib.suppress(_Undecided):
                between, slots = _split(self._try(conversation, [*before, answer, *after]))
                if slots.count(i) == 1:
                    opening = between[slots.index(i)]
                    yield opening[: len(opening) - self._lead(conversation, before, opening, previous, plain=True)]

    def _given(
        self, conversation: Conversation, before: list[Message], previous: int | None, **options: Any
    ) -> str | None:
        """Returns the text between the content of message `previous` and an answer after `before`; None if unknown."""
        try:
            text = self._apply(conversation, before, add_generation_prompt=True, **options)
        except Exception:  # a template may refuse an empty conversation
            return None
        between, slots = _split(text)
        return between[-1] if slots and slots[-1] == previous else None

    def _generation_prompt(self, conversation: Conversation) -> str:
        """Returns the text that the template adds to a question before an answer; empty if it adds none."""
        without, prompted = (self._try(conversation, [_QUESTION], add_generation_prompt=add) for add in (False, True))
        return prompted[common_prefix(without, prompted) :]

    def _writes_headers(self, conversation: Conversation) -> bool:
        """Returns whether the template writes more than white space before a plain answer to a question."""
        answer = {"role": "assistant", "content": MARK.format(1)}
        alone, answered = (self._after(conversation, messages, 0) for messages in ([_QUESTION], [_QUESTION, answer]))
        return bool(answered[common_prefix(answered, alone) :].strip())

    def _tail(self, conversation: Conversation, marked: list[Message], i: int, after: str) -> tuple[int, int]:
        """Returns how many characters after a content end the turn, and how many of them are its end token or words."""
        alone = followed = after
        if i + 1 < len(marked):
            alone = self._after(conversation, marked[: i + 1], i)
        else:
            with contextlib.suppress(_Undecided):  # the template may refuse a user's message here
                followed = self._after(conversation, [*marked, {"role": "user", "content": MARK.format(i + 1)}], i)
        # The text that both share is neither the end of the text nor the beginning of the next message.
        shared = alone[: common_prefix(alone, followed)]
        for token in itertools.chain(self._added.finditer(alone), self._added.finditer(followed)):
            if token.start() < len(shared) < token.end():
                shared = shared[: token.start()]
        tokens = list(self._added.finditer(shared))
        if tokens:
            # After the end token, only EOS may follow. Other text would be a message that the template adds.
            rest = shared[tokens[-1].end() :].strip() or alone[len(shared) :].strip()
            if rest and rest != self._tokenizer.special_tokens_map.get("eos_token"):
                raise _Undecided(f"a turn ends in {followed!r:.200}, but the last one in {alone!r:.200}")
            return tokens[-1].end(), len(tokens[-1].group())
        first = self._first_token(after)
        if first and after != alone:  # the last turn may end in another token than turns before it
            first = first if self._first_token(alone) and self._ends_questions(conversation, first.group()) else None
        if first:
            return first.end(), len(first.group())
        words = shared.rstrip()
        if not words:
            return 0, 0
        if shared != alone:
            raise _Undecided(f"a turn ends in {followed!r:.200}, but the last one in {alone!r:.200}")
        return len(words), len(words.lstrip())

    def _first_token(self, text: str) -> re.Match | None:
        return self._added.match(text, len(text) - len(text.lstrip()))

    def _ends_questions(self, conversation: Conversation, token: str) -> bool:
        """Returns whether a token ends a question: it also stands before an answer, so it opens no user's message."""
        after = _split(self._try(conversation, [_QUESTION], add_generation_prompt=True))[0][-1]
        first = self._first_token(after)
        return first is not None and first.group() == token

    def _after(self, conversation: Conversation, messages: list[Message], i: int) -> str:
        between, slots = _split(self._try(conversation, messages))
        if slots.count(i) != 1:
            raise _Undecided(f"it writes message {i} differently if that is the last message")
        return between[slots.index(i) + 1]

    def _try(self, conversation: Conversation, messages: list[Message], **options: Any) -> str:
        try:
            return self._apply(conversation, messages, **options)
        except Exception as error:
            raise _Undecided(f"it refuses a similar conversation ({reason(error)})") from None

    def _one_by_one(self, conversation: Conversation, text: str, form: _Form) -> list[Span]:
        """Finds each turn as the part of the text that changes when a mark takes its place."""
        spans = []
        for slot, (lead, tail, end) in form.edges.items():
            i = form.slots[slot]
            messages = list(conversation.messages)
            messages[i] = _marked(messages[i], i)
            between, slots = _split(self._try(conversation, messages))
            before, after = between[0], between[-1]
            unlike = slots != [i] or not before.endswith(form.between[slot])
            unlike |= not after.startswith(form.between[slot + 1][:tail])
            head, rest = before[: len(before) - lead], after[tail - end :]
            if unlike or not (text.startswith(head) and text.endswith(rest)) or len(head) + len(rest) > len(text):
                raise _Undecided(f"the text around message {i} depends on its content")
            spans.append((len(head), len(text) - len(rest) + end))
        if any(begin < end for (_, end), (begin, _) in itertools.pairwise(spans)):
            raise _Undecided("the assistant's turns overlap")
        return spans


def _keep(known: dict, key: Any, value: Any) -> None:
    """Adds an entry, and first clears a full table: if each row had its own form, the table would grow without end."""
    if len(known) >= _MAX_KNOWN:
        known.clear()
    known[key] = value


def _refused(error: Exception, where: str) -> InputError:
    return InputError(f"The chat template must accept every row, but it refuses {where}: {reason(error)}.")


def _unwritten(conversation: Conversation, piece: written.Unwritten, where: str) -> InputError:
    does = "writes more than once" if piece.is_doubled else "leaves out"
    kind = "tool calls" if piece.kind == written.CALL else piece.kind
    role = conversation.messages[piece.message].get("role")
    advice = "Change the row, or use another chat template."
    if piece.kind == written.THOUGHT:
        advice = (
            "Turn `allow_lost_thoughts` on to train on the answer without them, or use a template that writes them."
        )
    return InputError(
        f"The chat template must write all that a row says once, but it {does} the {kind} of message {piece.message}"
        f" (role {role!r}), {piece.text.strip()!r:.80}, in {where}. {advice}"
    )


def _with_calls(message: Message, other_content: bool, as_json: bool) -> Message:
    """Returns a message with its calls in another form: beside an empty content or none, or with arguments as JSON."""
    if not message.get("tool_calls"):
        return message
    message = dict(message)
    if other_content and "content" not in message:
        message["content"] = ""
    elif other_content and not message["content"].strip():
        del message["content"]
    if as_json:
        message["tool_calls"] = [with_arguments(call, _to_json) for call in message["tool_calls"]]
    return message


def _to_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _marked(message: Message, i: int) -> Message:
    """Returns the message with a mark in the place of its content, and of the arguments of its calls.

    A thought that the content begins with keeps its tags and gets a mark of its own: templates go by the tags.
    """
    mark = MARK.format(i)
    calls = message.get("tool_calls")
    if message.get("role") != "assistant":
        return {**message, "content": mark} if isinstance(message.get("content"), str) else message
    content = {"content": mark} if message.get("content") or not calls else {}
    if (inline := written.inline_thought(message)) is not None:
        content = {"content": inline[1] + (mark if inline[2].strip() else inline[2]) + inline[3] + mark}
    if not calls:
        return {**message, **content}
    arguments = {mark: mark}

    def mark_arguments(given: Any) -> Any:
        return _to_json(arguments) if isinstance(given, str) else arguments

    return {**message, **content, "tool_calls": [with_arguments(call, mark_arguments) for call in calls]}


def _split(text: str) -> tuple[list[str], list[int]]:
    """Returns the texts around marks, and the number of the message of each mark.

    Text between two marks of one message counts as a part of the message.
    """
    between, slots, end = [], [], 0
    for match in MARKS.finditer(text):
        i = int(match[1])
        if slots[-1:] != [i]:
            between.append(text[end : match.start()])
            slots.append(i)
        end = match.end()
    return [*between, text[end:]], slots


def _matched(text: str, form: _Form, messages: Sequence[Message]) -> list[Span] | None:
    """Returns the spans to train on if `text` is the form filled with the contents, trimmed or not; else None."""
    if not text.startswith(form.between[0]):
        return None
    spans, at = [], len(form.between[0])
    for slot, (i, after) in enumerate(zip(form.slots, form.between[1:], strict=True)):
        for content in _trimmed(messages[i].get("content")):
            end = at + len(content)
            if text.startswith(content, at) and text.startswith(after, end):
                break
        else:
            return None
        if slot in form.edges:
            edges = form.edges[slot]
            spans.append((at - edges.lead, end + edges.tail))
        at = end + len(after)
    return spans if at == len(text) else None


def _trimmed(content: Any) -> tuple[str, str]:
    """Returns a content as templates may write it: as it is and stripped; empty if it is not text."""
    content = content if isinstance(content, str) else ""
    return content, content.strip()


def common_prefix(a: Sequence, b: Sequence) -> int:
    """Returns the number of leading items that two sequences share."""
    shared = min(len(a), len(b))
    if a[:shared] == b[:shared]:  # the usual case, and far faster than the loop
        return shared
    return next((i for i in range(shared) if a[i] != b[i]), shared)


def _overlaps(spans: list[Span], others: list[Span]) -> Iterator[Span]:
    for begin, end in spans:
        for other_begin, other_end in others:
            if max(begin, other_begin) < min(end, other_end):
                yield max(begin, other_begin), min(end, other_end)
