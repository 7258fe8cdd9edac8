"""Generation gives, token for token, what forward passes without a cache give, for every row as if it were alone."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chat_templates import STYLES
from flax import nnx
from kernels.oracles import quick_jit
from models import small_model
from tokenizers_for_tests import EOS, TURN_ENDS, small_tokenizer

import jaxpack
from jaxpack import InputError, LoraConfig, Transformer, generate, generate_text
from jaxpack.data.chat_template import ChatTemplate
from jaxpack.data.conversation import Conversation
from jaxpack.generation.decode import decode_step, prefill
from jaxpack.model.config import DynamicRopeScaling, LongRopeScaling, RopeConfig

ORIGINAL = 30  # original context of the scaled ropes: some prompts are shorter, and some texts get longer
_LONG = LongRopeScaling(
    short_factor=tuple(1 + i / 20 for i in range(8)),
    long_factor=tuple(4.0 + 2 * i for i in range(8)),
    original_max_position_embeddings=ORIGINAL,
    factor=4.0,
)
_DYNAMIC = DynamicRopeScaling(factor=3.0, max_position_embeddings=ORIGINAL)

KINDS: dict[str, tuple[str, dict]] = {
    "qwen3": ("qwen3", {"max_position_embeddings": 128}),
    "gemma3": ("gemma3", {"num_layers": 2}),  # soft-caps, post norms, and one layer with a window and its own rope
    "qwen3_moe": ("qwen3_moe", {}),
    "windowed": (
        "llama",
        {
            "sliding_window": 7,
            "local_layers": None,
            "qkv_bias": True,
            "out_bias": True,
            "mlp_bias": True,
            "activation": "gelu",
        },
    ),
    "partial_longrope": (
        "llama",
        {"fused_projections": True, "rope": RopeConfig(theta=1e4, scaling=_LONG, partial_rotary_factor=0.8)},
    ),
    "dynamic": (
        "llama",
        {"rope": RopeConfig(theta=1e4, scaling=_DYNAMIC), "max_position_embeddings": ORIGINAL},  # texts may get longer
    ),
}
PROMPTS = [np.random.default_rng(i).integers(0, 97, length).tolist() for i, length in enumerate((25, 1, 40, 13, 29))]


def make_model(kind: str, *, lora: bool = True, **settings: object) -> Transformer:
    """Makes a model with larger weights than in other tests, so that the text is not one token repeated."""
    family, changes = KINDS[kind]
    model = small_model(family, lora=LoraConfig(r=4) if lora else None, **changes, **settings)
    for _, parameter in nnx.iter_graph(model):
        if isinstance(parameter, nnx.LoRAParam) or not isinstance(parameter, nnx.Variable):
            continue
        value = parameter.get_value()
        if len(value.shape) == 3:
            parameter.set_value(jax.tree.map(lambda x: 3 * x, value))
    return model


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Transformer:
    return make_model(request.param)


@pytest.fixture(scope="module")
def plain() -> Transformer:
    return make_model("qwen3", lora=False)


def without_cache(model: Transformer, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Decodes greedily, with one forward pass over all of the text for each token."""
    texts = [list(prompt) for prompt in prompts]
    for _ in range(max_new_tokens):
        tokens = np.zeros((len(texts), 64), np.int32)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = text
        lengths = np.array([len(text) for text in texts])
        segments = (np.arange(64)[None, :] < lengths[:, None]).astype(np.int32)
        logits = np.asarray(model.logits(jnp.asarray(tokens), jnp.asarray(segments)))
        for text, row in zip(texts, logits, strict=True):
            text.append(int(row[len(text) - 1].argmax()))
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def test_greedy_is_that_of_forward_passes_without_a_cache(model):
    expected = without_cache(model, PROMPTS, 20)
    assert len({token for text in expected for token in text}) > 15, "a text that says little"
    assert generate(model, PROMPTS, max_new_tokens=20) == expected


def test_a_prompt_in_a_batch_is_continued_as_alone():
    """With LongRoPE, texts that outgrow the original context make the model read the whole batch again."""
    model = make_model("partial_longrope")
    together = generate(model, PROMPTS, max_new_tokens=20)
    assert generate(model, PROMPTS, max_new_tokens=20, batch_size=1) == together


