"""Damaged binary messages of both interfaces, in a process that may not grow beyond a limit."""

from __future__ import annotations

import subprocess
import sys

FUZZ = """
import random, resource, sys, zstandard
import numpy as np
from pydantic import TypeAdapter
from tests.server.adapters.helpers import multipart, packed
from tests.test_wire import batch_of
from weaver import wire
from weaver.errors import WeaverError
from weaver.protocol import Submission
from weaver.server.adapters.weaver_rest import tensors as rest
from weaver.server.adapters.weaver_rest.bodies import BackwardBody

LIMIT, ROOM, ROUNDS = 2**20, 24 * 2**20, 6000
SUBMISSIONS = TypeAdapter(tuple[Submission, ...])
limits = wire.WireLimits(header_bytes=LIMIT, array_bytes=LIMIT)
rest.DECODED_BYTES = LIMIT
chance = random.Random(7)
bomb = zstandard.compress(bytes(256 * 2**20))
unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64 * 2**20))
message, (form, headers) = wire.encode(batch_of(2, 40)), packed("zstd")

def damaged(data):
    data = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(max(len(data), 1))
        size = chance.choice([1, 2, 4, 8, 64])
        match chance.randrange(5):
            case 0: data[at : at + 1] = bytes([chance.randrange(256)])
            case 1: del data[at : at + size]
            case 2: data[at:at] = chance.randbytes(size)
            case 3: data[at : at + size] = b"\\xff" * size
            case 4: del data[max(at, 1) :]
    return bytes(data)

def giant(data):
    header, arrays = (chance.choice([0, 2, 2**16, 2**20, 2**31, 2**32 - 1]) for _ in range(2))
    arrays = chance.choice([arrays, 2**40, 2**63, 2**64 - 1])
    return data[:4] + header.to_bytes(4, "little") + arrays.to_bytes(8, "little") + data[16:]

def bombed(data):
    header = int.from_bytes(data[4:8], "little")
    frame, size = chance.choice([bomb, unsized]), chance.choice([10, LIMIT, LIMIT + 1, 2**28])
    return data[:8] + size.to_bytes(8, "little") + data[16 : 16 + header] + frame

def bombed_form(_):
    sizes = {"decoded_size_bytes": chance.choice([10, LIMIT, LIMIT + 1, 2**28])}
    import hashlib
    frame = chance.choice([bomb, unsized])
    sizes |= {"size_bytes": len(frame), "sha256": hashlib.sha256(frame).hexdigest()}
    whole, _ = packed("zstd", **sizes)
    manifest = whole.split(b"\\r\\n\\r\\n")[1].split(b"\\r\\n--weaver")[0]
    return multipart(manifest, frame)[0]

def kept(call, data):
    try:
        call(data)
    except WeaverError:
        return 0
    return 1

decode = lambda data: wire.decode(data, SUBMISSIONS, limits=limits)
parse = lambda data: rest.parse(data, headers["Content-Type"], BackwardBody)
assert kept(decode, message) and kept(parse, form)
status = dict(line.split(":") for line in open("/proc/self/status"))
room = int(status["VmSize"].split()[0]) * 1024 + ROOM
resource.setrlimit(resource.RLIMIT_AS, (room, room))
read = 0
for _ in range(ROUNDS):
    read += kept(decode, chance.choice([damaged, damaged, giant, bombed])(message))
    read += kept(parse, chance.choice([damaged, damaged, damaged, bombed_form])(form))
print("read", read)
"""


def test_no_message_takes_more_memory_than_its_limit() -> None:
    """Limits of 1 MiB, in 24 MiB of room; a MemoryError or any other defect ends the process."""
    done = subprocess.run(
        [sys.executable, "-c", FUZZ], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0 < int(done.stdout.split()[1]) < 12_000
