"""`Samplers`: which weights are ready to sample, and the samples that begin on them.

Called by the executor, on the event loop.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from anyio import to_thread

from weaver import errors
from weaver.boundary import attempt, attempt_async, blocking
from weaver.checks import check_targets, check_tokens, check_top
from weaver.engine.base import SampleJob, WeightsRef
from weaver.heads import check_asked
from weaver.protocol import OpenSampler, Sample, SamplerOpened
from weaver.server.checkpoints import SCHEME
from weaver.server.manifest import MANIFEST
from weaver.types import ModelInput

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from weaver.engine.base import Engine, SampleProgress
    from weaver.server.checkpoints import Checkpoints
    from weaver.types import CheckpointInfo, Head, ModelInfo


BASE = "base:"
"""What the id of a sampler on base weights begins with."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Weights that the engine's sampler holds under `weights_id`."""

    weights_id: str
    model: ModelInfo
    version: int
    head: Head | None
    pinned: bool
    """They exist nowhere else, so they are never dropped to make room."""
    expires_at: datetime | None = None


@dataclass(slots=True, eq=False)
class Samplers:
    """A sampler's id says where its weights come from, so that it can be loaded whenever needed.

    `base:<model>`, a `weaver://` path, or a folder that `open` was given. At most `max_loaded` that
    could be loaded again are kept, those used last.
    """

    engine: Engine
    checkpoints: Checkpoints
    kept: Checkpoints | None
    """Samplers without a name, if they outlive this process."""
    max_loaded: int
    now: Callable[[], datetime]
    _loaded: OrderedDict[str, Loaded] = field(default_factory=OrderedDict)
    _loading: anyio.Lock = field(default_factory=anyio.Lock)
    _folders: dict[str, tuple[str, Path | None]] = field(default_factory=dict)
    _count: int = 0

    async def open(self, operation: OpenSampler) -> SamplerOpened:
        """Raises CheckpointNotFoundError, CheckpointCorruptError, CheckpointMismatchError ..."""
        path, base_model = operation.model_path, operation.base_model
        if path is None:
            sampler_id = f"{BASE}{base_model}"
        elif path.startswith(SCHEME):
            sampler_id = path
        else:
            folder, source = await blocking(self._source, path, base_model)
            sampler_id = str(folder)
            self._folders[sampler_id] = source
        loaded = await self._get(sampler_id)
        check_asked(operation.head is not None, loaded.head)
        if path is not None and base_model not in (None, loaded.model.name):
            raise errors.CheckpointMismatchError(
                f"{path} was made from {loaded.model.name}, not from {base_model}.",
                field="base_model",
                hint="Leave base_model out.",
            )
        return SamplerOpened(
            sampler_id=sampler_id, model=loaded.model, weights_version=loaded.version
        )

    async def publish(
        self,
        sampler_id: str,
        ref: WeightsRef,
        *,
        model: ModelInfo,
        head: Head | None,
        pinned: bool,
        expires_at: datetime | None,
    ) -> None:
        """Makes weights sampleable; samples that run on former ones go on with those."""
        self._count += 1
        weights_id = f"{sampler_id}#{self._count}"
        version = await self.engine.publish(weights_id, ref)
        loaded = Loaded(weights_id, model, version, head, pinned=pinned, expires_at=expires_at)
        await self._keep(sampler_id, loaded)

    def prepare(self, operation: Sample) -> Sample:
        """The same with the tokens of its text; in any thread, beside whatever else runs.

        What its samples are to keep to is compiled.
        """
        ready = self._loaded.get(operation.sampler_id)
        name = ready.model.name if ready else self._find(operation.sampler_id)[0]
        if operation.params.structured:
            self.engine.check_structure(name, operation.params)
        if isinstance(operation.prompt, ModelInput):
            return operation
        tokens = ModelInput.from_ints(self.engine.encode(name, operation.prompt))
        return operation.model_copy(update={"prompt": tokens})

    async def release(self, sampler_id: str) -> None:
        """Forgets weights once running samples are done with them; ignores unknown ids."""
        loaded = self._loaded.pop(sampler_id, None)
        if loaded is not None:
            await self._let_go(loaded)

    async def discard(self, sampler_id: str) -> None:
        """Releases weights, and deletes them where they were kept without a name."""
        await self.release(sampler_id)
        if self.kept is not None and sampler_id.startswith(SCHEME):
            await to_thread.run_sync(attempt, self.kept.delete, sampler_id)

    async def clear(self) -> None:
        """Forgets all weights."""
        for sampler_id in list(self._loaded):
            await self.release(sampler_id)

    async def begin(
        self,
        job_id: str,
        operation: Sample,
        tell: Callable[[SampleProgress], None],
        *,
        project: str,
    ) -> Callable[[], None]:
        """Gives the engine a job, as `Sampler.sample` has it.

        Raises:
            NotFoundError, InvalidParamsError, ContextLengthError, TokenOutOfRangeError ...
        """
        loaded = await self._get(operation.sampler_id)
        assert isinstance(operation.prompt, ModelInput)  # text was encoded when it was accepted
        tokens = operation.prompt.to_ints()
        check_asked(operation.score, loaded.head)
        _check_sample(operation, tokens, loaded.model)
        params = operation.params
        if params.seed is None:  # drawn from the id, so that a restart in its middle repeats it
            digest = hashlib.blake2b(job_id.encode(), digest_size=6).digest()
            params = params.model_copy(update={"seed": int.from_bytes(digest, "little")})
        job = SampleJob(
            job_id=job_id,
            weights_id=loaded.weights_id,
            prompt=tokens,
            params=params,
            num_samples=operation.num_samples,
            score=operation.score,
            include_prompt_logprobs=operation.include_prompt_logprobs,
            top_logprobs=operation.top_logprobs,
            prompt_top_logprobs=operation.prompt_top_logprobs,
            prompt_targets=operation.prompt_targets,
            stream=operation.stream,
            tenant=project,
        )
        return self.engine.sample(job, tell)

    async def _get(self, sampler_id: str) -> Loaded:
        """Nothing is awaited once the weights are found, so that they are there when it ends."""
        ready = self._loaded.get(sampler_id)
        if ready is not None and ready.expires_at is not None and ready.expires_at <= self.now():
            await self.release(sampler_id)
        while sampler_id not in self._loaded:
            async with self._loading:
                if sampler_id not in self._loaded:
                    await self._load(sampler_id)
        self._loaded.move_to_end(sampler_id)
        return self._loaded[sampler_id]

    async def _load(self, sampler_id: str) -> None:
        base_model, folder, expires_at = await blocking(self._find, sampler_id)
        model = await blocking(self.engine.get_model, base_model)
        ref = WeightsRef(base_model=base_model, uri=None if folder is None else folder.as_uri())
        head = None if folder is None else await blocking(_head_of, folder)
        await self.publish(
            sampler_id, ref, model=model, head=head, pinned=False, expires_at=expires_at
        )

    def _find(self, sampler_id: str) -> tuple[str, Path | None, datetime | None]:
        """The base model of a sampler, the folder of its weights, and when they expire."""
        if sampler_id.startswith(BASE):
            return sampler_id.removeprefix(BASE), None, None
        if sampler_id.startswith(SCHEME):
            checkpoint, folder = self._open(sampler_id)
            return checkpoint.base_model, folder, checkpoint.expires_at
        if sampler_id in self._folders:
            return *self._folders[sampler_id], None
        raise errors.NotFoundError(
            f"no sampler has the id {sampler_id!r}.",
            field="sampler_id",
            hint="Open it with create_sampling_client.",
        )

    def _open(self, path: str) -> tuple[CheckpointInfo, Path]:
        """A checkpoint, or a sampler without a name that was kept."""
        try:
            return self.checkpoints.open(path)
        except errors.CheckpointNotFoundError:
            if self.kept is None:
                raise
            return self.kept.open(path)

    async def _keep(self, sampler_id: str, loaded: Loaded) -> None:
        """In place of former weights, and of those that there is no room for any more."""
        former = self._loaded.pop(sampler_id, None)
        self._loaded[sampler_id] = loaded
        spare = [id for id, other in self._loaded.items() if not other.pinned]
        gone = [self._loaded.pop(id) for id in spare[: -self.max_loaded]]
        for one in [former, *gone] if former else gone:
            await self._let_go(one)

    async def _let_go(self, loaded: Loaded) -> None:
        await attempt_async(self.engine.release, loaded.weights_id)

    def _source(self, path: str, base_model: str | None) -> tuple[Path, tuple[str, Path | None]]:
        """A folder; the base model of its weights, and the folder again if it holds an adapter."""
        folder = Path(path).expanduser().absolute()
        if (folder / MANIFEST).is_file():
            return folder, (self.checkpoints.open(str(folder))[0].base_model, folder)
        if (folder / "adapter_config.json").is_file():
            config = json.loads((folder / "adapter_config.json").read_text())
            name = base_model or config.get("base_model_name_or_path") or ""
            return folder, (name, folder)
        if (folder / "config.json").is_file():
            return folder, (str(folder), None)
        raise errors.CheckpointNotFoundError(
            f"{folder} is neither an adapter nor a model.",
            field="model_path",
            hint="Give a weaver:// path, or a folder with adapter_config.json or config.json; "
            "a base model's name is given as base_model.",
        )


