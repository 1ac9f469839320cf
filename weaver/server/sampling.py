"""`Samplers`: which weights are ready to sample, and the samples that run on them.

Called by the executor, from the thread that calls the engine, so it needs no lock.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from weaver.checks import check_tokens
from weaver.engine.base import SampleJob, SampleProgress
from weaver.errors import (
    CheckpointMismatchError,
    CheckpointNotFoundError,
    InvalidParamsError,
    InvalidRequestError,
    NotFoundError,
    TokenOutOfRangeError,
    WeaverError,
)
from weaver.protocol import OpenSampler, Sample, SamplerOpened
from weaver.server.attempt import attempt
from weaver.server.checkpoints import MANIFEST, SCHEME
from weaver.types import ModelInput

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

    from weaver.engine.base import Engine, WeightSnapshot
    from weaver.server.checkpoints import Checkpoints
    from weaver.types import CheckpointInfo, ModelInfo


BASE = "base:"
"""What the id of a sampler on base weights begins with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Weights that the engine's sampler holds under `weights_id`."""

    weights_id: str
    model: ModelInfo
    version: int
    pinned: bool
    """They exist nowhere else, so they are never dropped to make room."""
    expires_at: datetime | None = None


class Samplers:
    """A sampler's id says where its weights come from, so that it can be loaded whenever needed.

    `base:<model>`, a `weaver://` path, or a folder that `open` was given. At most `max_loaded` that
    could be loaded again are kept, those used last.
    """

    def __init__(
        self,
        engine: Engine,
        checkpoints: Checkpoints,
        *,
        kept: Checkpoints | None,
        max_loaded: int,
        now: Callable[[], datetime],
    ) -> None:
        self._now = now
        self._engine = engine
        self._checkpoints = checkpoints
        self._kept = kept
        self._max_loaded = max_loaded
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._folders: dict[str, tuple[str, Path | None]] = {}
        self._running: set[str] = set()
        self._count = 0

    @property
    def busy(self) -> bool:
        return self._engine.sampler.busy

    def open(self, operation: OpenSampler) -> SamplerOpened:
        """Raises CheckpointNotFoundError, CheckpointCorruptError, CheckpointMismatchError ..."""
        path, base_model = operation.model_path, operation.base_model
        if path is None:
            sampler_id = f"{BASE}{base_model}"
        elif path.startswith(SCHEME):
            sampler_id = path
        else:
            folder = Path(path).expanduser().absolute()
            sampler_id = str(folder)
            self._folders[sampler_id] = self._source(folder, base_model)
        loaded = self._get(sampler_id)
        if path is not None and base_model not in (None, loaded.model.name):
            raise CheckpointMismatchError(
                f"{path} was made from {loaded.model.name}, not from {base_model}.",
                field="base_model",
                hint="Leave base_model out.",
            )
        return SamplerOpened(
            sampler_id=sampler_id, model=loaded.model, weights_version=loaded.version
        )

    def publish(
        self,
        sampler_id: str,
        snapshot: WeightSnapshot,
        *,
        pinned: bool,
        expires_at: datetime | None,
    ) -> None:
        """Makes a snapshot sampleable; samples that run on a former one go on with that."""
        weights_id = self._weights_id(sampler_id)
        self._engine.sampler.publish(weights_id, snapshot)
        model = self._engine.get_model(snapshot.base_model)
        self.release(sampler_id)
        self._keep(
            sampler_id,
            Loaded(
                weights_id=weights_id,
                model=model,
                version=snapshot.version,
                pinned=pinned,
                expires_at=expires_at,
            ),
        )

    def encode(self, operation: Sample) -> Sample:
        """The same with the tokens of its text; in any thread, beside whatever else runs."""
        assert not isinstance(operation.prompt, ModelInput)
        ready = self._loaded.get(operation.sampler_id)
        name = ready.model.name if ready else self._find(operation.sampler_id)[0]
        tokens = ModelInput.from_ints(self._engine.encode(name, operation.prompt))
        return operation.model_copy(update={"prompt": tokens})

    def release(self, sampler_id: str) -> None:
        """Forgets weights once running samples are done with them; ignores unknown ids."""
        loaded = self._loaded.pop(sampler_id, None)
        if loaded is not None:
            self._engine.sampler.release(loaded.weights_id)

    def clear(self) -> None:
        """Ends all samples and forgets all weights."""
        for job_id in self._running:
            self._engine.sampler.cancel(job_id)
        self._running.clear()
        for sampler_id in list(self._loaded):
            self.release(sampler_id)

    def turn(
        self,
        *,
        released: Sequence[str],
        cancelled: Sequence[str],
        added: Mapping[str, tuple[Sample, str]],
        ended: Sequence[str] = (),
    ) -> list[SampleProgress]:
        """Takes in what was asked for since the last turn, then lets the sampler take a step.

        `added` maps the job's id to its operation and project. Samplers of `released` are let go of
        before it, those of `ended` after it.
        """
        self._let_go(released)
        for job_id in cancelled:
            self._running.discard(job_id)
            attempt(partial(self._engine.sampler.cancel, job_id))
        progress = []
        for job_id, (operation, project) in added.items():
            problem = attempt(partial(self._add, job_id, operation, project))
            if problem is not None:
                progress.append(SampleProgress(job_id=job_id, error=problem))
        self._let_go(ended)
        if self._engine.sampler.busy:
            progress += self._step()
        self._running -= {p.job_id for p in progress if p.result or p.error}
        return progress

    def _let_go(self, sampler_ids: Sequence[str]) -> None:
        for sampler_id in sampler_ids:
            attempt(partial(self.release, sampler_id))
            if self._kept is not None and sampler_id.startswith(SCHEME):
                attempt(partial(self._kept.delete, sampler_id))

    def _step(self) -> Sequence[SampleProgress]:
        stepped = attempt(self._engine.sampler.step)
        if not isinstance(stepped, WeaverError):
            return stepped
        for job_id in self._running:  # nobody knows whose fault it was, or what state is left
            attempt(partial(self._engine.sampler.cancel, job_id))
        return [SampleProgress(job_id=job_id, error=stepped) for job_id in self._running]

    def _add(self, job_id: str, operation: Sample, project: str) -> None:
        loaded = self._get(operation.sampler_id)
        assert isinstance(operation.prompt, ModelInput)  # text was encoded when it was accepted
        tokens = operation.prompt.to_ints()
        _check_sample(operation, tokens, loaded.model)
        params = operation.params
        if params.seed is None:  # drawn from the id, so that a restart in its middle repeats it
            digest = hashlib.blake2b(job_id.encode(), digest_size=6).digest()
            params = params.model_copy(update={"seed": int.from_bytes(digest, "little")})
        self._engine.sampler.add(
            SampleJob(
                job_id=job_id,
                weights_id=loaded.weights_id,
                prompt=tokens,
                params=params,
                num_samples=operation.num_samples,
                include_prompt_logprobs=operation.include_prompt_logprobs,
                stream=operation.stream,
                tenant=project,
            )
        )
        self._running.add(job_id)

    def _get(self, sampler_id: str) -> Loaded:
        ready = self._loaded.get(sampler_id)
        if ready is not None and ready.expires_at is not None and ready.expires_at <= self._now():
            self.release(sampler_id)
        elif ready is not None:
            self._loaded.move_to_end(sampler_id)
            return ready
        base_model, folder, expires_at = self._find(sampler_id)
        model = self._engine.get_model(base_model)
        weights_id = self._weights_id(sampler_id)
        version = self._engine.sampler.load(weights_id, base_model, folder)
        loaded = Loaded(
            weights_id=weights_id,
            model=model,
            version=version,
            pinned=False,
            expires_at=expires_at,
        )
        self._keep(sampler_id, loaded)
        return loaded

    def _find(self, sampler_id: str) -> tuple[str, Path | None, datetime | None]:
        """The base model of a sampler, the folder of its weights, and when they expire."""
        if sampler_id.startswith(BASE):
            return sampler_id.removeprefix(BASE), None, None
        if sampler_id.startswith(SCHEME):
            checkpoint, folder = self._open(sampler_id)
            return checkpoint.base_model, folder, checkpoint.expires_at
        if sampler_id in self._folders:
            return *self._folders[sampler_id], None
        raise NotFoundError(
            f"no sampler has the id {sampler_id!r}.",
            field="sampler_id",
            hint="Open it with create_sampling_client.",
        )

    def _open(self, path: str) -> tuple[CheckpointInfo, Path]:
        """A checkpoint, or a sampler without a name that was kept."""
        try:
            return self._checkpoints.open(path)
        except CheckpointNotFoundError:
            if self._kept is None:
                raise
            return self._kept.open(path)

    def _keep(self, sampler_id: str, loaded: Loaded) -> None:
        self._loaded[sampler_id] = loaded
        spare = [id for id, other in self._loaded.items() if not other.pinned]
        for old in spare[: -self._max_loaded]:
            self.release(old)

    def _weights_id(self, sampler_id: str) -> str:
        self._count += 1
        return f"{sampler_id}#{self._count}"

    def _source(self, folder: Path, base_model: str | None) -> tuple[str, Path | None]:
        """The base model of a folder's weights, and the folder if it holds an adapter."""
        if (folder / MANIFEST).is_file():
            return self._checkpoints.open(str(folder))[0].base_model, folder
        if (folder / "adapter_config.json").is_file():
            config = json.loads((folder / "adapter_config.json").read_text())
            return base_model or config.get("base_model_name_or_path") or "", folder
        if (folder / "config.json").is_file():
            return str(folder), None
        raise CheckpointNotFoundError(
            f"{folder} is neither an adapter nor a model.",
            field="model_path",
            hint="Give a weaver:// path, or a folder with adapter_config.json or config.json.",
        )


def _check_sample(operation: Sample, tokens: Sequence[int], model: ModelInfo) -> None:
    if operation.num_samples == 0 and not operation.include_prompt_logprobs:
        raise InvalidParamsError(
            "is 0.", field="num_samples", hint="Ask for a sample, or for the prompt's logprobs."
        )
    if operation.stream and operation.num_samples == 0:
        raise InvalidRequestError("has nothing to stream.", field="stream", hint="Leave it out.")
    max_new_tokens = operation.params.max_tokens if operation.num_samples else 0
    check_tokens(tokens, model, field="prompt", max_new_tokens=max_new_tokens)
    high = max(operation.params.stop_token_ids, default=0)
    if high >= model.vocab_size:
        raise TokenOutOfRangeError(
            f"has the token {high}.",
            field="stop_token_ids",
            hint=f"Tokens of this model are 0 to {model.vocab_size - 1}.",
        )
