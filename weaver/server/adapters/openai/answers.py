"""What OpenAI's protocol says: of samples, whole or in pieces, of models, and of refusals."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from weaver.server.adapters.openai.tools import CallStream, split_calls

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from fastapi.responses import JSONResponse

    from weaver import types
    from weaver.errors import WeaverError
    from weaver.server.http.errors import Refusal

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def refused(refusal: Refusal) -> JSONResponse:
    return refusal.answer(failed(refusal.error, status=refusal.status))


def failed(error: WeaverError, *, status: int = 500) -> types.JsonDict:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    inner = {"message": str(error), "type": kind, "param": error.field, "code": error.code}
    return {"error": inner}


def model_json(name: str, *, created: int, root: str | None = None) -> types.JsonDict:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "weaver",
        **({"root": root} if root else {}),
    }


@dataclass(kw_only=True)
class Writer:
    """Writes the answers to one request; `tokenizer` is the model's, or None where it has none."""

    id: str
    created: int
    model: str
    chat: bool
    logprobs: bool
    top: int = 0
    """Likeliest tokens that are shown at each place, if log-probabilities are."""
    echo: Sequence[str | Sequence[int]] = ()
    """Prompts as they came, to be repeated before what follows them."""
    token_ids: bool
    tools: Collection[str]
    """Their names; without any, calls are not looked for."""
    tokenizer: Any
    prompts: Sequence[Sequence[int]] = ()
    """The tokens of each."""
    _offsets: dict[int, int] = field(default_factory=dict)
    """Characters of each choice so far."""
    _texts: dict[int, str] = field(default_factory=dict)
    """Of single tokens."""
    _calls: dict[int, CallStream] = field(default_factory=dict)
    """Of each choice of a stream."""

    def whole(self, results: Sequence[types.SampleResult]) -> types.JsonDict:
        """Of all prompts, in their order; may be slow where it shows log-probabilities."""
        choices = []
        for at, result in enumerate(results):
            for i, sequence in enumerate(result.sequences):
                index = at * len(result.sequences) + i
                choice = self._choice(index, sequence, result)
                if self.echo:
                    choice["text"] = self._echoed(self.echo[at]) + choice["text"]
                choices.append(choice)
        tokens = [len(s.tokens) for result in results for s in result.sequences]
        usage = self.usage(sum(tokens))
        shown = {"prompt_token_ids": list(self.prompts[0])} if self.token_ids and self.chat else {}
        return {**self._head("chat.completion"), "choices": choices, "usage": usage, **shown}

    def usage(self, completion_tokens: int) -> types.JsonDict:
        prompt_tokens = sum(len(prompt) for prompt in self.prompts)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    def pieces(self, deltas: Sequence[types.SampleDelta]) -> str:
        """Of a stream, which is ASCII: some readers take U+2028 for the end of a line."""
        texts = []
        for delta in deltas:
            opens = delta.index not in self._offsets
            choice: types.JsonDict = {"index": delta.index, "finish_reason": delta.stop_reason}
            if self.chat:
                role = {"role": "assistant"} if opens else {}
                said, calls = self._told(delta)
                choice["delta"] = {**role, "content": said}
                if calls:
                    numbered = [{"index": i, **call} for i, call in enumerate(calls)]
                    choice["delta"]["tool_calls"] = numbered
                    choice["finish_reason"] = "tool_calls"
            else:
                choice["text"] = delta.text
            places = _places(delta.tokens, delta.logprobs, delta.top_logprobs)
            choice["logprobs"] = self._logprobs(delta.index, places)
            if self.token_ids:
                choice["token_ids"] = list(delta.tokens)
            texts.append(self.event({**self._head("chat.completion.chunk"), "choices": [choice]}))
        return "".join(texts)

    def last_usage(self, completion_tokens: int) -> str:
        usage = self.usage(completion_tokens)
        head = self._head("chat.completion.chunk")
        return self.event({**head, "choices": [], "usage": usage})

    @staticmethod
    def event(content: Mapping[str, Any]) -> str:
        return f"data: {json.dumps(content)}\n\n"

    def _head(self, kind: str) -> types.JsonDict:
        return {
            "id": self.id,
            "object": kind if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
        }

    def _choice(
        self, index: int, sequence: types.SampledSequence, result: types.SampleResult
    ) -> types.JsonDict:
        choice: types.JsonDict = {"index": index, "finish_reason": sequence.stop_reason}
        if self.chat:
            none: tuple[str, list[types.JsonDict]] = sequence.text, []
            said, calls = split_calls(sequence.text, self.tools) if self.tools else none
            choice["message"] = {"role": "assistant", "content": said, "refusal": None}
            if calls:
                choice["message"] |= {"content": said or None, "tool_calls": calls}
                choice["finish_reason"] = "tool_calls"
        else:
            choice["text"] = sequence.text
        places = _places(sequence.tokens, sequence.logprobs, sequence.top_logprobs)
        if self.echo and result.prompt_logprobs is not None:
            top = result.prompt_top_logprobs
            places = _places(result.prompt_tokens, result.prompt_logprobs, top) + places
        choice["logprobs"] = self._logprobs(index, places)
        if self.token_ids:
            choice["token_ids"] = list(sequence.tokens)
            if not self.chat:
                choice["prompt_token_ids"] = list(result.prompt_tokens)
        return choice

    def _told(self, delta: types.SampleDelta) -> tuple[str, list[types.JsonDict]]:
        """What a stream is told now: text that is no part of a call, and at the end the calls."""
        if not self.tools:
            return delta.text, []
        calls = self._calls.setdefault(delta.index, CallStream(self.tools))
        if delta.stop_reason is not None:
            return calls.end(delta.text)
        return calls.push(delta.text), []

    def _logprobs(self, index: int, places: Sequence[Place]) -> types.JsonDict | None:
        """Under the policy: untempered, unfiltered, in nats."""
        offset = self._offsets.setdefault(index, 0)
        if not self.logprobs:
            return None
        if self.chat:
            content = [
                {
                    **self._token(place.token, place.logprob),
                    "top_logprobs": [self._token(*one) for one in place.top],
                }
                for place in places
            ]
            return {"content": content, "refusal": None}
        texts = [self._text(place.token) for place in places]
        offsets = list(accumulate(map(len, texts), initial=offset))
        self._offsets[index] = offsets.pop()
        return {
            "tokens": texts,
            "token_logprobs": [place.logprob for place in places],
            "top_logprobs": [self._top(place) for place in places] if self.top else None,
            "text_offset": offsets,
        }

    def _token(self, token: int, logprob: float | None) -> types.JsonDict:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _top(self, place: Place) -> dict[str, float] | None:
        """Of a completion, by their texts, the token itself with them; none before the first."""
        if place.logprob is None:
            return None
        shown = {self._text(token): logprob for token, logprob in reversed(place.top)}
        return {self._text(place.token): place.logprob, **shown}

    def _echoed(self, prompt: str | Sequence[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            return "".join(map(self._text, prompt))
        return str(self.tokenizer.decode(list(prompt)))

    def _text(self, token: int) -> str:
        if self.tokenizer is None:
            return f"token_id:{token}"
        if token not in self._texts:
            self._texts[token] = str(self.tokenizer.decode([token]))
        return self._texts[token]


class Place(NamedTuple):
    """A token of a choice, and the likeliest ones in its place."""

    token: int
    logprob: float | None
    """None for the first of a prompt."""
    top: Sequence[tuple[int, float]]


def _places(
    tokens: Sequence[int], logprobs: Sequence[float | None], top: types.TopLogprobs | None
) -> list[Place]:
    if top is None:
        return [Place(*one, ()) for one in zip(tokens, logprobs, strict=True)]
    rows = zip(top.tokens.tolist(), top.logprobs.tolist(), strict=True)
    likeliest = [list(zip(*row, strict=True)) for row in rows]
    return [Place(*one) for one in zip(tokens, logprobs, likeliest, strict=True)]
