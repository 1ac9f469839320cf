"""Structured output: over every kind of tokenizer, as numbers, and what is refused and how soon."""

from __future__ import annotations

import json
import re
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.engine.conftest import DEVICE, datum, job, new_run, result_of
from tests.engine.sampler_kit import finish, sample_job
from tests.zoo.tokenizers import TOKENIZERS
from weaver.engine.torch import grammars
from weaver.engine.torch.catalog import Catalog
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.sampler import TorchSampler
from weaver.errors import InvalidParamsError, MissingDependencyError, UnsupportedError
from weaver.types import SamplingParams

if TYPE_CHECKING:
    from tests.zoo import Zoo
    from weaver.engine.torch.trainer import TorchTrainer
    from weaver.types import SampledSequence

pytest.importorskip("llguidance")

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture
def nano(store: ModelStore) -> TorchSampler:
    sampler = TorchSampler(store)
    sampler.load("base", "weaver-nano", None)
    return sampler


def one(sampler: TorchSampler, prompt: list[int], n: int = 1, **params: Any) -> SampledSequence:
    return finish(sampler, [sample_job(prompt, n=n, **params)])["job"].sequences[0]


def is_person(text: str) -> bool:
    """What the schema says, written down without it."""
    read = json.loads(text)
    return (
        list(read) == ["name", "age", "kind"]
        and len(read["name"]) <= 5
        and type(read["age"]) is int
        and 0 <= read["age"] <= 99
        and read["kind"] in ("cat", "dog")
    )


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_of_any_tokenizer_keep_to_a_schema_and_a_grammar(zoo: Zoo, name: str) -> None:
    """Of random weights, which would never write such a thing by themselves."""
    catalog = Catalog({"it": zoo.model("llama", name)}, allow_paths=False)
    store = ModelStore(catalog, device=DEVICE, dtype=torch.float32, threads=1)
    sampler = TorchSampler(store)
    sampler.load("base", "it", None)
    settings = {"max_tokens": 300, "seed": 1, "n": 4}
    jobs = [
        sample_job([5, 6, 7], "schema", json_schema=PERSON, **settings),
        sample_job([5, 6, 7], "greedy", json_schema=PERSON, temperature=0.0, **settings),
        sample_job([5, 6, 7], "grammar", grammar='start: /[ab]{3}/ (" x" | "é")', **settings),
        sample_job([5, 6, 7], "free", **{**settings, "max_tokens": 20}),
    ]
    results = finish(sampler, jobs)
    for sequence in [*results["schema"].sequences, *results["greedy"].sequences]:
        if sequence.stop_reason == "stop":
            assert is_person(sequence.text)
    ended = [s.stop_reason for s in results["schema"].sequences]
    assert ended.count("stop") >= 3
    for sequence in results["grammar"].sequences:
        assert re.fullmatch("[ab]{3}( x|é)", sequence.text), sequence.text
        assert sequence.stop_reason == "stop"
    assert any(re.search(r"[^abxé ]", s.text) for s in results["free"].sequences)


def test_what_is_drawn_is_the_policy_among_what_is_allowed(
    store: ModelStore, trainer: TorchTrainer
) -> None:
    """`logprobs` are the trainer's; `sampling_logprobs` those of the allowed, made to sum to 1."""
    run_id = new_run(trainer, architecture="weaver-nano")
    sampler = TorchSampler(store)
    sampler.publish("run", trainer.snapshot(run_id))
    tokenizer = store.catalog.facts("weaver-nano").tokenizer
    letters, prompt = tokenizer.encode("abc"), tokenizer.encode("say: ")
    given = {"grammar": 'start: ("a" | "b" | "c"){6}', "n": 3, "seed": 2, "max_tokens": 20}
    job_ = sample_job(prompt, weights_id="run", **given)
    for sequence in finish(sampler, [job_])["job"].sequences:
        assert re.fullmatch("[abc]{6}", sequence.text)
        tokens = list(sequence.tokens)
        for t, token in enumerate(tokens[:6]):
            datums = [datum([*prompt, *tokens[:t], each]) for each in letters]
            scored = result_of(trainer, job(run_id, datums, backward=False))
            lp = np.array([o["logprobs"].to_numpy()[-1] for o in scored.loss_fn_outputs])
            assert sequence.logprobs[t] == pytest.approx(lp[letters.index(token)], abs=1e-4)
            among = lp[letters.index(token)] - np.log(np.exp(lp).sum())
            assert sequence.sampling_logprobs[t] == pytest.approx(among, abs=1e-4)
        assert sequence.sampling_logprobs[6:] == (0.0,)  # the end is all that is left


