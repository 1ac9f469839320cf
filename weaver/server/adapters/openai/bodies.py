"""What requests of OpenAI's protocol bring, and the sampling parameters that are made of it.

Fields that change what is answered are named here, so that none is passed over in silence; those
beside them (`user`, `metadata`, `store`) say nothing to a server of one's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field
from pydantic_core import from_json

from weaver import errors, types
from weaver.server.adapters.openai.forms import Form, ResponseFormat, Structure, one_of
from weaver.server.http.body import Body
from weaver.types import JsonDict

MOST_PROMPTS = 256
COMPLETION_TOKENS = 16
"""Those of a completion whose request does not say."""
MOST_TOP = 20
"""Likeliest tokens at each place."""
MOST_ECHOED = 2**20
"""Log-probabilities of prompts in one answer, all together; each takes some 50 bytes of it."""
NOTHING = types.SampledSequence(
    tokens=(), text="", logprobs=(), sampling_logprobs=(), stop_reason="length"
)
"""What follows a prompt of which only the log-probabilities are asked for."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "functions": ([], None),
    "guided_whitespace_pattern": (None,),
    "suffix": ("", None),
    "modalities": (["text"], None),
    "audio": (None,),
}
"""Fields that are not computed here, with the values that ask for nothing."""


class StreamOptions(Body):
    include_usage: bool = False


class SampleBody(Body):
    model: Annotated[str, Field(min_length=1, max_length=1024)]
    max_tokens: int | None = None
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    n: int | None = Field(1, ge=1, le=256)
    stop: str | tuple[str, ...] | None = None
    seed: int | None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    logit_bias: Mapping[str, float] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    # beside OpenAI's own, by the names that vLLM has given them
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    return_token_ids: bool | None = False
    response_format: ResponseFormat | None = None
    structured_outputs: Structure | None = None
    guided_json: JsonDict | str | None = None
    guided_regex: str | None = None
    guided_choice: tuple[str, ...] | None = None
    guided_grammar: str | None = None

    @classmethod
    def of(cls, content: Any) -> Self:
        """Raises UnsupportedError as well: a field that is not computed here asks for something."""
        for name, neutral in NEUTRAL.items():
            if isinstance(content, dict) and content.get(name) not in neutral:
                raise errors.UnsupportedError(
                    "is not computed here.", field=name, hint="Leave it out."
                )
        return super().of(content)

    @property
    def count(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def forms(self) -> list[Form]:
        """That the text is to have, one for each that is given. Raises InvalidRequestError."""
        names = ("json", "regex", "choice", "grammar")
        guided = Structure.of({name: getattr(self, f"guided_{name}") for name in names})
        wanted = [] if self.response_format is None else [self.response_format.form]
        for structure in (self.structured_outputs, guided):
            wanted += structure.forms if structure is not None else []
        return wanted

    def params(self, max_tokens: int, *forms: Form) -> types.SamplingParams:
        """Raises InvalidRequestError."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return types.SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            stop=stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            seed=self.seed,
            **one_of([*self.forms, *forms]),
        )


class CompletionBody(SampleBody):
    prompt: (
        str
        | Annotated[tuple[int, ...], Field(min_length=1)]
        | Annotated[tuple[str, ...], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[tuple[tuple[int, ...], ...], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    top_logprobs: Literal[0] | None = None
    """Of chats."""
    echo: bool | None = False
    best_of: int | None = None

    @property
    def prompts(self) -> Sequence[str | tuple[int, ...]]:
        """One for each text or list of tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [tuple(token for token in self.prompt if isinstance(token, int))]
        return [one for one in self.prompt if not isinstance(one, int)]


class TextPart(Body):
    type: str
    text: str = ""


class Called(Body):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str = "{}"


class ToolCall(Body):
    function: Called

    def native(self, where: str) -> types.JsonDict:
        """With its arguments as chat templates take them."""
        try:
            arguments = from_json(self.function.arguments or "{}", allow_inf_nan=False)
        except ValueError as error:
            raise errors.InvalidRequestError(
                f"are not JSON: {error}.", field=f"{where}.function.arguments"
            ) from None
        called = {"name": self.function.name, "arguments": arguments}
        return {"type": "function", "function": called}


class Function(Body):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str = ""
    parameters: types.JsonDict = Field(default_factory=dict)


class Tool(Body):
    type: Literal["function"]
    function: Function


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | tuple[TextPart, ...] | None = None
    tool_calls: tuple[ToolCall, ...] | None = None

    def native(self, at: int) -> types.Message:
        """Raises UnsupportedError: it has more than text."""
        parts = (self.content,) if isinstance(self.content, str) else self.content or ()
        if any(not isinstance(part, str) and part.type != "text" for part in parts):
            raise errors.UnsupportedError(
                "has a part that is not text.", field=f"messages[{at}]", hint="Send text alone."
            )
        calls = [
            call.native(f"messages[{at}].tool_calls[{i}]")
            for i, call in enumerate(self.tool_calls or ())
        ]
        text = "".join(part if isinstance(part, str) else part.text for part in parts)
        role = "system" if self.role == "developer" else self.role
        return types.Message(role=role, content=text, tool_calls=tuple(calls))


class ChatBody(SampleBody):
    messages: tuple[ChatMessage, ...] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    echo: Literal[False] | None = False
    """Of completions."""
    tools: Annotated[tuple[Tool, ...], Field(max_length=128)] | None = None
    tool_choice: Any = None

    @property
    def functions(self) -> list[types.JsonDict]:
        """What the model may call."""
        shown = () if self.tool_choice == "none" else self.tools or ()
        return [tool.model_dump() for tool in shown]

    @property
    def names(self) -> list[str]:
        """Those of `functions`."""
        return [tool["function"]["name"] for tool in self.functions]

    @property
    def required(self) -> list[types.JsonDict]:
        """Functions of which one has to be called; none where the model may choose.

        Raises:
            InvalidRequestError: it asks for none that is there.
        """
        match self.tool_choice:
            case None | "none" | "auto":
                return []
            case "required":
                wanted = self.names
            case {"type": "function", "function": {"name": str(name)}}:
                wanted = [name]
            case _:
                wanted = []
        found = [one["function"] for one in self.functions if one["function"]["name"] in wanted]
        if not found:
            raise errors.InvalidRequestError(
                "asks for no function that `tools` has.",
                field="tool_choice",
                hint='Give "none", "auto", "required" or '
                '{"type": "function", "function": {"name": ...}}.',
            )
        return found

    @property
    def top(self) -> int | None:
        """Likeliest tokens to show beside log-probabilities; None without any of both.

        Raises:
            InvalidRequestError: the former alone are asked for.
        """
        if self.top_logprobs and not self.logprobs:
            raise errors.InvalidRequestError(
                "needs logprobs.", field="top_logprobs", hint="Set logprobs to true."
            )
        return self.top_logprobs or 0 if self.logprobs else None

    def chat(self) -> tuple[types.Message, ...]:
        return tuple(message.native(at) for at, message in enumerate(self.messages))


class TokenizeBody(Body):
    model: Annotated[str, Field(min_length=1, max_length=1024)]
    prompt: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