@pytest.mark.parametrize(
    ("kind", "dtype"), [pytest.param("gemma3", jnp.float32, marks=pytest.mark.slow), ("qwen3", jnp.bfloat16)]
)
def test_each_token_has_the_logits_of_a_forward_pass(kind, dtype):
    """Float32 logits differ only by the order of sums; bfloat16 rounds in other places and is off by some steps."""
    model = make_model(kind, dtype=dtype)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 40)).astype(np.int32)
    lengths = np.array([20, 11], np.int32)
    expected = np.asarray(model.logits(jnp.asarray(tokens)))
    atol = 1e-4 if dtype == jnp.float32 else 0.1 * expected.std()
    begin = quick_jit(lambda tokens, lengths: prefill(model, tokens, lengths, size=48))
    step = quick_jit(lambda *arguments: decode_step(model, *arguments))
    logits, cache = begin(jnp.asarray(tokens[:, :24]), jnp.asarray(lengths))
    for i in range(20):
        places = lengths + i
        np.testing.assert_allclose(logits, expected[[0, 1], places - 1], rtol=0, atol=atol)
        logits, cache = step(jnp.asarray(tokens[[0, 1], places]), jnp.asarray(places), cache)


def test_a_longer_prompt_and_a_longer_text_than_one_program_is_for(plain):
    """Programs are compiled for 32, 64 or 128 tokens; a longer text is neither cut off nor overwritten."""
    prompt = np.random.default_rng(5).integers(0, 97, 31).tolist()
    text = prompt + generate(plain, [prompt], max_new_tokens=66)[0]
    assert len(text) == 97
    assert text[65:] == generate(plain, [text[:65]], max_new_tokens=32)[0]
    logits = np.asarray(plain.logits(jnp.asarray([text])))[0]
    assert logits[30:96].argmax(axis=1).tolist() == text[31:]


# --- Sampling ---


def test_a_seed_says_what_is_drawn_whatever_else_is_in_the_batch(plain):
    options = {"max_new_tokens": 6, "temperature": 1.0}
    drawn = generate(plain, [PROMPTS[0]] * 3, seed=1, **options)
    assert generate(plain, [PROMPTS[0]] * 3, seed=1, batch_size=2, **options) == drawn  # the second batch has one row
    assert generate(plain, [PROMPTS[0]] * 3, seed=2, **options) != drawn
    assert len(set(map(tuple, drawn))) == 3  # each row draws for itself
    hot = generate(plain, [PROMPTS[0]] * 3, seed=1, max_new_tokens=6, temperature=1e6)
    assert len(np.unique(hot)) > 12  # and so does each token


def sampled(model: Transformer, **options: object) -> np.ndarray:
    """Counts how often each token follows the second prompt in 1,024 draws."""
    drawn = generate(model, [PROMPTS[1]] * 1024, max_new_tokens=1, batch_size=512, **options)
    return np.bincount(np.concatenate(drawn), minlength=97)


def probabilities(model: Transformer, temperature: float) -> np.ndarray:
    logits = np.asarray(model.logits(jnp.asarray([PROMPTS[1]])), np.float64)[0, -1] / temperature
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def assert_drawn_from(counts: np.ndarray, expected: np.ndarray) -> None:
    """Asserts that chi-square is at most 5 deviations above its mean, the degrees of freedom (variance: twice that)."""
    assert not counts[expected == 0].any()
    order = np.argsort(expected)
    # Rare tokens share a cell, so that each cell expects ten draws.
    cells = np.minimum(np.cumsum(expected[order]) * counts.sum() // 10, 1e9).astype(int)
    observed, wanted = (np.bincount(cells, x[order]) for x in (counts, expected * counts.sum()))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    assert freedom >= 2
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    assert statistic < freedom + 5 * np.sqrt(2 * freedom), (statistic, freedom)


@pytest.mark.parametrize("temperature", [pytest.param(0.4, marks=pytest.mark.slow), 1.0])
def test_tokens_are_drawn_as_often_as_their_probability_says(plain, temperature):
    assert_drawn_from(sampled(plain, temperature=temperature), probabilities(plain, temperature))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 5}, lambda p: np.arange(97) < 5),
        ({"top_p": 0.6}, lambda p: np.cumsum(p) - p < 0.6),
        # `top_p` is a share of the probability of the first `top_k` tokens.
        ({"top_k": 8, "top_p": 0.7}, lambda p: (np.arange(97) < 8) & (np.cumsum(p) - p < 0.7 * p[:8].sum())),
        ({"top_k": 1}, lambda p: np.arange(97) < 1),
        ({"top_p": 1e-50}, lambda p: np.arange(97) < 1),  # 0 in float32
        ({"top_k": 10**12, "top_p": 1.0}, lambda p: np.arange(97) < 97),
    ],
    ids=["top_k", "top_p", "both", "one", "none", "all"],
)
def test_top_k_and_top_p_leave_the_likeliest_tokens(plain, options: dict, kept: Callable):
    expected = probabilities(plain, 0.8)
    order = np.argsort(-expected)
    expected[order[~kept(expected[order])]] = 0
    counts = sampled(plain, temperature=0.8, **options)
    if (expected > 0).sum() == 1:
        assert counts[expected > 0] == 1024
    else:
        assert_drawn_from(counts, expected / expected.sum())


