"""The adapter for flash-attn: that its calls mean our masks, and that the released packages take them."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatrain import device
from megatrain.batch import document_starts, mask_end
from megatrain.config import AttentionKernel
from megatrain.kernels.attention import flash, reference
from megatrain.kernels.attention.flash import FLASH_2, FLASH_4, Library
from megatrain.model.choice import TORCH
from megatrain.model.transformer import Transformer
from tests import fake_gpu, samples
from tests.kernels.attention.flash_in_torch import Module

Modules = dict[Library, Module]
POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Modules:
    """What stands in for the two libraries, which can't run here."""
    found = {library: Module(library.module, returns_lse=library is FLASH_4) for library in flash.LIBRARIES}
    for module in found.values():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """install(package, version): what importlib.metadata finds of an installed package. None is at first."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    def write(package: str, version: str) -> None:
        folder = tmp_path / f"{package.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")

    return write


@st.composite
def starts(draw: st.DrawFn) -> Tensor:
    """int32[B, S]: documents, one after the other, the last of which may be padding."""
    samples, length = draw(st.integers(1, 3)), draw(st.integers(1, 16))
    rows = [sorted({0, *draw(st.sets(st.integers(0, length - 1)))}) for _ in range(samples)]
    return torch.tensor([[max(d for d in row if d <= m) for m in range(length)] for row in rows], dtype=torch.int32)


def packed(samples: int, length: int, heads: tuple[int, int], head_dim: int, seed: int) -> Tensor:
    """A projection float64[B, S, H, G + 2, D]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, length, heads[0], heads[1] + 2, head_dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


def split(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def expected(qkv: Tensor, start: Tensor, window: int | None) -> Tensor:
    """By the reference, [B, S, H, G, D]."""
    q, k, v = split(qkv)
    if window is not None:
        start = torch.maximum(start, mask_end(start, None) - window)
    q, k, v = (x.transpose(1, 2) for x in (q.flatten(2, 3), k, v))
    output, _ = reference.attention(q, k, v, start, mask_end(start, None))
    return output.transpose(1, 2).reshape(qkv[..., :-2, :].shape)


@pytest.mark.parametrize("library", flash.LIBRARIES, ids=lambda library: library.package)
@given(
    start=starts(),
    window=st.none() | st.integers(1, 20),
    heads=st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]),
    deterministic=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_its_calls_mean_the_mask(
    modules: Modules,
    library: Library,
    start: Tensor,
    window: int | None,
    heads: tuple[int, int],
    deterministic: bool,
    seed: int,
) -> None:
    documents = document_starts(start)
    mask = flash.prepare(library, documents, start.shape[1], window)
    qkv = packed(len(start), start.shape[1], heads, 8, seed)
    with deterministic_algorithms(deterministic):
        output = flash.attention(*split(qkv), mask)
    wanted = expected(qkv, start, window)
    torch.testing.assert_close(output, wanted, rtol=0, atol=1e-12)
    weights = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    (gradient,), (of_wanted,) = (torch.autograd.grad(o, qkv, weights) for o in (output, wanted))
    torch.testing.assert_close(gradient, of_wanted, rtol=0, atol=1e-12)
    function, tensors, arguments = modules[library].calls[-1]
    assert function == ("flash_attn_func" if documents.shape[1] == 1 else "flash_attn_varlen_func")
    assert arguments["deterministic"] is deterministic
    copied = [x.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr() for x in tensors]
    assert copied == [min(heads) > 1, False, False]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("library", flash.LIBRARIES, ids=lambda library: library.package)
