"""What runs in the process of `python_tool`: shuts itself in, for good, then runs a model's code.

It needs Python's standard library alone, and reads its orders, a JSON line, from standard input:
`{"without": [], "folder": "/tmp/x", "limits": {"CPU": 5}, "read": ["/usr"], "code": "print(1)"}`.
Without code it only tries whether this kernel can hold it, and says what it cannot, as JSON.

Three interfaces of the kernel hold it: resource limits; Landlock (Linux 5.13), for files; a seccomp
filter, for what else a process can ask for. Numbers are those of the kernel's headers.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
NO_NEW_PRIVS, SET_SECCOMP, FILTER = 38, 22, 2
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # of Landlock, on every architecture
CAPABILITIES = 0x20080522  # the version of their form
READ = (1 << 2) | (1 << 3)  # files, folders
WRITE = 1 << 1
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
"""How many rights each version of Landlock has; later ones 16."""
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
EPERM, ENOSYS = 1, 38
CLONE_THREAD = 0x10000
F_SETSIG = 10
X32 = 0x40000000
SET_OWNER = {"fcntl": (8, 15), "ioctl": (0x8901, 0x8902)}
"""F_SETOWN and F_SETOWN_EX, FIOSETOWN and SIOCSPGRP: whom the kernel signals for a file."""
MACHINES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "fcntl": 72, "ioctl": 16,
            "socket": 41, "io_uring_setup": 425, "clone": 56, "clone3": 435, "fork": 57,
            "vfork": 58, "execve": 59, "execveat": 322, "kill": 62, "tkill": 200, "tgkill": 234,
            "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "pidfd_send_signal": 424,
            "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "prlimit64": 302,
            "unshare": 272, "setns": 308, "mount": 165, "bpf": 321, "perf_event_open": 298,
            "userfaultfd": 323, "keyctl": 250, "add_key": 248, "request_key": 249,
            "memfd_create": 319, "memfd_secret": 447, "shmget": 29, "msgget": 68, "semget": 64,
            "chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452, "chown": 92,
            "fchown": 93, "lchown": 94, "fchownat": 260, "setxattr": 188, "lsetxattr": 189,
            "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199,
            "utime": 132, "utimes": 235, "utimensat": 280, "futimesat": 261, "setpriority": 141,
            "sched_setparam": 142, "sched_setscheduler": 144, "sched_setaffinity": 203,
            "sched_setattr": 314, "ioprio_set": 251, "migrate_pages": 256, "move_pages": 279,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "fcntl": 25, "ioctl": 29,
            "socket": 198, "io_uring_setup": 425, "clone": 220, "clone3": 435, "execve": 221,
            "execveat": 281, "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138,
            "rt_tgsigqueueinfo": 240, "pidfd_send_signal": 424, "ptrace": 117,
            "process_vm_readv": 270, "process_vm_writev": 271, "prlimit64": 261, "unshare": 97,
            "setns": 268, "mount": 40, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282,
            "keyctl": 219, "add_key": 217, "request_key": 218, "memfd_create": 279,
            "memfd_secret": 447, "shmget": 194, "msgget": 186, "semget": 190, "fchmod": 52,
            "fchmodat": 53, "fchmodat2": 452, "fchown": 55, "fchownat": 54, "setxattr": 5,
            "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15,
            "fremovexattr": 16, "utimensat": 88, "setpriority": 140, "sched_setparam": 118,
            "sched_setscheduler": 119, "sched_setaffinity": 122, "sched_setattr": 274,
            "ioprio_set": 30, "migrate_pages": 238, "move_pages": 239,
        },
    ),
}  # fmt: skip
"""The number that seccomp has for a machine, and those of calls that are refused there."""
NETWORK = ("socket", "io_uring_setup")


class Refused(Exception):
    """This kernel cannot do it, and why."""


def limit(limits: dict[str, int]) -> None:
    for name, most in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        hardest = most if hard == resource.RLIM_INFINITY else min(most, hard)
        # one second more of CPU, so that the signal says what it was
        resource.setrlimit(kind, (hardest, hardest + (name == "CPU" and hardest == most)))


def check(result: int, what: str) -> int:
    if result < 0:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def keep_from_files(folder: str, read: list[str]) -> None:
    """Nothing is read but below `read`, and written but in the folder."""
    version = check(LIBC.syscall(CREATE_RULESET, None, 0, 1), "Landlock")
    rights = (1 << RIGHTS.get(version, 16)) - 1
    handled = struct.pack("Q", rights)
    rules = check(LIBC.syscall(CREATE_RULESET, handled, len(handled), 0), "Landlock")
    for path, allowed in [
        (folder, rights),
        ("/dev/null", READ | WRITE),
        *((x, READ) for x in read),
    ]:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # not on this machine
        if not os.path.isdir(path):
            allowed &= READ & ~(1 << 3) | WRITE
        rule = struct.pack("=Qi", allowed, place)
        check(LIBC.syscall(ADD_RULE, rules, 1, rule, 0), "Landlock")
        os.close(place)
    check(LIBC.prctl(NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    check(LIBC.syscall(RESTRICT_SELF, rules, 0), "Landlock")
    os.close(rules)


def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("HBBI", code, yes, no, value)


def load(offset: int) -> bytes:
    return step(0x20, offset)


def jump_if(value: int, yes: int = 0, no: int = 0, *, code: int = 0x15) -> bytes:
    return step(code, value, yes, no)


def answer(value: int) -> bytes:
    return step(0x06, value)


def keep_from_kernel(network: bool) -> None:
    """No sockets but pairs (with `network` those too), no processes, no signals to others, no
    rights of files changed, no capabilities."""
    if platform.machine() not in MACHINES or sys.byteorder != "little":
        raise Refused(f"no filter is written for {platform.machine()}")
    machine, calls = MACHINES[platform.machine()]
    refused = {name: number for name, number in calls.items() if not (network and name in NETWORK)}
    own = os.getpid()
    program = [load(4), jump_if(machine, 1), answer(KILL), load(0)]
    program += [jump_if(X32, 0, 1, code=0x35), answer(ERRNO | EPERM)]
    program += [jump_if(refused.pop("clone3"), 0, 1), answer(ERRNO | ENOSYS)]
    # threads, not processes
    program += [jump_if(refused.pop("clone"), 0, 4), load(16)]
    program += [jump_if(CLONE_THREAD, 1, 0, code=0x45), answer(ERRNO | EPERM), answer(ALLOW)]
    # of itself alone
    for name, whose in (("kill", own), ("tgkill", own), ("prlimit64", 0)):
        program += [jump_if(refused.pop(name), 0, 4), load(16)]
        program += [jump_if(whose, 1, 0), answer(ERRNO | EPERM), answer(ALLOW)]
    for name, commands in SET_OWNER.items():
        for command in commands:
            program += [jump_if(refused[name], 0, 4), load(24)]
            program += [jump_if(command, 0, 1), answer(ERRNO | EPERM), load(0)]
        del refused[name]
    for number in refused.values():
        program += [jump_if(number, 0, 1), answer(ERRNO | EPERM)]
    program.append(answer(ALLOW))
    code = ctypes.create_string_buffer(b"".join(program))
    shown = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    # root's rights beside those over its own files
    check(LIBC.capset(struct.pack("Ii", CAPABILITIES, 0), bytes(24)), "capabilities")
    check(LIBC.prctl(NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    check(LIBC.prctl(SET_SECCOMP, FILTER, shown, 0, 0), "seccomp")


def shut(orders: dict[str, Any]) -> dict[str, str]:
    """Shuts this process in; what could not be done, and why."""
    without, failed = orders["without"], {}
    os.chdir(orders["folder"])
    walls: dict[str, Callable[[], None]] = {
        "files": lambda: keep_from_files(orders["folder"], orders["read"]),
        "kernel": lambda: keep_from_kernel("network" in without),
    }
    for what, work in walls.items():
        if what not in without:
            try:
                work()
            except (Refused, OSError) as error:
                failed[what] = str(error)
    limit(orders["limits"])
    return failed


def end_with_the_owner() -> None:
    """The kernel kills this process when the other end of its standard input is closed."""
    owner = os.dup(0)
    fcntl.fcntl(owner, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(owner, F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(owner, fcntl.F_SETFL, fcntl.fcntl(owner, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([owner], [], [], 0)[0]:  # it was closed before
        os._exit(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def main() -> None:
    orders = json.loads(sys.stdin.readline())
    if "code" in orders:
        end_with_the_owner()
    failed = shut(orders)
    if "code" not in orders:
        sys.stdout.write(json.dumps(failed))
    elif failed:
        sys.exit(f"not run: {failed}")
    else:
        module = {"__name__": "__main__", "__builtins__": __builtins__}
        exec(compile(orders["code"], "<code>", "exec"), module)


if __name__ == "__main__":
    main()
