"""Sampling, training and export of the zoo's members, against transformers and PEFT alone.

Rows cover families, dtypes and training modes pairwise, with the tokenizers in turn; the slow rows
cover every pair with the tokenizers, too.
"""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.zoo import ADAPTERS, FAMILIES, TOKENIZERS, Zoo, covering
from tests.zoo.models import NO_MLP
from weaver import ServiceClient, types
from weaver.errors import UnsupportedError
from weaver_rl.conversations import to_datum

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import ArrayLike

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning"),
]
DTYPES, MODES = ("float32", "bfloat16"), ("lora", "full_ft")
QUICK = [
    (family, tokenizer, dtype, mode)
    for (family, dtype, mode), tokenizer in zip(
        covering(list(FAMILIES), DTYPES, MODES), cycle(TOKENIZERS), strict=False
    )
]
SLOW = sorted({*covering(list(FAMILIES), list(TOKENIZERS), DTYPES, MODES)} - {*QUICK})
MEMBERS = [
    pytest.param(*row, id="-".join(row), marks=[] if row in QUICK else [pytest.mark.slow])
    for row in (*QUICK, *SLOW)
]
CHAT = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "Yes. The cat."},
]
BOUNDS = {"float32": (1e-4, 1e-4), "bfloat16": (1.5, 0.1)}
"""Largest and mean difference of log-probabilities from those of transformers, in nats. In bfloat16
a mixture may send a token to another expert."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], ServiceClient]]:
    """A service of a dtype; its engine keeps the models."""
    made: dict[str, ServiceClient] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WEAVER_BASE_URL", raising=False)

        def of(dtype: str) -> ServiceClient:
            if dtype not in made:
                patch.setenv("WEAVER_DTYPE", dtype)
                made[dtype] = ServiceClient(home=tmp_path_factory.mktemp(dtype))
                made[dtype].list_supported_models()
            return made[dtype]

        yield of
    for client in made.values():
        client.close()


@torch.no_grad()
def theirs(folder: Path, tokens: list[int], *, dtype: str, adapter: Path | None = None) -> Any:
    """float64 [T-1]: transformers' log-probabilities of each token behind the first."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=getattr(torch, dtype)
    )
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    logits = model.eval()(torch.tensor([tokens])).logits[0].double()
    return logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()


def assert_close(ours: ArrayLike, right: ArrayLike, dtype: str) -> None:
    gaps = np.abs(np.asarray(ours, dtype=np.float64) - np.asarray(right, dtype=np.float64))
    most, mean = BOUNDS[dtype]
    assert gaps.max() < most and gaps.mean() < mean, f"{gaps.max():.2e}, mean {gaps.mean():.2e}"


def example(tokenizer: Any) -> tuple[types.Datum, list[int]]:
    """A reply to learn, and its tokens."""
    chat: dict[str, Any] = {"messages": CHAT}
    if not tokenizer.chat_template:
        chat = {"prompt": CHAT[0]["content"], "completion": CHAT[1]["content"]}
    datum = to_datum(tokenizer, chat)
    targets = datum.loss_fn_inputs["target_tokens"].tolist()
    return datum, [*datum.model_input.to_ints(), int(targets[-1])]


def lora_of(family: str) -> dict[str, Any]:
    return {"rank": 4, "train_mlp": family not in NO_MLP}


@pytest.mark.parametrize(("family", "tokenizer", "dtype", "mode"), MEMBERS)
def test_a_member_is_sampled_trained_and_exported(
    family: str,
    tokenizer: str,
    dtype: str,
    mode: str,
    zoo: Zoo,
    service: Callable[[str], ServiceClient],
    tmp_path: Path,
) -> None:
    base, client = zoo.model(family, tokenizer, dtype=dtype), service(dtype)
    words = AutoTokenizer.from_pretrained(base)  # a family may have its own way to read it
    sampled(client, base, words, dtype=dtype)
    datum, tokens = example(words)
    trainer = client.create_model(
        str(base), lora_of(family) if mode == "lora" else None, training_mode=mode
    )
    assert_close(
        logprobs(trainer.forward([datum], wait=True)), theirs(base, tokens, dtype=dtype), dtype
    )
    losses = [trained(trainer, datum, mode) for _ in range(3)]
    now = trainer.forward([datum], wait=True)
    assert now.metrics["loss"] < losses[0]
    sampler = trainer.save_weights_and_get_sampling_client()
    scored = sampler.compute_logprobs(types.ModelInput.from_ints(tokens))[1:]
    assert_close(scored, logprobs(now), dtype)
    saved = trainer.save_weights_for_sampler(name="-".join((family, tokenizer, mode)), wait=True)
    merged = client.export_checkpoint(saved, tmp_path / "merged", merge=True)
    assert_close(theirs(merged, tokens, dtype=dtype), logprobs(now), dtype)
    same_tokenizer(merged, words)
    if mode == "lora":
        adapter = client.export_checkpoint(saved, tmp_path / "adapter")
        assert_close(theirs(base, tokens, dtype=dtype, adapter=adapter), logprobs(now), dtype)


