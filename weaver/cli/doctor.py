"""`weaver doctor`: what is installed, what would compute here, and what mends each fault."""

from __future__ import annotations

import platform
import re
import time
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING, Annotated

import typer

from weaver.cli import completion
from weaver.cli.models import ask_model
from weaver.cli.server_side import (
    WEAVER,
    ask_server,
    check_disk,
    compare,
    own_disk,
    room_text,
    told,
)
from weaver.config import Settings, load_settings
from weaver.errors import EngineError, WeaverError, requiring
from weaver.server.preflight import check_home

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGES = ("torch", "transformers", "safetensors", "fastapi", "uvicorn", "sqlalchemy")


def doctor(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="To load and sample.", autocompletion=completion.models),
    ] = "weaver-nano",
) -> None:
    """Look at the installation: packages, device, server; whether a model fits and answers."""
    from weaver import machine, wire
    from weaver.types import SamplingParams

    faults: list[str] = []
    _say_what_is_installed()
    with _checking("settings", faults):
        settings = load_settings()
        _say("protocol", str(wire.MAGIC[3]))
        _say("service", settings.base_url or "embedded")
        _say("api key", "set" if settings.api_key else "not set")
        with _checking("home", faults):  # a server's client keeps tokenizers there
            check_home(settings.home, least_bytes=0)
            _say("home", f"{settings.home}, which can be written to")
            free, room = own_disk(settings.home)
            _say("disk", room)
            check_disk(free, what="the home's disk")
        with _checking("sampler", faults):
            _check_sampler(settings)
        if settings.base_url is None:
            _check_embedded(settings, model, faults)
        else:  # which has a device and memory of its own
            _say("memory", room_text(machine.free_memory_bytes(), machine.memory_bytes()))
            with _checking("server", faults):
                server = ask_server(settings)
                for name, state in told(server):
                    _say(name, state)
                with _checking("both sides", faults):
                    both = compare(server, version=_version(WEAVER), protocol=wire.MAGIC[3])
                    _say("both sides", both)
                with _checking("its disk", faults):
                    check_disk(server.disk_free_bytes, what="the server's disk")
    if not faults:  # what does not fit might take the machine down
        with _checking(model, faults):
            began = time.perf_counter()
            params = SamplingParams(max_tokens=4, temperature=0)
            [answer] = ask_model(model, lambda client: client.sample("a", params)).sequences
            _say(model, f"answers: {answer.text!r} ({time.perf_counter() - began:.1f} s)")
    raise typer.Exit(1 if faults else 0)


def _say(name: str, state: str) -> None:
    print(f"{name:<14} {state}")


@contextmanager
def _checking(name: str, faults: list[str]) -> Iterator[None]:
    """Says and keeps the fault that is found inside; the command goes on behind it."""
    try:
        yield
    except (WeaverError, ImportError) as error:  # a package that is there, but broken
        _say(name, f"FAILED: {error}")
        faults.append(name)


def _say_what_is_installed() -> None:
    versions = {name: _version(name) for name in (WEAVER, *PACKAGES)}
    _say("weaver", versions.pop(WEAVER) or "not installed, run from its source")
    _say("python", f"{platform.python_version()} on {platform.platform()}")
    for name, found in versions.items():
        _say(name, found or "not installed")
    extras = _extras()
    _say("extras", ", ".join(name for name, whole in extras.items() if whole) or "none")
    if missing := ",".join(name for name, whole in extras.items() if not whole):
        _say("other extras", f'{missing}; if wanted: pip install "{WEAVER}[{missing}]"')


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _extras() -> dict[str, bool]:
    """Whether all that an extra of this package asks for is installed."""
    try:
        lines = requires(WEAVER) or []
    except PackageNotFoundError:
        return {}
    found: dict[str, bool] = {}
    for line in lines:  # such as: psycopg[binary]>=3.2; extra == 'server'
        extra = re.search(r"extra == ['\"]([\w-]+)", line)
        package = re.match(r"[\w.-]+", line)
        if extra and package and extra[1] not in ("all", "dev"):
            whole = _version(package[0]) is not None
            found[extra[1]] = found.get(extra[1], True) and whole
    return found


def _check_sampler(settings: Settings) -> None:
    """The environment of vLLM's workers: whether it is right, where it is there or asked for."""
    from weaver.engine.cluster.sampler_env import (
        check_environment,
        environment_of,
        python_of,
        wanted_here,
    )

    folder, wanted = environment_of(settings), wanted_here()
    if settings.sampler == "vllm" or python_of(folder).exists():
        check_environment(folder, wanted)
        versions = ", ".join(f"{name} {version}" for name, version in wanted.items())
        used = "" if settings.sampler == "vllm" else ", not used: WEAVER_SAMPLER is torch"
        _say("sampler", f"{versions} in {folder}{used}")
    else:
        _say("sampler", "torch; for vLLM: weaver cluster install-sampler")


def _check_embedded(settings: Settings, model: str, faults: list[str]) -> None:
    """What an engine in this process would have; the model is not loaded yet."""
    with _checking("device", faults):
        with requiring("the embedded engine", "engine"):
            from weaver.engine.torch import device as devices
            from weaver.engine.torch.attention_choice import by_rule, paging_by_rule
            from weaver.engine.torch.engine import TorchEngine
        engine = TorchEngine.of(settings)
        device, free, as_set = engine.device, engine.memory, " (as set)" * bool(settings.memory_gb)
        _say("device", f"{device.place} ({device.why})")
        _say("dtype", f"{device.dtype} ({device.dtype_why})")
        if settings.quantize != "none":
            _say("quantised", f"frozen layers of attention and MLP are kept in {settings.quantize}")
        _say("threads", devices.threads_text(settings.threads))
        _say("free memory", "not known" if free is None else devices.size_text(free) + as_set)
        with _checking(model, faults):
            facts = engine.facts(model)
            place, dtype = device.place, devices.DTYPES[device.dtype]
            attention = by_rule(facts, place=place, dtype=dtype)[0]
            paging = paging_by_rule(facts, place=place, dtype=dtype)[0]
            _say("attention", f"{attention.name}, {paging.name}")
            fits, said = devices.needs_of(
                facts, dtype=device.dtype, quantize=settings.quantize
            ).against(free)
            said = f"{facts.info.num_parameters:,} parameters; {said}"
            if not fits:
                raise EngineError(said)
            _say(model, said)
            _say("base models", engine.model_memory_text(model))
            _say("samples", engine.budget.text(facts))
            _say("training", engine.plan(model, "lora").describe())
            whole = devices.size_text(devices.full_training_bytes(facts))
            planned = engine.plan(model, "full_ft").describe()
            said = f"{whole} for weights, gradient and two moments; {planned}"
            if settings.quantize != "none":
                said = f"refused on layers kept in {settings.quantize}"
            _say("full tuning", said)
