"""What OpenAI's protocol says: of samples, whole or in pieces, of models, and of refusals."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weaver.server.adapters.openai.tools import certain, split_calls

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
    token_ids: bool
    tools: bool
    """Whether calls of tools are looked for."""
    tokenizer: Any
    prompts: Sequence[Sequence[int]] = ()
    """The tokens of each."""
    _offsets: dict[int, int] = field(default_factory=dict)
    """Characters of each choice so far."""
    _unsaid: dict[int, str] = field(default_factory=dict)
    """What a stream has not been told of a choice, since it may be a call."""

    def whole(self, results: Sequence[types.SampleResult]) -> types.JsonDict:
        """Of all prompts, in their order."""
        choices = []
        for at, result in enumerate(results):
            for i, sequence in enumerate(result.sequences):
                index = at * len(result.sequences) + i
                choices.append(self._choice(index, sequence, prompt=result.prompt_tokens))
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
            choice["logprobs"] = self._logprobs(delta.index, delta.tokens, delta.logprobs)
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
        self, index: int, sequence: types.SampledSequence, *, prompt: Sequence[int]
    ) -> types.JsonDict:
        choice: types.JsonDict = {"index": index, "finish_reason": sequence.stop_reason}
        if self.chat:
            said, calls = split_calls(sequence.text) if self.tools else (sequence.text, [])
            choice["message"] = {"role": "assistant", "content": said, "refusal": None}
            if calls:
                choice["message"] |= {"content": said or None, "tool_calls": calls}
                choice["finish_reason"] = "tool_calls"
        else:
            choice["text"] = sequence.text
        choice["logprobs"] = self._logprobs(index, sequence.tokens, sequence.logprobs)
        if self.token_ids:
            choice["token_ids"] = list(sequence.tokens)
            if not self.chat:
                choice["prompt_token_ids"] = list(prompt)
        return choice

    def _told(self, delta: types.SampleDelta) -> tuple[str, list[types.JsonDict]]:
        """What a stream is told now: text that is no part of a call, and at the end the calls."""
        if not self.tools:
            return delta.text, []
        text = self._unsaid.pop(delta.index, "") + delta.text
        if delta.stop_reason is not None:
            return split_calls(text)
        size = certain(text)
        self._unsaid[delta.index] = text[size:]
        return text[:size], []

    def _logprobs(
        self, index: int, tokens: Sequence[int], logprobs: Sequence[float]
    ) -> types.JsonDict | None:
        """Under the policy: untempered, unfiltered, in nats."""
        offset = self._offsets.setdefault(index, 0)
        if not self.logprobs:
            return None
        texts = [self._text(token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        self._offsets[index] = offset
        if self.chat:
            content = [
                {
                    "token": text,
                    "logprob": logprob,
                    "bytes": list(text.encode()),
                    "top_logprobs": [],
                }
                for text, logprob in zip(texts, logprobs, strict=True)
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": texts,
            "token_logprobs": list(logprobs),
            "top_logprobs": None,
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        if self.tokenizer is None:
            return f"token_id:{token}"
        return str(self.tokenizer.decode([token]))