def test_the_coldest_temperature_is_greedy(plain):
    greedy = generate(plain, PROMPTS[:1], max_new_tokens=6)[0]
    assert generate(plain, PROMPTS[:1] * 3, max_new_tokens=6, temperature=1e-300) == 3 * [greedy]


# --- Ends ---


def test_a_text_ends_before_a_stop_token_and_the_others_go_on(plain):
    whole = generate(plain, PROMPTS, max_new_tokens=20)
    stops = {whole[0][5], whole[2][0]}
    expected = [text[: next((i for i, token in enumerate(text) if token in stops), 20)] for text in whole]
    assert 0 in map(len, expected)
    assert len(set(map(len, expected))) > 2
    assert generate(plain, PROMPTS, max_new_tokens=20, stop_tokens=stops) == expected


def test_new_lengths_and_settings_compile_nothing(plain):
    compiled = []

    def listen(event: str, *_: object, **__: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    rng = np.random.default_rng(0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for attempt in range(4):
            prompts = [rng.integers(0, 97, rng.integers(1, 19)).tolist() for _ in range(3)]
            options = {"temperature": 0.5 + attempt, "top_k": 3 + attempt, "seed": attempt}
            generate(plain, prompts, max_new_tokens=10 + attempt, stop_tokens=[attempt], **options)
            if attempt == 0:
                assert compiled
                compiled.clear()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def test_nothing_to_go_on_from_is_nothing(plain):
    assert generate(plain, []) == []


# --- Text ---


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Records the arguments with which `generate_text` calls `generate`."""
    seen = {}

    def record(model, prompts, **options):
        seen.update(options, prompts=prompts)
        return [[ord("a")] for _ in prompts]

    monkeypatch.setattr(jaxpack.generation.text, "generate", record)
    return seen


def test_text_goes_on_from_text_and_messages_are_answered(plain, given):
    tokenizer = small_tokenizer(bos=True, chat=True)
    messages = [{"role": "user", "content": "the cab"}]
    written = generate_text(plain, tokenizer, ["the cab", messages], max_new_tokens=3)
    assert written == [tokenizer.decode([ord("a")])] * 2
    assert given["max_new_tokens"] == 3
    read = [tokenizer.decode(ids) for ids in given["prompts"]]
    assert read == ["<bos>the cab", "<bos>user\nthe cab<|im_end|>\nassistant\n"]  # each has one BOS token
    ends = tokenizer.convert_tokens_to_ids([EOS, TURN_ENDS])
    assert set(given["stop_tokens"]) == set(ends)
    generate_text(plain, tokenizer, ["the cab"])
    assert set(given["stop_tokens"]) == set(ends[:1])


def test_texts_end_where_the_model_s_own_files_say(given):
    model = make_model("qwen3")
    model.source_files = (
        ("config.json", '{"eos_token_id": 7}'),
        ("generation_config.json", '{"eos_token_id": [8, 9]}'),
    )
    tokenizer = small_tokenizer()
    generate_text(model, tokenizer, ["the"])
    assert set(given["stop_tokens"]) == {tokenizer.eos_token_id, 7, 8, 9}
    generate_text(model, tokenizer, ["the"], stop_tokens=[5])
    assert set(given["stop_tokens"]) == {5}


@pytest.mark.parametrize("tags", [False, True], ids=["compared", "tagged"])
@pytest.mark.parametrize("style", STYLES)
def test_an_answer_ends_where_the_chat_template_ends_it(style: str, tags: bool):
    assert ChatTemplate(STYLES[style].tokenizer(tags=tags)).answer_end() == STYLES[style].end.strip()


def test_prompts_and_stop_tokens_may_come_one_by_one(plain):
    given = (iter(prompt) for prompt in PROMPTS)
    assert generate(plain, given, max_new_tokens=2, stop_tokens=iter([96])) == generate(
        plain, PROMPTS, max_new_tokens=2, stop_tokens={np.int64(96)}
    )


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt(plain, given):
    tokenizer = small_tokenizer()
    whole = tokenizer("the cab").input_ids

    class Ending:
        eos_token_id, decode = tokenizer.eos_token_id, tokenizer.decode

        def __call__(self, texts, **options):
            return {"input_ids": [[*ids, self.eos_token_id] for ids in tokenizer(texts, **options)["input_ids"]]}

    generate_text(plain, Ending(), ["the cab"])
    assert given["prompts"] == [whole]


# --- What is refused ---


@pytest.mark.parametrize(
    ("prompts", "options", "sentence"),
    [
        ([[1], []], {"max_new_tokens": 1}, "`prompts` must have at least one token each, got none in prompt 2."),
        (["the"], {}, "`prompts` must be lists of token ids, got 'the' for prompt 1."),
        ([1, 2], {}, "`prompts` must be lists of token ids, got 1 for prompt 1."),
        ([[1, 97]], {}, "`prompts` must be of token ids in [0, 97), the model's vocabulary, got 97 in prompt 1."),
        ([[-1]], {}, "`prompts` must be of token ids in [0, 97), the model's vocabulary, got -1 in prompt 1."),
        ([[1]], {"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0."),
        (
            [[1]],
            {"max_tokens": 3},
            "Options must be among max_new_tokens, temperature, top_k, top_p, seed, batch_size, got 'max_tokens'.",
        ),
        ([[1]], {"max_new_tokens": 1.5}, "`max_new_tokens` must be a whole number, got 1.5."),
        ([[1]], {"temperature": -0.5}, "`temperature` must be 0 or a positive number, got -0.5."),
        ([[1]], {"temperature": float("nan")}, "`temperature` must be 0 or a positive number, got nan."),
        ([[1]], {"temperature": 1.0, "top_p": 0.0}, "`top_p` must be in (0, 1], got 0.0."),
        ([[1]], {"temperature": 1.0, "top_p": 1.1}, "`top_p` must be in (0, 1], got 1.1."),
        ([[1]], {"temperature": 1.0, "top_k": 0}, "`top_k` must be a whole number of at least 1, got 0."),
        ([[1]], {"top_k": 3}, "`top_k` must be None unless `temperature` is above 0, got 3."),
        ([[1]], {"batch_size": 0}, "`batch_size` must be at least 1, got 0."),
        ([[1]], {"seed": -1}, "`seed` must be in [0, 2**32), got -1."),
    ],
    ids=str,
)
def test_what_is_refused(plain, prompts, options, sentence):
    with pytest.raises(InputError) as caught:
        generate(plain, prompts, **options)
    assert str(caught.value) == sentence


def test_texts_beyond_what_the_model_is_made_for_are_refused():
    with pytest.raises(InputError, match=r"at most 128 tokens.*`max_position_embeddings`, got 13 in prompt 2 and 116"):
        generate(make_model("qwen3"), [[1], PROMPTS[3]], max_new_tokens=116)


def test_texts_that_memory_has_no_room_for_are_refused():
    model = small_model("qwen3")  # its configuration does not say how many tokens it supports
    for given in (10**11, 10**30):
        message = (
            rf"`max_new_tokens` must leave room for .* of 1 prompts at once, got {given:,}, which needs [\d,.]+ GiB of"
            r" [\d,.]+ GiB free\. A smaller `batch_size`"
        )
        with pytest.raises(InputError, match=message):
            generate(model, [[1]], max_new_tokens=given)


@pytest.mark.parametrize("prompts", ["the cab", {"role": "user", "content": "the"}, Conversation([]), 5], ids=repr)
def test_one_prompt_is_no_list_of_them(plain, prompts):
    with pytest.raises(InputError, match="`prompts` must be a list, of texts or of lists of messages, got "):
        generate_text(plain, small_tokenizer(), prompts)
    if not isinstance(prompts, str | Conversation):
        with pytest.raises(InputError, match=r"`prompts` must be texts or lists of messages, got .* for prompt 2\."):
            generate_text(plain, small_tokenizer(), ["the", prompts])


def test_prompts_that_cannot_be_written_are_refused(plain):
    with pytest.raises(InputError, match="`tokenizer` must have a chat template for messages, got one without"):
        generate_text(plain, small_tokenizer(), [[{"role": "user", "content": "the"}]])
    with pytest.raises(InputError, match="`prompts` must have at least one token each, got '' for prompt 2"):
        generate_text(plain, small_tokenizer(), ["the", ""])