def test_the_end_is_where_the_grammar_ends(nano: TorchSampler) -> None:
    (grammar, prompt) = 'start: "yes" | "no"', list(b"is it? ")
    ended = one(nano, prompt, grammar=grammar)
    assert (ended.text in ("yes", "no"), ended.stop_reason) == (True, "stop")
    assert ended.tokens[-1] >= 256
    without = one(nano, prompt, grammar=grammar, ignore_eos=True)
    assert (without.text in ("yes", "no"), without.stop_reason) == (True, "stop")
    assert len(without.tokens) == len(without.text)
    cut = one(nano, prompt, grammar='start: "a"{50}', max_tokens=7)
    assert (cut.text, cut.stop_reason) == ("aaaaaaa", "length")
    stopped = one(nano, prompt, grammar='start: "a"{5} "b"', stop=["aaa"])
    assert (stopped.text, stopped.stop_reason) == ("", "stop")


def test_rows_with_and_without_a_grammar_share_a_step(nano: TorchSampler) -> None:
    """And come out as alone; with penalties and filters, too."""
    kinds: list[dict[str, Any]] = [
        {"json_schema": PERSON, "max_tokens": 80},
        {"grammar": 'start: ("up" | "down")+', "top_k": 3, "max_tokens": 9},
        {"grammar": "start: /[0-9]{4}/", "top_p": 0.6, "frequency_penalty": 1.5},
        {"grammar": "start: /[a-z]{4}/", "temperature": 0.0, "repetition_penalty": 3.0},
        {},
    ]
    prompt = list(b"tell: ")
    jobs = [sample_job(prompt, str(i), seed=i, n=2, **k) for i, k in enumerate(kinds)]
    together = finish(nano, jobs)
    for i, each in enumerate(jobs):
        alone = finish(nano, [each])[str(i)]
        assert [s.tokens for s in alone.sequences] == [s.tokens for s in together[str(i)].sequences]
    assert all(re.fullmatch("(up|down)+(d|do|dow|u)?", s.text) for s in together["1"].sequences)
    assert all(re.fullmatch("[0-9]{4}", s.text) for s in together["2"].sequences)