def sampled(client: ServiceClient, base: Path, tokenizer: Any, *, dtype: str) -> None:
    """The base's samples are its own arithmetic, of the template's tokens, as their text says."""
    sampler = client.create_sampling_client(base_model=str(base))
    if tokenizer.chat_template:
        prompt: Any = CHAT[:1]
        read = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    else:
        prompt = CHAT[0]["content"]
        read = tokenizer.encode(prompt)
    result = sampler.sample(
        prompt, {"max_tokens": 8, "seed": 1}, num_samples=3, include_prompt_logprobs=True
    )
    assert list(result.prompt_tokens) == read
    assert result.prompt_logprobs is not None
    for sequence in result.sequences:
        said = list(sequence.tokens)
        right = theirs(base, [*read, *said], dtype=dtype)
        assert_close([*result.prompt_logprobs[1:], *sequence.logprobs], right, dtype)
        ended = said[:-1] if sequence.stop_reason == "stop" else said
        assert sequence.text == tokenizer.decode(ended, skip_special_tokens=True)


def trained(trainer: Any, datum: types.Datum, mode: str) -> float:
    handle = trainer.forward_backward([datum], "cross_entropy")
    trainer.optim_step({"learning_rate": 1e-2 if mode == "lora" else 1e-3}, wait=True)
    return float(handle.result().metrics["loss"])


def logprobs(result: types.ForwardBackwardResult) -> Any:
    return result.loss_fn_outputs[0]["logprobs"].to_numpy()


def same_tokenizer(folder: Path, tokenizer: Any) -> None:
    """A model goes out with the tokenizer and the templates that it came with."""
    exported = AutoTokenizer.from_pretrained(folder)
    for text in ("a é  b", *tokenizer.all_special_tokens):
        assert exported.encode(text) == tokenizer.encode(text)
    assert exported.chat_template == tokenizer.chat_template
    assert exported.eos_token == tokenizer.eos_token


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", ["llama3_rope", "phi3", "gpt_neox", "gemma3"])
def test_an_adapter_that_peft_saved_is_what_peft_makes_of_it(
    family: str, kind: str, zoo: Zoo, service: Callable[[str], ServiceClient]
) -> None:
    base = zoo.model(family, "llama3")
    adapter, client = zoo.adapter(base, kind), service("float32")
    if (family, kind) == ("gpt_neox", "head"):  # its files call the head otherwise
        with pytest.raises(UnsupportedError, match=r"lm_head\.base_layer"):
            client.create_sampling_client(model_path=str(adapter), base_model=str(base))
        return
    sampler = client.create_sampling_client(model_path=str(adapter), base_model=str(base))
    tokens = zoo.tokenizer("llama3").encode("What is it? Yes. The cat sat.")
    right = theirs(base, tokens, dtype="float32", adapter=adapter)
    assert_close(sampler.compute_logprobs(types.ModelInput.from_ints(tokens))[1:], right, "float32")


@pytest.mark.parametrize("family", sorted(NO_MLP))
def test_layers_that_cannot_be_adapted_are_refused_by_name(
    family: str, zoo: Zoo, service: Callable[[str], ServiceClient]
) -> None:
    with pytest.raises(UnsupportedError, match="Set train_mlp=False") as caught:
        service("float32").create_model(str(zoo.model(family)), {"rank": 4})
    assert caught.value.field == "lora_config.train_mlp"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_special_token_ends_a_sample_as_a_string(
    name: str, zoo: Zoo, service: Callable[[str], ServiceClient]
) -> None:
    """A model that says what it likes is stopped at each special token it says."""
    tokenizer = zoo.tokenizer(name)
    sampler = service("float32").create_sampling_client(base_model=str(zoo.model("llama", name)))
    special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    prompt = types.ModelInput.from_ints(tokenizer.encode("What"))
    params = {"max_tokens": 60, "temperature": 8.0, "stop": [*special], "seed": 4}
    reasons = set()
    for sequence in sampler.sample(prompt, params, num_samples=24).sequences:
        *before, last = sequence.tokens
        assert not {*before} & {*special.values()}
        assert sequence.stop_reason == ("stop" if last in special.values() else "length")
        reasons.add(sequence.stop_reason)
    assert reasons == {"stop", "length"}