def _head_of(folder: Path) -> Head | None:
    """Of the adapter in a folder; None where there is none, which the engine says."""
    try:
        settings = json.loads((folder / "adapter_config.json").read_text())
        return "scalar" if settings.get("modules_to_save") else None
    except (OSError, ValueError, AttributeError):
        return None


def _check_sample(operation: Sample, tokens: Sequence[int], model: ModelInfo) -> None:
    top, targets = operation.prompt_top_logprobs, operation.prompt_targets
    scored = operation.include_prompt_logprobs or top or targets is not None
    if operation.score:
        if scored or operation.num_samples:
            raise errors.InvalidParamsError(
                "a score is asked, and more of the same prompt.",
                field="score",
                hint="A reward model gives nothing else; leave num_samples at 0.",
            )
        scored = True
    if operation.num_samples == 0 and (operation.top_logprobs or not scored):
        raise errors.InvalidParamsError(
            "is 0.",
            field="num_samples",
            hint="Ask for a sample, or for what is said of the prompt.",
        )
    if operation.stream and operation.num_samples == 0:
        raise errors.InvalidRequestError(
            "has nothing to stream.", field="stream", hint="Leave it out."
        )
    max_new_tokens = operation.params.max_tokens if operation.num_samples else 0
    check_tokens(tokens, model, field="prompt", max_new_tokens=max_new_tokens)
    check_top(operation.top_logprobs, model, field="top_logprobs")
    check_top(top, model, field="prompt_top_logprobs")
    if targets is not None:
        check_targets(targets, len(tokens), model)
    named = {
        "stop_token_ids": operation.params.stop_token_ids,
        "logit_bias": [token for token, _ in operation.params.logit_bias],
    }
    for name, ids in named.items():
        if (high := max(ids, default=0)) >= model.vocab_size:
            raise errors.TokenOutOfRangeError(
                f"has the token {high}.",
                field=name,
                hint=f"Tokens of this model are 0 to {model.vocab_size - 1}.",
            )
