"""Frozen layers of int8 and nf4: their kernels, models of them, and what is refused."""

from __future__ import annotations

import logging
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear

from tests.engine.conftest import (
    SIZES,
    datum,
    gradient_of,
    job,
    new_run,
    result_of,
    save_tiny,
    sequences,
)
from tests.engine.sampler_kit import finish, sample_job, save_tokenizer
from weaver.engine.torch import model_store
from weaver.engine.torch.catalog import Catalog
from weaver.engine.torch.engine import TorchEngine
from weaver.engine.torch.linear import FrozenLinear, Projection
from weaver.engine.torch.lora import Adapter, LoraPair
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.quantised import (
    INT8_MOST,
    KINDS,
    Int8,
    QuantisedLinear,
    check_kind,
    weights_bytes,
)
from weaver.engine.torch.routing import Routing
from weaver.engine.torch.sampler import TorchSampler
from weaver.engine.torch.trainer import TorchTrainer
from weaver.errors import ConfigError, MissingDependencyError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from weaver.types import Quantize

CPU = torch.device("cpu")


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> Quantize:
    name: Quantize = request.param
    if name == "nf4":
        pytest.importorskip("bitsandbytes")
    return name


def weight(out: int, inner: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, inner, generator=torch.Generator().manual_seed(seed)) * 0.05


def layer(out: int, inner: int, *, bias: bool, seed: int) -> torch.nn.Linear:
    plain = torch.nn.Linear(inner, out, bias=bias)
    plain.weight.data = weight(out, inner, seed=seed)
    return plain.requires_grad_(False)


def store_of(catalog: Catalog, kind: Quantize, dtype: torch.dtype = torch.float32) -> ModelStore:
    return ModelStore(catalog, device=CPU, dtype=dtype, threads=1, quantize=kind)