def test_a_grammar_is_compiled_once_and_few_are_kept(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = store.catalog.facts("weaver-nano").grammars
    params = SamplingParams(json_schema=PERSON)
    assert some.compiled(params) is some.compiled(SamplingParams(json_schema=dict(PERSON)))
    monkeypatch.setattr(grammars, "KEPT", 2)
    for word in "abc":
        some.compiled(SamplingParams(grammar=f'start: "{word}"'))
    assert len(some._compiled) == 2


# --- refusals -------------------------------------------------------------------------------------

DEEP = 400


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


BAD: list[tuple[str, dict[str, Any]]] = [
    ("json_schema", {"json_schema": {"type": "nothing"}}),
    ("json_schema", {"json_schema": {"type": "string", "pattern": "("}}),
    ("json_schema", {"json_schema": {"type": "string", "format": "no-such"}}),
    ("json_schema", {"json_schema": {"$ref": "https://example.com/schema"}}),
    ("json_schema", {"json_schema": {"$ref": "#/nowhere"}}),
    ("json_schema", {"json_schema": {"not": {"type": "string"}}}),
    ("json_schema", {"json_schema": {"type": "string", "minLength": 10**9, "maxLength": 1}}),
    ("json_schema", {"json_schema": nested(90)}),
    ("grammar", {"grammar": "nothing like it"}),
    ("grammar", {"grammar": "start: other"}),
    ("grammar", {"grammar": "start: /(/"}),
    ("grammar", {"grammar": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000}),
    ("grammar", {"grammar": "start: /" + "(" * 30_000 + "a" + ")" * 30_000 + "/"}),
    ("grammar", {"grammar": "{"}),
    ("grammar", {"grammar": '{"grammars": [{"json_schema": {"type": "nothing"}}]}'}),
    ("grammar", {"grammar": "start: <|no_such_token|>"}),
    ("grammar", {"grammar": "\x00"}),
]


@pytest.mark.parametrize(("field", "given"), BAD, ids=lambda one: str(one)[:50])
def test_what_cannot_be_understood_is_refused_at_once(
    store: ModelStore, field: str, given: dict[str, Any]
) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidParamsError) as caught:
        some = store.catalog.facts("weaver-nano").grammars
        some.guide(SamplingParams(**given), ends=frozenset({256}))
    assert (caught.value.field, bool(caught.value.message)) == (field, True)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("json_schema", {"json_schema": "{"}),
        ("json_schema", {"json_schema": "[]"}),
        ("json_schema", {"json_schema": 3}),
        ("json_schema", {"json_schema": {"a": {1, 2}}}),
        ("json_schema", {"json_schema": {"a": float("nan")}}),
        ("json_schema", {"json_schema": nested(DEEP)}),
        ("json_schema", {"json_schema": '{"a": "\ud800"}'}),
        ("json_schema", {"json_schema": {"description": "x" * 2**16}}),
        ("grammar", {"grammar": ""}),
        ("grammar", {"grammar": 3}),
        ("grammar", {"grammar": "start: \ud800"}),
        ("grammar", {"grammar": "x" * (2**16 + 1)}),
        ("grammar", {"grammar": 'start: "a"', "json_schema": {}}),
    ],
    ids=lambda one: str(one)[:50],
)
def test_what_is_no_schema_or_too_long_is_refused_by_its_value(
    field: str, given: dict[str, Any]
) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        SamplingParams(**given)
    assert caught.value.field == field


LARGE: list[dict[str, Any]] = [
    {
        "json_schema": {
            "type": "object",
            "properties": {f"field_{i}": {"type": "string", "maxLength": 50} for i in range(600)},
        }
    },
    {"json_schema": {"type": "string", "pattern": "(a{1000}){1000}"}},
    {"grammar": "start: /(a{1000}){1000}/"},
    {"grammar": "start: /" + "(a|b)?" * 10_000 + "/"},
    {"grammar": "start: /(.*a.{30}){20}/"},
    {"grammar": "start: s\ns: s s | " + " | ".join(f'"{c}"' for c in "abcdefghij")},
    {"json_schema": {"enum": [f"value {i}" for i in range(3000)]}},
    {"json_schema": nested(60)},
    {"json_schema": {"type": "array", "items": {"type": "number"}, "maxItems": 5000}},
    {"grammar": "start: " + " | ".join(f'"word {i}"' for i in range(3000))},
]


@pytest.mark.parametrize("given", LARGE, ids=lambda one: str(one)[:50])
def test_a_large_one_is_compiled_or_refused_within_a_second(
    store: ModelStore, given: dict[str, Any]
) -> None:
    some = store.catalog.facts("weaver-nano").grammars
    began = time.monotonic()
    try:
        guide = some.guide(SamplingParams(**given), ends=frozenset({256}))
    except InvalidParamsError:
        assert time.monotonic() - began < 1
        return
    assert time.monotonic() - began < 1
    going = True
    for _ in range(40):
        token = int(guide.allowed.nonzero()[0, 0])
        began = time.monotonic()
        try:
            going = guide.take(token)
        except InvalidParamsError:  # too large to go on with
            going = False
        assert time.monotonic() - began < 1
        if not going:
            break


def test_the_extra_is_named_where_it_is_not_installed(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependencyError, match=r"weaver-post-training\[structured\]"):
        grammars.Grammars(None, name="it", vocab_size=9)


def test_a_tokenizer_without_a_vocabulary_in_the_known_form_is_refused() -> None:
    class Slow:
        def __len__(self) -> int:
            return 3

    with pytest.raises(UnsupportedError, match="tokenizer of it"):
        grammars.Grammars(Slow(), name="it", vocab_size=3)
