"""The protobuf messages of Tinker's protocol, read from `tinker.binpb`; for bodies and answers.

A compiled description serves every release of the protobuf library, where code that its compiler
writes would ask for its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_FILES = descriptor_pb2.FileDescriptorSet.FromString(
    Path(__file__).with_name("tinker.binpb").read_bytes()
)
_POOL = descriptor_pool.DescriptorPool()
for _file in _FILES.file:
    _POOL.Add(_file)


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"weaver.tinker.{name}"))


ForwardBackwardOutput = _message("ForwardBackwardOutput")
ForwardBackwardRequest = _message("ForwardBackwardRequest")
SampleResponse = _message("SampleResponse")

MEDIA_TYPE = "application/x-protobuf"
FLOAT32, INT64 = 1, 2
"""Of the enumeration DType; requests have no other."""
STOP, LENGTH = 0, 1
"""Of the enumeration StopReason."""
