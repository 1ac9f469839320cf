"""What tells a resend from another submission with its id; sessions and the journal keep it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from weaver.tensors import TensorData
from weaver.types import Value

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weaver.protocol import Submission


def fingerprint(submission: Submission) -> bytes:
    """16 bytes that two submissions share only if they ask for the same at the same place."""
    digest, s = hashlib.blake2b(digest_size=16), submission
    for part in _parts([s.run_id, s.seq, s.lost_gradient, s.operation]):
        digest.update(part)
    return digest.digest()


def _parts(value: object) -> Iterator[bytes]:
    """An unambiguous byte form of a value: each piece is led by its type and its length."""
    if isinstance(value, TensorData):
        yield f"{value!r}".encode()
        yield value.to_numpy().tobytes()
    elif isinstance(value, Value):
        yield f"{type(value).__name__}<".encode()
        for name in type(value).model_fields:
            yield f"{name}=".encode()
            yield from _parts(getattr(value, name))
        yield b">"
    elif isinstance(value, Mapping):
        yield f"map{len(value)}".encode()
        for key in sorted(value):
            yield from _parts(key)
            yield from _parts(value[key])
    elif isinstance(value, (list, tuple)):
        yield f"list{len(value)}:".encode()
        if set(map(type, value)) == {int}:
            try:
                yield np.array(value, dtype=np.int64).tobytes()
            except OverflowError:  # in a user's metadata
                yield repr(value).encode()
        else:
            for item in value:
                yield from _parts(item)
    else:
        text = repr(value)
        yield f"{len(text)}:{text}".encode()
