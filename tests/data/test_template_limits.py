"""Tests that no chat template of a stranger runs for ever or fills the memory, and that others run as before."""

import resource
import threading
import time

import pytest
from chat_templates import STYLES
from conversations import chat
from tokenizers import Regex, pre_tokenizers
from tokenizers_for_tests import small_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from jaxpack.data import template_limits
from jaxpack.data.chat_template import ChatTemplate
from jaxpack.data.conversation import Conversation
from jaxpack.data.reading import load_documents
from jaxpack.errors import InputError
from jaxpack.utils.time_limit import Limit

MESSAGES = (
    "{% for m in messages %}{{ m.role + ':' + m.content + '<e>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
HOSTILE = {
    "loops within loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a text doubled again and again": (
        "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}"
    ),
    "a text joined to itself again and again": (
        "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x ~ n.x %}{% endfor %}"
    ),
    "a list doubled again and again": (
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}"
    ),
    "a text times a number": "{{ 'a' * 10**10 }}",
    "a number times a text": "{% set n = 10000000000 %}{{ n * 'a' }}",
    "a list times a number": "{{ ([0] * 10**10) | length }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a power of a variable": "{% set n = 999999 %}{{ (n ** n ** 2) % 7 }}",
    "a product of long numbers": (
        "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x % 7 }}"
    ),
    "a format": "{{ '%0999999999d' % 1 }}",
    "a format with a width of its own": "{{ '%*d' % (999999999, 1) }}",
    "a format method": "{{ '{:>999999999}'.format(1) }}",
    "a format method with a width of its own": "{{ '{:{w}}'.format(1, w='999999999') }}",
    "a format of a million signs": "{{ ('{' + ':' * 999999).format(1) }}",
    "a format filter": "{{ '%999999999d' | format(1) }}",
    "a centered text": "{{ 'a' | center(999999999) }}",
    "a centered text by a method": "{{ 'a'.center(999999999) }}",
    "zeros before a text": "{{ 'a'.zfill(999999999) }}",
    "an indented text": "{{ ('a\n' * 99999) | indent(99999) }}",
    "an indented text by a text": "{{ ('a\n' * 99999) | indent('x' * 99999) }}",
    "tabs": "{{ ('\t' * 99999).expandtabs(99999) }}",
    "a replacement": "{{ ('a' * 9999999).replace('a', 'b' * 9999999) }}",
    "a replacement of nothing": "{{ ('a' * 9999999) | replace('', 'b' * 999) }}",
    "a translation": "{{ ('a' * 999999).translate({97: 'b' * 999999}) }}",
    "a joined list": "{{ (['a' * 999999] * 99999) | join }}",
    "a joined list by a method": "{{ ('a' * 999999).join(['b'] * 99999) }}",
    "a joined generator": "{{ range(99999) | map('string') | join('a' * 999999) }}",
    "a long text in a loop": "{% set x = 'a' * 999999 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "a long text in a block": (
        "{% set x = 'a' * 999999 %}{% set y %}{% for i in range(99999) %}{{ x }}{% endfor %}{% endset %}{{ y }}"
    ),
    "lists within lists": (
        "{% set n = namespace(x=[1]) %}{% for i in range(12) %}{% set n.x = [n.x, n.x, n.x, n.x, n.x, n.x, n.x, n.x] %}"
        "{% endfor %}{{ n.x }}"
    ),
    "lists within lists as JSON": (
        "{% set n = namespace(x=[1]) %}{% for i in range(12) %}{% set n.x = [n.x, n.x, n.x, n.x, n.x, n.x, n.x, n.x] %}"
        "{% endfor %}{{ n.x | tojson }}"
    ),
    "JSON that is indented": "{{ [1, [2, [3]]] | tojson(indent=999999999) }}",
    "words of nothing": "{{ lipsum(n=99999) }}",
    "many parts": "{{ range(9) | slice(999999999) | list | length }}",
    "parts filled up": "{{ range(9) | batch(999999999, 'x') | list | length }}",
    "a macro that calls itself": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "parentheses": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "blocks within blocks": "{% if true %}" * 3000 + "{% endif %}" * 3000,
    "a long template": "x" * (2 << 20),
    "the inside of Python": "{{ ''.__class__.__mro__[1].__subclasses__() | length + 1 }}",
    "the inside of a function": "{{ raise_exception.__globals__['os'].system('id') }}",
    "the inside by a format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}{{ 1 / 0 }}",
    "the inside by attr": "{{ (messages | attr('__class__')).mro() }}",
    "a change of the messages": "{% for i in range(9) %}{{ messages.append(messages[0]) }}{% endfor %}",
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens the limits, so that the tests need less time and memory."""
    monkeypatch.setattr(template_limits, "_limit", Limit(1.0, 256 << 20))
    monkeypatch.setattr(template_limits, "_ended", {})


def of_template(template: str):
    tokenizer = small_tokenizer(specials=("<e>",))
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.usefixtures("short")
# The exception of the watch may arrive in a callback of another library, which cannot be ended; it then comes again.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_cases_a_hostile_template_is_refused_in_time_and_memory(name: str):
    tokenizer = of_template(HOSTILE[name] + MESSAGES)
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as refused:
        load_documents([{"messages": chat("a", "b")}] * 5, tokenizer, vocab_size=len(tokenizer))
    assert time.monotonic() - begin < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 << 20  # KiB
    assert str(refused.value).startswith("The chat template must accept every row, but it refuses row 0")
    assert len(str(refused.value)) < 800
    assert "uid=" not in str(refused.value)


def test_the_messages_alone_are_written():
    tokenizer = of_template(MESSAGES)
    assert load_documents([{"messages": chat("a", "b")}], tokenizer, vocab_size=len(tokenizer)).num_targets == [2]


@pytest.mark.usefixtures("short")
def test_cases_a_template_that_is_slow_only_for_other_rows_is_refused_there():
    slow = "{% if 'slow' in messages[0].content %}" + HOSTILE["loops within loops"] + "{% endif %}" + MESSAGES
    tokenizer = of_template(slow)
    rows = [{"messages": chat("a", "b")}] * 3 + [{"messages": chat("slow", "b")}]
    with pytest.raises(InputError, match=r"it refuses row 3 of the dataset: it takes longer than 1 seconds"):
        load_documents(rows, tokenizer, vocab_size=len(tokenizer))


@pytest.mark.usefixtures("short")
def test_cases_a_template_that_reached_a_limit_is_not_tried_again():
    template = ChatTemplate(of_template(HOSTILE["loops within loops"] + MESSAGES))
    for longest in (10.0, 0.1):
        begin = time.monotonic()
        with pytest.raises(InputError, match="it takes longer than 1 seconds"):
            template.write(Conversation(chat("a", "b")), "a row")
        assert time.monotonic() - begin < longest


@pytest.mark.usefixtures("short")
def test_cases_tags_do_not_avoid_the_limits():
    for name in ("loops within loops", "a long text in a loop", "a text times a number"):
        text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}" + HOSTILE[name]
        tokenizer = of_template(text)
        with pytest.raises(InputError, match="The chat template must accept every row, but it refuses row 0"):
            load_documents([{"messages": chat("a", "b")}], tokenizer, vocab_size=len(tokenizer))


PLAIN = {
    "{{ '%05.1f|%s|%d' % (1.5, 'a', 3) }}": "001.5|a|3",
    "{{ 'a' * 3 ~ 1 ~ none ~ [1, 'b'] }}": "aaa1None[1, 'b']",
    "{{ 2 ** 10 }} {{ 7 % 4 }} {{ 'ab' | center(6) }}|": "1024 3   ab  |",
    "{{ 'a\nb' | indent(2) }} {{ ['a', 'b'] | join(', ') }} {{ 'aXb'.replace('X', '--') }}": "a\n  b a, b a--b",
    "{{ {'a': [1, {'b': none}]} | tojson(indent=1) }}": '{\n "a": [\n  1,\n  {\n   "b": null\n  }\n ]\n}',
    "{{ range(5) | map('string') | join('-') }} {{ '{:>4}'.format('x') }} {{ 'a,b'.split(',') }}": (
        "0-1-2-3-4    x ['a', 'b']"
    ),
    "{{ '{\"a\": %s, \"b\": {' % 1 }} {{ '%d%% of 1234567' % 5 }} {{ '{{{}}}: 1234567'.format(2) }}": (
        '{"a": 1, "b": { 5% of 1234567 {2}: 1234567'
    ),
    "{{ 'x' | replace('x', 'yy') }}{{ [1, 2, 3] | batch(2) | list }}{{ messages }}": "yy[[1, 2], [3]][]",
}


@pytest.mark.parametrize("template", PLAIN)
def test_ordinary_operations_are_as_in_transformers(template: str):
    with template_limits.limited(template):
        texts, _ = render_jinja_template(conversations=[[]], chat_template=template)
    assert texts == [PLAIN[template]]


@pytest.mark.parametrize("style", STYLES)
def test_long_conversations_are_far_from_the_limits(style: str):
    tokenizer = STYLES[style].tokenizer()
    rows = [{"messages": chat(*["a long text, " * 5000, "a long answer, " * 5000] * 4)}]
    assert load_documents(rows, tokenizer, vocab_size=len(tokenizer)).num_tokens > 100_000


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "(?:a|a+)+!?$"])
def test_cases_a_pattern_of_a_tokenizer_that_never_ends_is_refused(pattern: str):
    tokenizer = of_template(MESSAGES)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    begin = time.monotonic()
    with pytest.raises(InputError, match="The tokenizer must encode every text, but it failed with"):
        load_documents([{"text": "a" * 300 + "b"}], tokenizer, vocab_size=len(tokenizer))
    assert time.monotonic() - begin < 20


# The watch itself.


def test_code_that_ends_in_time_is_not_disturbed():
    limit = Limit(0.5, 1 << 30)
    for _ in range(20_000):
        with limit.watch():
            pass
    with limit.watch():
        time.sleep(1.0)  # waiting does not count
    with pytest.raises(KeyError), limit.watch():
        raise KeyError


def test_an_exception_never_arrives_after_the_code():
    limit = Limit(0.03, 1 << 30)
    ended = 0
    for i in range(60):
        begin = time.thread_time()
        try:
            with limit.watch():
                while time.thread_time() - begin < 0.02 + i / 2000:
                    pass
        except TimeoutError:
            ended += 1
        for _ in range(1000):
            pass
    assert 0 < ended < 60


def test_code_in_another_thread_and_code_that_catches_everything_is_ended():
    caught: list[BaseException] = []

    def run() -> None:
        try:
            with Limit(0.2, 1 << 30).watch():
                while True:
                    try:
                        sum(range(1000))
                    except Exception as error:
                        caught.append(error)
        except TimeoutError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert [str(error) for error in caught] == ["it takes longer than 0.2 seconds"]


def test_threads_are_watched_apart():
    limit, ended = Limit(0.3, 1 << 30), []

    def run(seconds: float) -> None:
        begin = time.thread_time()
        try:
            with limit.watch():
                while time.thread_time() - begin < seconds:
                    pass
        except TimeoutError:
            ended.append(seconds)

    threads = [threading.Thread(target=run, args=(seconds,)) for seconds in (0.05, 60.0, 0.1, 50.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(ended) == [50.0, 60.0]


def test_memory_is_limited():
    held = []

    def fill() -> None:
        with Limit(20.0, 64 << 20).watch():
            while len(held) < 2000:
                held.append(bytearray(b"x" * (1 << 20)))
                time.sleep(0.001)

    with pytest.raises(TimeoutError, match="it takes more than 64 MiB of memory"):
        fill()
    assert len(held) < 1000
