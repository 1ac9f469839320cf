"""How far a model whose layers are quantised is from the same model in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tests.engine.conftest import DEVICE, datum, gradient_of, job, new_run, randomise, result_of
from tests.engine.sampler_kit import finish, sample_job
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.quantised import weights_bytes
from weaver.engine.torch.sampler import TorchSampler
from weaver.engine.torch.trainer import TorchTrainer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver.engine.torch.catalog import Catalog
    from weaver.types import Quantize, SampledSequence

FORMS: dict[str, tuple[torch.dtype, Quantize]] = {
    "float32": (torch.float32, "none"),
    "bfloat16": (torch.bfloat16, "none"),
    "int8": (torch.float32, "int8"),
    "nf4": (torch.float32, "nf4"),
}
SAMPLES, TOKENS = 16, 48
ADAPTED = 0.01
"""Standard deviation of B: an adapter that has learned a little."""
PROMPT = [3]


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """One form of a model, against float32 on what the float32 model sampled."""

    form: str
    mean: float
    """Of the magnitudes of differences of log-probabilities, in nats a token."""
    most: float
    cosine: float
    """Between the gradients of the adapter."""
    gap: float
    """Largest difference of trainer and sampler of this form, in nats."""
    size_bytes: int
    """Of the frozen weights."""


class Form:
    """A trainer and a sampler of one form of a model, with an adapter of fixed random values."""

    def __init__(self, catalog: Catalog, name: str, form: str) -> None:
        self.dtype, self.kind = FORMS[form]
        store = ModelStore(catalog, device=DEVICE, dtype=self.dtype, threads=1, quantize=self.kind)
        self.size_bytes = weights_bytes(catalog.facts(name), dtype=self.dtype, quantize=self.kind)
        self.trainer, self._sampler = TorchTrainer(store), TorchSampler(store)
        new_run(self.trainer, architecture=name)
        randomise(self.trainer, "run", size=ADAPTED)
        self._sampler.publish("run", self.trainer.snapshot("run"))

    def sample(self) -> Sequence[SampledSequence]:
        drawn = sample_job(
            PROMPT, weights_id="run", n=SAMPLES, max_tokens=TOKENS, seed=0, ignore_eos=True
        )
        return finish(self._sampler, [drawn])["job"].sequences

    def logprobs(self, drawn: Sequence[SampledSequence]) -> torch.Tensor:
        """The trainer's, of all tokens; the gradient of their mean is added to the run's."""
        datums = [datum([*PROMPT, *one.tokens]) for one in drawn]
        result = result_of(self.trainer, job("run", datums))
        return torch.cat([torch.tensor(o["logprobs"].tolist()) for o in result.loss_fn_outputs])

    def gradient(self) -> torch.Tensor:
        return torch.cat([g.flatten() for g in gradient_of(self.trainer, "run").values()])


def measure(catalog: Catalog, name: str, *, forms: Sequence[str] = tuple(FORMS)) -> list[Sheet]:
    reference = Form(catalog, name, "float32")
    texts = reference.sample()
    right, gradient = reference.logprobs(texts), reference.gradient()
    sheets = []
    for form in forms:
        one = Form(catalog, name, form)
        difference = (one.logprobs(texts) - right).abs()
        cosine = torch.cosine_similarity(one.gradient().double(), gradient.double(), dim=0)
        own = one.sample()
        gap = one.logprobs(own) - torch.cat([torch.tensor(list(s.logprobs)) for s in own])
        sheets.append(
            Sheet(
                form=form,
                mean=float(difference.mean()),
                most=float(difference.max()),
                cosine=float(cosine),
                gap=float(gap.abs().max()),
                size_bytes=one.size_bytes,
            )
        )
    return sheets
