"""Which device and dtype the settings mean, where torch has CUDA or says that it has."""

from __future__ import annotations

import pytest
import torch

from weaver.engine.torch.device import choose_device, free_bytes
from weaver.errors import ConfigError


def pretend(monkeypatch: pytest.MonkeyPatch, *, devices: int, refusal: str = "") -> None:
    """Lets torch answer as with so many CUDA devices of 8 GB, of which 5 are free."""

    def mem_get_info(place: torch.device) -> tuple[int, int]:
        if refusal:
            raise RuntimeError(refusal)
        return 5 * 10**9, 8 * 10**9

    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * 10**9)


@pytest.mark.parametrize(
    ("device", "dtype", "place", "chosen"),
    [
        ("auto", "auto", "cuda:0", "bfloat16"),
        ("auto", "float32", "cuda:0", "float32"),
        ("cuda", "auto", "cuda:0", "bfloat16"),
        ("cuda:1", "auto", "cuda:1", "bfloat16"),
        ("cpu", "auto", "cpu", "float32"),
        ("cpu", "bfloat16", "cpu", "bfloat16"),
    ],
)
def test_with_cuda(
    device: str, dtype: str, place: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, devices=2)
    made = choose_device(device, dtype)
    assert (str(made.place), made.dtype) == (place, chosen)
    assert made.why.startswith("auto: the first CUDA" if device == "auto" else "as set")
    assert made.dtype_why.startswith("auto: on" if dtype == "auto" else "as set")
    if made.place.type == "cuda":
        assert free_bytes(made.place) == 6 * 10**9


def test_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, devices=0)
    for version, why in ((None, "built without CUDA"), ("12.8", "finds no CUDA device")):
        monkeypatch.setattr(torch.version, "cuda", version)
        made = choose_device("auto", "auto")
        assert (made.place, made.dtype) == (torch.device("cpu"), "float32")
        assert made.why.startswith("auto: ") and why in made.why


def test_mps_is_accepted_and_said_to_be_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    made = choose_device("mps", "auto")
    assert (made.place.type, made.dtype) == ("mps", "float32") and "untested" in made.why
    assert free_bytes(made.place) is None


@pytest.mark.parametrize(
    ("device", "cuda_devices", "message"),
    [
        ("gpu", 0, "is 'gpu'.*auto, cpu, cuda, cuda:N"),
        ("cuda:", 2, "is 'cuda:'"),
        ("cuda:-1", 2, "is 'cuda:-1'"),
        ("cuda:x", 2, "is 'cuda:x'"),
        ("mps", 0, "is 'mps', which torch does not find.*Apple"),
        ("cuda", 0, "is 'cuda', but .*CUDA.*; or use auto or cpu"),
        ("cuda:1", 0, "is 'cuda:1', but .*CUDA.*; or use auto or cpu"),
        ("cuda:2", 2, "is 'cuda:2', which is not there.*cuda:0, cuda:1; CUDA_VISIBLE_DEVICES"),
        ("cuda:999", 1, "is 'cuda:999', which is not there.*There is cuda:0;"),
    ],
)
def test_a_device_that_cannot_be_used_says_why(
    device: str, cuda_devices: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, devices=cuda_devices)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message) as raised:
        choose_device(device, "auto")
    assert raised.value.field == "device" and raised.value.hint


def test_a_device_that_the_driver_refuses_is_not_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, devices=1, refusal="CUDA error: busy\nmore of it")
    with pytest.raises(
        ConfigError, match=r"cuda:0 cannot be used: CUDA error: busy.*WEAVER_DEVICE"
    ):
        choose_device("auto", "auto")


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(ConfigError, match=r"dtype: is 'float16'.*auto, float32 or bfloat16"):
        choose_device("cpu", "float16")
