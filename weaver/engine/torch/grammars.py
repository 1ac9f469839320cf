"""Structured output: which tokens a sample may go on with, so that its text keeps to a grammar.

`TorchEngine.check_structure` compiles what a request brings, beside the event loop and the engine's
thread; `RunningJob` gives each sample a `Guide`, whose mask `TorchSampler` draws by. The automata
are those of llguidance, an extra, imported when it is first asked for. V vocabulary.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from weaver.boundary import attempt, converting, or_raise
from weaver.errors import InvalidParamsError, UnsupportedError, WeaverError, requiring
from weaver.threads import out_at_exit
from weaver.types import SamplingParams

KEPT = 64
"""Compiled grammars of a model, those used last."""
COMPILE_S, STEP_S = 0.8, 0.5
"""What compiling may take with the first mask, and, of the processor, each mask behind it. Either
is milliseconds; some patterns of a hundred characters take seconds."""
MOST_STATES = 50_000
"""Of an automaton, some 2 kB each."""
MOST_ITEMS = 10_000
"""Of its parser at one place, such as properties that may follow: 20,000 take 1 ms."""
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,20}"
"""Between the parts of JSON; bounded, so that no sample is whitespace to its end."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A grammar at its beginning."""

    field: str
    """Of `SamplingParams`, that it was made of."""
    matcher: Any
    """The library's, to be copied."""
    bits: bytes
    """Of the tokens that a text may begin with."""


class Grammars:
    """Those of one model, compiled once each; any thread may ask.

    Raises:
        MissingDependencyError: the extra `structured` is not installed.
        UnsupportedError: a tokenizer that llguidance cannot read.
    """

    def __init__(self, tokenizer: Any, *, name: str, vocab_size: int) -> None:
        with requiring("structured output", "structured"):
            import llguidance
        self._library = llguidance
        self._limits = llguidance.LLParserLimits(
            max_lexer_states=MOST_STATES, max_items_in_row=MOST_ITEMS, verbose_errors=False
        )
        self._vocab_size = vocab_size
        refused = UnsupportedError(
            f"the tokenizer of {name} is of a kind that structured output cannot read.",
            field="json_schema",
            hint="Choose a model with a tokenizer.json, or leave the structure out.",
        )
        with converting(lambda error: refused):
            backend = copy.copy(tokenizer.backend_tokenizer)
            backend.no_padding()
            backend.no_truncation()
            size = max(vocab_size, len(tokenizer))
            self._tokens = llguidance.LLTokenizer(backend.to_str(), n_vocab=size)
        self._compiled: OrderedDict[tuple[str, str], Compiled] = OrderedDict()
        self._changing = threading.Lock()

    def compiled(self, params: SamplingParams) -> Compiled:
        """What the parameters ask for; takes up to a second at the first time.

        Raises:
            InvalidParamsError: no grammar, or one that is too large, with the library's words.
        """
        if params.json_schema is not None:
            key = "json_schema", params.json_schema
        else:
            key = "grammar", params.grammar or ""
        with self._changing:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key]
        made = self._in_time(*key)
        with self._changing:
            self._compiled[key] = made
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return made

    def guide(self, params: SamplingParams, *, ends: frozenset[int]) -> Guide:
        """One for samples that `ends` end, to be copied. Errors: see `compiled`."""
        return Guide(self.compiled(params), ends=ends, vocab_size=self._vocab_size)

    def _in_time(self, field: str, text: str) -> Compiled:
        """In a thread that is left behind where it takes long: nothing else can stop it."""
        made: Future[Compiled | WeaverError] = Future()

        def work() -> None:
            made.set_result(out_at_exit(lambda: attempt(self._compile, field, text)))

        threading.Thread(target=work, name="weaver-grammar", daemon=True).start()
        try:
            return or_raise(made.result(COMPILE_S))
        except TimeoutError:
            raise _slow(field, f"takes more than {COMPILE_S:g} s to compile") from None

    def _compile(self, field: str, text: str) -> Compiled:
        matchers = self._library.LLMatcher
        if field == "json_schema":
            options = {"whitespace_pattern": WHITESPACE}
            with converting(lambda error: _refused(str(error), field)):
                text = matchers.grammar_from_json_schema(text, defaults=options)
        matcher = matchers(self._tokens, text, log_level=0, limits=self._limits)
        bits = b"" if matcher.is_error() else matcher.compute_bitmask()
        _check(matcher, field)
        return Compiled(field, matcher, bits)


class Guide:
    """What one sample may go on with: `allowed`, bool [V] on the CPU.

    Tokens in `ends` are allowed where the text may end, and nowhere else.
    """

    def __init__(self, compiled: Compiled, *, ends: frozenset[int], vocab_size: int) -> None:
        self._field = compiled.field
        self._matcher = compiled.matcher.deep_copy()
        self._ends = sorted(end for end in ends if end < vocab_size)
        self._vocab_size = vocab_size
        self.allowed = self._read(compiled.bits)

    def copy(self) -> Guide:
        other = copy.copy(self)
        other._matcher = self._matcher.deep_copy()
        return other

    def take(self, token: int) -> bool:
        """Goes on behind a token that was allowed; whether any may follow.

        Raises:
            InvalidParamsError: the grammar is too large to go on with.
        """
        if token in self._ends:
            return False
        began = time.thread_time()
        self._matcher.consume_token(token)
        bits = self._matcher.compute_bitmask()
        _check(self._matcher, self._field)
        if time.thread_time() - began > STEP_S:
            raise _slow(self._field, f"takes more than {STEP_S:g} s for a token")
        self.allowed = self._read(bits)
        return bool(self.allowed.any())

    def _read(self, bits: bytes) -> torch.Tensor:
        whole = np.frombuffer(bits, np.uint8)
        allowed = np.unpackbits(whole, count=self._vocab_size, bitorder="little").astype(np.bool_)
        stopped = self._matcher.is_stopped()
        if stopped:  # what is left is the library's own end of a text
            allowed[:] = False
        allowed[self._ends] = stopped or self._matcher.is_accepting()
        return torch.from_numpy(allowed)


def _check(matcher: Any, field: str) -> None:
    if matcher.is_error():
        raise _refused(matcher.get_error().replace("<non-verbose/>", ""), field)


def _refused(said: str, field: str) -> InvalidParamsError:
    return InvalidParamsError(
        f"cannot be used: {' '.join(said.split())[:300]}.",
        field=field,
        hint="docs/types.md says what is understood.",
    )


def _slow(field: str, what: str) -> InvalidParamsError:
    return InvalidParamsError(f"{what}.", field=field, hint="Ask for less, or shorter repeats.")