@pytest.mark.parametrize("rows", [1, 7, 600])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_the_dequantised_weight(
    kind: Quantize, rows: int, bias: bool
) -> None:
    """Of two layers in one projection, with rows of two adapters and of none."""
    sizes, inner = (48, 32), 64
    layers = [
        QuantisedLinear(layer(out, inner, bias=bias, seed=out), kind=kind, dtype=torch.float32)
        for out in sizes
    ]
    dense = [one.kernel.dense() for one in layers]
    routing = Routing()
    projection = Projection(layers, paths=["q", "k"])
    frozen = [FrozenLinear(projection, i, routing=routing) for i in range(2)]
    adapters = []
    for seed in (1, 2):
        pairs = {
            path: LoraPair(
                weight(3, inner, seed=seed).requires_grad_(),
                weight(out, 3, seed=seed + 9).requires_grad_(),
            )
            for path, out in zip("qk", sizes, strict=True)
        }
        adapters.append(Adapter(pairs, 0.5 + seed))
    lengths, whose = (rows, rows, 2), (adapters[0], None, adapters[1])
    x = weight(sum(lengths), inner, seed=3).requires_grad_()
    with routing.of(lengths, whose):
        ys = [one(x) for one in frozen]
    upstream = [weight(*y.shape, seed=4) for y in ys]
    tensors = [x, *(t for a in adapters for pair in a.pairs.values() for t in (pair.a, pair.b))]
    gradients = torch.autograd.grad(ys, tensors, upstream)
    expected = []
    for path, w, one in zip("qk", dense, layers, strict=True):
        pieces = []
        for part, owner in zip(x.split(lengths), whose, strict=True):
            pair = owner and owner.pairs[path]
            update = owner.scale * pair.b @ pair.a if owner and pair else 0
            pieces.append(linear(part, w + update, one.bias))
        expected.append(torch.cat(pieces))
    for y, right in zip(ys, expected, strict=True):
        torch.testing.assert_close(y, right, atol=1e-5, rtol=1e-5)
    for ours, right in zip(
        gradients, torch.autograd.grad(expected, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(ours, right, atol=1e-5, rtol=1e-4)


def test_layers_are_joined_to_the_bits_of_their_joined_weight(kind: Quantize) -> None:
    parts = [weight(out, 64, seed=out) for out in (5, 16, 3)]
    kernels = [KINDS[kind].of(part, dtype=torch.float32) for part in parts]
    whole = KINDS[kind].of(torch.cat(parts), dtype=torch.float32)
    assert torch.equal(KINDS[kind].joined(kernels).dense(), whole.dense())


def test_int8_rounds_to_half_a_step_and_keeps_zero() -> None:
    one = weight(16, 48)
    one[3] = 0
    step = one.abs().amax(1, keepdim=True) / INT8_MOST
    dense = Int8.of(one, dtype=torch.float32).dense()
    assert bool(((dense - one).abs() <= step * 0.5001).all())
    assert bool((dense[3] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_holds_the_bits_of_bitsandbytes_own_layer(dtype: torch.dtype) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    plain = layer(48, 80, bias=False, seed=1).to(dtype)
    theirs = bnb.nn.Linear4bit(80, 48, bias=False, quant_type="nf4", compute_dtype=dtype)
    theirs.weight = bnb.nn.Params4bit(
        plain.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    theirs = theirs.to("cpu")
    state = theirs.weight.quant_state
    right = bnb.functional.dequantize_4bit(theirs.weight.data, state)
    assert torch.equal(QuantisedLinear(plain, kind="nf4", dtype=dtype).kernel.dense(), right)


def test_a_model_is_the_one_of_its_dequantised_weights(
    kind: Quantize, architecture: str, catalog: Catalog, tmp_path: Path
) -> None:
    """Log-probabilities and gradients; PEFT agrees with those of plain weights elsewhere."""
    store = store_of(catalog, kind)
    source, folder = (p / architecture for p in (model_root(catalog, architecture), tmp_path))
    weights = load_file(source / "model.safetensors")
    changed = 0
    for path, module in store.base(architecture).module.named_modules():
        if isinstance(module, FrozenLinear) and not isinstance(
            module.projection.kernel, tuple(KINDS.values())
        ):
            continue
        if isinstance(module, FrozenLinear):
            assert not torch.equal(module.weight, weights[f"{path}.weight"])
            weights[f"{path}.weight"] = module.weight.contiguous()
            changed += 1
    assert changed >= 4
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())
    dense = ModelStore(
        Catalog({architecture: folder}, allow_paths=False),
        device=CPU,
        dtype=torch.float32,
        threads=1,
    )
    (ours, gradient), (right, right_gradient) = (passed(s, architecture) for s in (store, dense))
    for one, other in zip(ours, right, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=1e-4, rtol=0)
    for name, expected in right_gradient.items():
        error = (gradient[name] - expected).norm() / expected.norm()
        assert error < 1e-4, name


def model_root(catalog: Catalog, architecture: str) -> Path:
    return Path(catalog.facts(architecture).source).parent


def passed(store: ModelStore, architecture: str) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Log-probabilities of each datum, and the gradient, of an adapter of random values."""
    trainer = TorchTrainer(store)
    new_run(trainer, architecture=architecture)
    result = result_of(trainer, job("run", [datum(s) for s in sequences(7, 21, 12)]))
    logprobs = [output["logprobs"].tolist() for output in result.loss_fn_outputs]
    return logprobs, gradient_of(trainer, "run")


def test_a_model_is_bit_equal_twice(kind: Quantize, catalog: Catalog) -> None:
    (one, gradient), (two, again) = (passed(store_of(catalog, kind), "qwen3") for _ in range(2))
    assert one == two
    assert all(torch.equal(gradient[name], again[name]) for name in gradient)


@pytest.mark.parametrize("architecture", ["gemma3", "qwen3", "qwen3_moe"])
def test_the_sampler_has_the_trainers_logprobs(
    kind: Quantize, architecture: str, catalog: Catalog, model_folder: Callable[[str], Path]
) -> None:
    save_tokenizer(model_folder(architecture))
    store = store_of(catalog, kind)
    trainer, sampler = TorchTrainer(store), TorchSampler(store)
    new_run(trainer, architecture=architecture)
    sampler.publish("a", trainer.snapshot("run"))
    prompt = sequences(20, seed=2)[0]
    [drawn] = finish(sampler, [sample_job(prompt, weights_id="a", ignore_eos=True)])[
        "job"
    ].sequences
    tokens = [*prompt, *drawn.tokens]
    result = result_of(trainer, job("run", [datum(tokens)], backward=False))
    theirs = torch.tensor(result.loss_fn_outputs[0]["logprobs"].tolist())[len(prompt) - 1 :]
    torch.testing.assert_close(torch.tensor(list(drawn.logprobs)), theirs, atol=1e-4, rtol=0)


def test_files_of_bfloat16_are_quantised_as_they_are(kind: Quantize, tmp_path: Path) -> None:
    save_tiny(transformers.LlamaConfig(**SIZES), tmp_path / "a")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    loaded = store_of(Catalog({"half": tmp_path / "half"}, allow_paths=False), kind).base("half")
    assert loaded.dtype == torch.float32
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}
    path = "model.layers.0.mlp.up_proj"
    right = KINDS[kind].of(model.get_submodule(path).weight.detach(), dtype=torch.float32).dense()
    assert torch.equal(loaded.module.get_submodule(path).weight, right)


def test_one_layer_at_a_time_is_there_in_full(
    kind: Quantize, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def note(linear: torch.nn.Linear, **how: Any) -> QuantisedLinear:
        assert not any(earlier() for earlier in seen)
        seen.append(weakref.ref(linear.weight))
        return QuantisedLinear(linear, **how)

    monkeypatch.setattr(model_store, "QuantisedLinear", note)
    store_of(catalog, kind).base("llama")
    assert len(seen) == 2 * 7


def test_the_bytes_are_those_that_are_reckoned_with(kind: Quantize, catalog: Catalog) -> None:
    model = store_of(catalog, kind).base("llama")
    layers = [m for m in model.module.modules() if isinstance(m, FrozenLinear)]
    kernels = {id(m.projection): m.projection.kernel for m in layers}.values()
    tensors = [t for k in kernels for t in vars(k).values() if isinstance(t, torch.Tensor)]
    held = sum(t.nbytes for t in (*tensors, *model.module.parameters()))
    reckoned = weights_bytes(model.facts, dtype=torch.float32, quantize=kind)
    assert held == reckoned
    assert reckoned < weights_bytes(model.facts, dtype=torch.float32, quantize="none") / 2


def test_sizes_that_nf4_cannot_have_stay_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    save_tiny(transformers.LlamaConfig(**SIZES | {"intermediate_size": 49}), tmp_path / "odd")
    model = store_of(Catalog({"odd": tmp_path / "odd"}, allow_paths=False), "nf4").base("odd")
    named = dict(model.module.named_modules())
    kernels = {
        leaf: isinstance(named[f"model.layers.0.{leaf}"].projection.kernel, tuple(KINDS.values()))
        for leaf in ("self_attn.q_proj", "mlp.up_proj")
    }
    assert kernels == {"self_attn.q_proj": True, "mlp.up_proj": False}


def test_a_weight_that_is_not_finite_is_named(kind: Quantize, tmp_path: Path) -> None:
    save_tiny(transformers.LlamaConfig(**SIZES), tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        store_of(Catalog({"a": tmp_path / "a"}, allow_paths=False), kind).base("a")


def test_full_fine_tuning_is_refused_by_name(kind: Quantize, catalog: Catalog) -> None:
    trainer = TorchTrainer(store_of(catalog, kind))
    with pytest.raises(UnsupportedError, match=f"{kind}.*frozen.*WEAVER_QUANTIZE"):
        new_run(trainer, architecture="llama", training_mode="full_ft")


def test_unknown_kinds_and_missing_libraries_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'int4'.*int8 or nf4"):
        check_kind("int4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match=r"quantize=nf4.*\[quant\]"):
        TorchEngine(quantize="nf4")


def test_a_checkpoint_remembers_and_another_base_warns(
    kind: Quantize, catalog: Catalog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_of(catalog, kind)
    trainer = TorchTrainer(store)
    new_run(trainer, architecture="llama")
    trainer.save("run", include_optimizer=False)(tmp_path)
    TorchSampler(store).load("same", "llama", tmp_path)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    plain = store_of(catalog, "none")
    TorchSampler(plain).load("other", "llama", tmp_path)
    other = TorchTrainer(plain)
    new_run(other, architecture="llama")
    other.load("run", tmp_path, include_optimizer=False)
    said = [r.getMessage() for r in caplog.records if "quantize" in r.getMessage()]
    assert len(said) == 2 and f"quantize={kind}; here it is none" in said[0]


def test_a_whole_model_of_ones_own_is_sampled_as_it_is(kind: Quantize, catalog: Catalog) -> None:
    trainer = TorchTrainer(store_of(catalog, "none"))
    new_run(trainer, architecture="llama", training_mode="full_ft")
    published = store_of(catalog, kind).publish(trainer.snapshot("run"))
    assert published.own is not None and published.own.quantize == "none"


def test_the_model_tells_how_it_is_kept(kind: Quantize) -> None:
    engine = TorchEngine(quantize=kind)
    try:
        assert engine.get_model("weaver-nano").quantize == kind
        assert f"kept in {kind}" in engine.description
    finally:
        engine._forget()