def test_a_model_computes_the_same_with_it(modules: Modules, library: Library, window: int | None) -> None:
    model = Transformer(replace(samples.MODEL, sliding_window=window)).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    batch = samples.batch(3, sequence_length=10, seed=0)
    arguments = (batch.input_ids, batch.positions, batch.start, batch.end, batch.targets)
    wanted = model(*arguments)
    model.kernels, model.flash_attention = replace(TORCH, attention=AttentionKernel.flash), library
    losses = model(*arguments, document_starts(batch.start))
    assert len(modules[library].calls) == model.config.num_layers
    torch.testing.assert_close(losses, wanted, rtol=0, atol=1e-12)
    weights = list(model.parameters())
    for found, expected in zip(*(torch.autograd.grad(x.sum(), weights) for x in (losses, wanted)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_boundaries_of_some_documents() -> None:
    start = torch.tensor([[0, 0, 2, 2, 4, 4], [0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    documents = document_starts(start)
    assert documents.tolist() == [[0, 2, 4, 6], [0, 6, 6, 6]]
    mask = flash.prepare(FLASH_2, documents, 6)
    assert mask.boundaries is not None
    assert mask.boundaries.dtype == torch.int32
    assert mask.boundaries.tolist() == [0, 2, 4, 6, 6, 12, 12, 12, 12]
    one = flash.prepare(FLASH_2, documents[1:, :1], 6, window=6)
    assert (one.boundaries, one.window) == (None, None)
    with pytest.raises(ValueError, match=r"flash-attn needs Batch\.documents"):
        flash.prepare(FLASH_2, None, 6)


def test_what_is_installed_and_where_it_is_used(install: Callable[[str, str], None]) -> None:
    architectures = ("sm_75", "sm_80", "sm_90", "sm_100")
    assert (flash.version(), flash.for_architecture("sm_90")) == (None, None)
    install("flash-attn", "2.8.3")
    assert flash.version() == "flash-attn 2.8.3"
    assert [flash.for_architecture(arch) for arch in architectures] == [None, FLASH_2, FLASH_2, None]
    install("flash-attn-4", "4.0.0b36")
    assert flash.version() == "flash-attn-4 4.0.0b36, flash-attn 2.8.3"
    assert [flash.for_architecture(arch) for arch in architectures] == [None, FLASH_2, FLASH_4, FLASH_4]


@pytest.mark.usefixtures("modules")
def test_what_is_out_of_reach(install: Callable[[str, str], None]) -> None:
    bf16 = torch.bfloat16
    assert flash.out_of_reach("sm_90", bf16, 128) == (
        "on sm_90 flash-attn is taken from flash-attn-4 4.* or flash-attn 2.8.*; installed: none"
    )
    install("flash-attn", "2.7.4.post1")
    assert flash.out_of_reach("sm_80", bf16, 128) == (
        "on sm_80 flash-attn is taken from flash-attn 2.8.*; installed: flash-attn 2.7.4.post1"
    )
    install("flash-attn-4", "4.0.0b36")
    assert [flash.out_of_reach("sm_90", bf16, head_dim) for head_dim in (8, 80, 128, 192, 256)] == [None] * 5
    assert [flash.out_of_reach("sm_100", bf16, head_dim) for head_dim in (8, 80, 128)] == [None] * 3
    for architecture, head_dim, most in (("sm_90", 12, 256), ("sm_90", 264, 256), ("sm_100", 192, 128)):
        assert flash.out_of_reach(architecture, bf16, head_dim) == (
            f"model.head_dim={head_dim}: on {architecture} flash-attn-4 takes multiples of 8 up to {most}"
        )
    assert flash.out_of_reach(None, bf16, 128) == "flash-attn needs a GPU"
    assert flash.out_of_reach("sm_90", torch.float32, 128) == "precision: flash-attn computes in bf16, not in float32"
    assert flash.out_of_reach("gfx942", bf16, 128) == (
        "on gfx942 flash-attn is taken from no package; installed: flash-attn-4 4.0.0b36, flash-attn 2.7.4.post1"
    )


def test_one_that_was_built_for_another_torch(
    install: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    install("flash-attn", "2.8.3")
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN2at\\nmore')")
    assert flash.out_of_reach("sm_90", torch.bfloat16, 128) == (
        "flash-attn 2.8.3 can't be imported: undefined symbol: _ZN2at"
    )


def signatures(source: str) -> dict[str, inspect.Signature]:
    """Of a module's functions without * and **, which isn't run: names, their order, and which have a default."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and not (node.args.vararg or node.args.kwonlyargs or node.args.kwarg):
            names = [argument.arg for argument in node.args.args]
            needed = len(names) - len(node.args.defaults)
            parameters = [inspect.Parameter(name, POSITIONAL) for name in names[:needed]]
            parameters += [inspect.Parameter(name, POSITIONAL, default=None) for name in names[needed:]]
            found[node.name] = inspect.Signature(parameters)
    return found


def download(requirement: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Path:
    """A package as it was released, from the package index."""
    monkeypatch.setenv("FLASH_ATTENTION_SKIP_CUDA_BUILD", "TRUE")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    ended = subprocess.run(
        [*pip, *options, "--dest", folder, requirement], capture_output=True, text=True, timeout=100, check=False
    )
    if ended.returncode:
        pytest.skip(f"{requirement} can't be had: {ended.stderr.strip().splitlines()[-1]}")
    (path,) = folder.iterdir()
    return path


def source_of(library: Library, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The module of the released package that has the two functions."""
    if library is FLASH_4:
        wheel = download("flash-attn-4==4.0.0b36", folder, monkeypatch)
        return zipfile.ZipFile(wheel).read("flash_attn/cute/interface.py").decode()
    archive = download("flash-attn==2.8.3", folder, monkeypatch, "--no-binary", ":all:", "--no-build-isolation")
    with tarfile.open(archive) as files:
        member = files.extractfile("flash_attn-2.8.3/flash_attn/flash_attn_interface.py")
        assert member is not None
        return member.read().decode()


@pytest.mark.parametrize("library", flash.LIBRARIES, ids=lambda library: library.package)
def test_the_released_functions_take_its_calls(
    modules: Modules, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for begin in (0, 3):
        start = torch.where(torch.arange(8) < begin, 0, begin).int()[None]
        for window in (None, 3):
            mask = flash.prepare(library, document_starts(start), 8, window)
            flash.attention(*split(packed(1, 8, (2, 2), 8, seed=0)), mask)
    released = signatures(source_of(library, tmp_path, monkeypatch))
    calls = modules[library].calls
    assert [name for name, _, _ in calls] == ["flash_attn_func"] * 2 + ["flash_attn_varlen_func"] * 2
    for name, tensors, arguments in calls:
        assert list(released[name].bind(*tensors, **arguments).arguments)[:3] == ["q", "k", "v"]


def test_a_call_that_does_not_fit_is_seen() -> None:
    signature = signatures("def f(q, k, v, causal=False): pass")["f"]
    signature.bind(1, 2, 3, causal=True)
    for arguments in ({"window": 1}, {"q": 1}):
        with pytest.raises(TypeError):
            signature.bind(1, 2, 3, **arguments)
    with pytest.raises(TypeError):
        signature.bind(1, 2)


def on_the_fake_gpu() -> list[str]:
    """What made the host wait for the device, in a forward and a backward."""
    fake_gpu.start(1, 0)
    module = Module("flash_attn", returns_lse=False)
    sys.modules["flash_attn"] = module
    module.flash_attn_varlen_func = lambda *qkv, **_: qkv[0]  # type: ignore[method-assign]
    with fake_gpu.tensors() as (_, host):
        documents = torch.zeros(2, 4, dtype=torch.int32, device=device.device())
        qkv = torch.zeros(2, 16, 2, 4, 8, device=device.device(), requires_grad=True)
        flash.attention(*split(qkv), flash.prepare(FLASH_2, documents, 16)).sum().backward()  # type: ignore[no-untyped-call]
        return host.waits


def test_the_host_never_waits_for_the_device() -> None:
    assert fake_gpu.run(on_the_fake_gpu) == []


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads", [(4, 1), (2, 4)])
@pytest.mark.parametrize("documents", [1, 5])
def test_the_library_itself(documents: int, heads: tuple[int, int], window: int | None) -> None:
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    library = flash.for_architecture(architecture)
    if library is None:
        pytest.skip(str(flash.out_of_reach(architecture, torch.bfloat16, 128)))
    start = torch.arange(500) // (500 // documents) * (500 // documents)
    starts = start.int().expand(2, -1)
    mask = flash.prepare(library, document_starts(starts).to(device.device()), 500, window)
    on_device = packed(2, 500, heads, 128, seed=0).detach().to(device.device(), torch.bfloat16).requires_grad_()
    qkv = on_device.detach().cpu().double().requires_grad_()
    wanted = expected(qkv, starts, window)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    (of_wanted,) = torch.autograd.grad(wanted, qkv, weights.double())
    gradients: list[Tensor] = []
    for _ in range(2):
        with deterministic_algorithms(True):
            output = flash.attention(*split(on_device), mask)
        gradients += torch.autograd.grad(output, on_device, weights.to(device.device()))
    assert torch.equal(*gradients)
    assert relative(output, wanted) < 1e-2
    assert relative(gradients[0], of_wanted) < 1e-2


def relative(found: Tensor, wanted: Tensor) -> float:
    """The relative L2 error."""
    return float((found.detach().cpu().double() - wanted).norm() / wanted.norm())
