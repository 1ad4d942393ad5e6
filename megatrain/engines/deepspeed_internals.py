"""All that is needed of DeepSpeed's insides, in one place: where gradients, masters and moments live at each stage.

Design choices:
- One adapter for each optimizer class that DeepSpeed builds: none (ZeRO-0), DeepSpeedZeroOptimizer (1 and 2),
  BF16_Optimizer (1 in bf16), DeepSpeedZeroOptimizer_Stage3. They differ in layout only, so the engine is one.
- DeepSpeed's own norm, overflow check and clipping are off: each reads the device from the host in every step, and the
  norm has to be known before the decision to step. Ours is taken from `gradients` instead.
- What is replaced, or relied on beyond DeepSpeed's public interface, is listed with the hash of its source and checked
  at start: another DeepSpeed fails with one line instead of training wrong numbers.
- Replacements are made on one object, never on a class; but for a function that DeepSpeed calls by its module's name.
- In a pipeline what DeepSpeed infers from a backward following each forward is set right before every backward
  (Stage3Adapter).
"""

from __future__ import annotations

import ast
import hashlib
import inspect
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from torch import Tensor, nn

from megatrain.batch import Batch
from megatrain.engines.common import MOMENTS, Gradient
from megatrain.engines.ranges import MASTER, Shard, shards_of
from megatrain.errors import InputError
from megatrain.model.transformer import Transformer

RELIED_ON: dict[type | ModuleType, dict[str, str]] = {
    DeepSpeedEngine: {
        "_backward_epilogue": "c1e95076ff467634",
        "_backward_prologue": "53dd1ec5ccb642b7",
        "_take_model_step": "8e74072e9526ea9d",
        "backward": "0ce89b3804791dd0",
        "forward": "d2a9fb4de2557ef6",
        "is_gradient_accumulation_boundary": "26561c80b953b8fd",
    },
    BF16_Optimizer: {
        "_setup_for_real_optimizer": "a2a15d97ffcda4e1",
        "step": "37bf1ad8767b89f5",
        "update_lp_params": "fa2c03ea34b3f509",
        "zero_grad": "520934129fba82e0",
    },
    DeepSpeedZeroOptimizer: {
        "__init__": "e8f03d9571665f1e",
        "_wait_for_offload_copies": "e75e90e1ff1e944a",
        "independent_gradient_partition_epilogue": "57310018906ee18f",
        "scaled_global_norm": "3768d5bb1396347a",
        "step": "fac1cee02b7caa95",
        "update_lp_params": "b8262465caecb370",
        "update_offload_overflow_tracker": "c0b53f16c268a30b",
    },
    DeepSpeedZeroOptimizer_Stage3: {
        "_get_norm_groups": "2d02e95e07c664e1",
        "_reassign_or_swap_out_partitioned_parameters": "b08c58eecac8005d",
        "checkpoint_event_epilogue": "2f8932626c8c24f2",
        "checkpoint_event_prologue": "2bda25560a8428d5",
        "clear_backward_seen_flag": "7b3a683b222c7362",
        "independent_gradient_partition_epilogue": "25dbde8cb4d624c6",
        "partition_grads": "712082a072f09c33",
        "set_grad_positions": "710e28b75a2f8687",
        "step": "d7e1bfe84220c235",
    },
    DeepSpeedZeRoOffload: {
        "_register_deepspeed_module": "a6c23caa7646ad1d",
        "get_param_coordinator": "7136c7e74868e6ae",
        "setup_zero_stage3_hooks": "bd98c4e19cf91708",
    },
    PartitionedParameterCoordinator: {
        "__init__": "55cf8ceb2d9bf843",
        "_clear_trace_structures": "5f99db41d305edc7",
        "release_sub_module": "23a6211bd4bb6583",
        "reset_step": "9418523145760a94",
    },
    zero_utils: {
        "assert_ints_same_as_other_ranks": "50132da68b55103e",
    },
}
"""What is replaced or whose body is relied on, with the start of the SHA-256 of its source."""


@cache
def _functions(file: str) -> dict[tuple[str, str], str]:
    """The source of each function in a file by (class, its name), or ("", its name) where it is the module's.

    Read from the file, since decorators hide functions.
    """
    text = Path(file).read_text(encoding="utf-8")
    lines = text.splitlines()
    module = ast.parse(text)
    classes = {owner.name: owner.body for owner in module.body if isinstance(owner, ast.ClassDef)}
    return {
        (owner, function.name): "\n".join(lines[function.lineno - 1 : function.end_lineno])
        for owner, body in {"": module.body, **classes}.items()
        for function in body
        if isinstance(function, ast.FunctionDef)
    }


def source_hash(owner: type | ModuleType, function: str) -> str:
    """The start of the SHA-256 of a function's source; empty where the class or module has no such function."""
    source = _functions(inspect.getfile(owner)).get((owner.__name__ if isinstance(owner, type) else "", function))
    return hashlib.sha256(source.encode()).hexdigest()[:16] if source else ""


def check_version() -> None:
    """Raises InputError where the installed DeepSpeed isn't the one that this file was written for."""
    for owner, functions in RELIED_ON.items():
        for function, expected in functions.items():
            if source_hash(owner, function) != expected:
                raise InputError(
                    f"engine=deepspeed: {owner.__name__}.{function} of deepspeed {deepspeed.__version__} isn't the one "
                    "that this engine replaces or relies on; legal: deepspeed 0.19.8"
                )


def assert_ints_same_as_other_ranks(ints: Sequence[int]) -> None:
    """DeepSpeed's of the same name, in the data-parallel group, where ranks of other stages aren't waited for."""
    group = groups._get_data_parallel_group()
    where = get_accelerator().current_device_name()
    # The length comes first: others of another length could not be received.
    for own in ([len(ints)], list(ints)):
        theirs = torch.tensor(own, dtype=torch.int64, device=where)
        dist.broadcast(theirs, group=group, group_src=0)
        if theirs.tolist() != own:
            raise RuntimeError(
                f"the ranks of a data-parallel group use weights in other orders: {theirs.tolist()}, {own}"
            )


def replace_functions() -> None:
    """Puts this file's functions in place of DeepSpeed's, where those speak to all ranks."""
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = assert_ints_same_as_other_ranks


class Adapter:
    """What the engine needs to know about one optimizer that DeepSpeed built. ZeRO-0: the client's own."""

    replicated = True
    """Every data-parallel rank holds all gradients, so the norm needs no collective."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        # At ZeRO-0 DeepSpeed refuses float64 and reduces in fp32; `reduce` does it there.
        engine.enable_backward_allreduce = not self.replicated
        self.optimizer: Any = engine.optimizer
        self.module: Transformer = engine.module
        self.names: dict[nn.Parameter, str] = {p: name for name, p in engine.module.named_parameters()}

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The fused AdamW that steps the masters."""
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """See Chunk.forward."""
        y: Tensor = self.engine(x, batch.positions, batch.start, batch.end, batch.targets, batch.documents)
        return y

    def backward(self, loss: Tensor, last: bool) -> None:
        """See Chunk.backward. ZeRO-1 reduces at the last, ZeRO-2 and 3 at each."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def flats(self) -> list[Tensor]:
        """The tensors that the inner optimizer steps: masters, flattened as DeepSpeed keeps them."""
        return [parameter for group in self.inner.param_groups for parameter in group["params"]]

    def reduce(self) -> None:
        """Averages the gradients over the data-parallel ranks where DeepSpeed's backward hasn't."""
        group = self.engine.seq_data_parallel_group
        gradients = [gradient.tensor for gradient in self.gradients()]
        for work in [dist.all_reduce(gradient, group=group, async_op=True) for gradient in gradients]:
            work.wait()
        torch._foreach_div_(gradients, float(group.size()))

    def gradients(self) -> list[Gradient]:
        """The reduced gradients of the ranges that this rank steps, without ZeRO's padding."""
        return [Gradient(name, 0, p.grad.view(-1)) for p, name in self.names.items() if p.grad is not None]

    def pieces(self) -> Iterator[tuple[nn.Parameter, int, Tensor, int, int]]:
        """(parameter, first element, flat master, first and last element in it) of each range held here."""
        for parameter in self.names:
            yield parameter, 0, parameter, 0, parameter.numel()

    @property
    def copies(self) -> int:
        """How many data-parallel ranks hold the same."""
        return int(self.engine.seq_data_parallel_group.size()) if self.replicated else 1

    def shards(self) -> Iterator[Shard]:
        """Live views of everything this rank holds. The optimizer's state has to exist."""
        copy = self.engine.seq_data_parallel_group.rank() if self.replicated else 0
        for parameter, start, flat, first, last in self.pieces():
            if last > first:
                name, state = self.names[parameter], self.inner.state[flat]
                tensors = {MASTER: flat.detach().view(-1)[first:last]}
                tensors |= {moment: state[moment].view(-1)[first:last] for moment in MOMENTS}
                yield from shards_of(name, self.engine.module.parts[name], start, tensors, copy, self.copies)

    def weights(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, weights, their masters) where both are kept: 1-D views of the same elements, for each range held."""
        return iter(())

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, weights) of what every data-parallel rank holds whole between steps."""
        return ((name, parameter.detach()) for parameter, name in self.names.items())

    def after_forwards(self) -> None:
        """Called after forward passes that no backward followed. Collective."""

    def before_load(self) -> None:
        """Called before masters are written."""

    def after_load(self) -> None:
        """Called when masters were written: makes the weights follow them. Collective."""


class ShardedAdapter(Adapter):
    """What the ZeRO optimizers have in common: they wrap the client's, and their hooks reduce in backward."""

    replicated = False

    @property
    def inner(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.optimizer.optimizer
        return optimizer

    def reduce(self) -> None:
        """DeepSpeed's hooks have done it."""

    def weights(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for parameter, start, flat, first, last in self.pieces():
            if last > first:
                for weights in self.weights_of(parameter, start, start + last - first):
                    yield self.names[parameter], weights, flat.detach()[first:last]

    def weights_of(self, parameter: nn.Parameter, start: int, stop: int) -> list[Tensor]:
        """All that the next forward may take elements [start, stop) of a parameter from, which this rank steps."""
        return [parameter.detach().view(-1)[start:stop]]

    def _gradients_in(self, of_flats: Sequence[Sequence[Tensor]]) -> list[Gradient]:
        """Views of the gradients of the flat masters: of each, tensors that one after the other are laid out as it is.

        Where such a tensor ends within a parameter, so does a Gradient.
        """
        pieces: dict[int, list[tuple[nn.Parameter, int, int, int]]] = {id(flat): [] for flat in self.flats()}
        for parameter, start, flat, first, last in self.pieces():
            pieces[id(flat)].append((parameter, start, first, last))
        found = []
        for tensors, held in zip(of_flats, pieces.values(), strict=True):
            begins = [0, *accumulate(tensor.numel() for tensor in tensors)]
            for parameter, start, first, last in held:
                at = bisect_right(begins, first) - 1
                while at < len(tensors) and begins[at] < last and first < last:
                    low, high = max(first, begins[at]), min(last, begins[at + 1])
                    part = tensors[at].view(-1)[low - begins[at] : high - begins[at]]
                    found.append(Gradient(self.names[parameter], start + low - first, part))
                    at += 1
        return found


class ZeroAdapter(ShardedAdapter):
    """ZeRO-1 and 2: parameters laid end to end in a flat tensor for each group, cut into equal parts."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        # Under offload DeepSpeed can't be told to leave these out: they read the device for every parameter.
        self.optimizer.scaled_global_norm = lambda: 0.0
        self.optimizer.update_offload_overflow_tracker = lambda _: None

    def flats(self) -> list[Tensor]:
        flats: list[Tensor] = list(self.optimizer.single_partition_of_fp32_groups)
        return flats

    def reduce(self) -> None:
        """Waits for offloaded gradients, which are copied to the host without blocking."""
        self.optimizer._wait_for_offload_copies()

    def gradients(self) -> list[Gradient]:
        optimizer = self.optimizer
        if optimizer.cpu_offload:
            # Without the padding: it is never written again, and scaled by a NaN once it would be one for good.
            return self._gradients_in([[flat.grad] for flat in self.flats() if flat.grad is not None])
        # Its keys are in the order in which backward reached the groups.
        return self._gradients_in([optimizer.averaged_gradients[i] for i in range(len(self.flats()))])

    def pieces(self) -> Iterator[tuple[nn.Parameter, int, Tensor, int, int]]:
        # Not p._hp_mapping: with round_robin_gradients it points at the wrong elements of most parameters.
        optimizer = self.optimizer
        for i, (flat, parameters) in enumerate(zip(self.flats(), optimizer.round_robin_bit16_groups, strict=True)):
            begin = flat.numel() * optimizer.real_dp_process_group[i].rank()
            for parameter, offset in zip(parameters, optimizer.round_robin_bit16_offsets[i], strict=True):
                first, last = max(offset, begin), min(offset + parameter.numel(), begin + flat.numel())
                yield parameter, first - offset, flat, first - begin, last - begin

    def after_load(self) -> None:
        self.optimizer.update_lp_params()


class Bf16Adapter(ShardedAdapter):
    """ZeRO-1 in bf16: full fp32 gradients on every rank, masters cut like ZeroAdapter's."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.optimizer.step = self.step

    def step(self) -> None:
        """BF16_Optimizer.step without its norm and overflow check, which read the device from the host.

        Gradients are cleared by DeepSpeed's engine, which calls zero_grad next.
        """
        for flat, gradient in zip(self.flats(), self.optimizer.fp32_groups_gradient_flat_partition, strict=True):
            flat.grad = gradient
        self.inner.step()
        self.optimizer.update_lp_params()

    def flats(self) -> list[Tensor]:
        flats: list[Tensor] = list(self.optimizer.fp32_groups_flat_partition)
        return flats

    def gradients(self) -> list[Gradient]:
        return self._gradients_in([[flat] for flat in self.optimizer.fp32_groups_gradient_flat_partition])

    def pieces(self) -> Iterator[tuple[nn.Parameter, int, Tensor, int, int]]:
        for i, (flat, parameters) in enumerate(zip(self.flats(), self.optimizer.bf16_groups, strict=True)):
            begin = flat.numel() * self.optimizer.real_dp_process_group[i].rank()
            offset = 0
            for parameter in parameters:
                first, last = max(offset, begin), min(offset + parameter.numel(), begin + flat.numel())
                yield parameter, first - offset, flat, first - begin, last - begin
                offset += parameter.numel()

    def after_load(self) -> None:
        self.optimizer.update_lp_params()


@dataclass
class Coordinators:
    """Who gathers weights at ZeRO-3. Each records the order of modules once and gathers ahead by it from then on.

    DeepSpeed has one, which expects a backward after every forward. In a pipeline forwards and backwards come in other
    orders: it would record for ever, and compare what it recorded with the other ranks, reading the device each time.
    """

    forward: Any
    backward: Any

    @classmethod
    def of(cls, offload: Any, apart: bool) -> Coordinators:
        """The one that DeepSpeed made; `apart`: another for the backward."""
        made = offload.param_coordinator
        if not apart:
            return cls(made, made)
        # Both share what is being gathered, and the limit to it.
        backward = copy(made)
        backward._clear_trace_structures()
        return cls(made, backward)


class Stage3Adapter(ShardedAdapter):
    """ZeRO-3: each parameter cut into equal parts on its own, the parts of a rank laid end to end."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        # A norm on the CPU that is valid: step() then checks and combines nothing that lies on the device.
        self.optimizer._get_norm_groups = lambda: [0.0]
        self.offload = self.optimizer.parameter_offload
        self.coordinators = Coordinators.of(self.offload, apart=self.module.stage.count > 1)
        self.inputs: dict[nn.Module, int] = {}

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        self.offload.param_coordinator = self.coordinators.forward
        y = super().forward(x, batch)
        modules: list[Any] = list(self.module.modules())
        self.inputs = {m: m.ds_grads_remaining for m in modules if hasattr(m, "ds_grads_remaining")}
        return y

    def backward(self, loss: Tensor, last: bool) -> None:
        # DeepSpeed notes at each forward that gradients so far are to be added to. Where a pipeline's first backward is
        # followed by another, they would be overwritten.
        self.optimizer.clear_backward_seen_flag()
        # By this count it knows when a module's backward is over, to free its weights. It is set by the forward and
        # used up by the backward: wrong where two forwards come before.
        for module, count in self.inputs.items():
            module.ds_grads_remaining = count  # type: ignore[assignment]
        if self.coordinators.backward is not self.coordinators.forward:
            self.offload.param_coordinator = self.coordinators.backward
            self.coordinators.backward.reset_step()
        super().backward(loss, last)

    def flats(self) -> list[Tensor]:
        flats: list[Tensor] = list(self.optimizer.fp32_partitioned_groups_flat)
        return flats

    def gradients(self) -> list[Gradient]:
        optimizer = self.optimizer
        if optimizer.offload_optimizer:
            return self._gradients_in([[flat.grad] for flat in self.flats() if flat.grad is not None])
        found = []
        for group, parameters in enumerate(optimizer.fp16_groups):
            for i, parameter in enumerate(parameters):
                gradient = optimizer.averaged_gradients[group][i].view(-1)
                begin = gradient.numel() * optimizer._get_param_partition_rank(parameter)
                real = self._real(parameter, gradient.numel())
                found.append(Gradient(self.names[parameter], begin, gradient[:real]))
        return found

    def _real(self, parameter: nn.Parameter, size: int) -> int:
        """How many of the `size` elements of this rank's part are the parameter's; the rest is uninitialised."""
        begin: int = size * self.optimizer._get_param_partition_rank(parameter)
        whole: int = parameter.ds_numel  # type: ignore[attr-defined]
        return max(0, min(size, whole - begin))

    def pieces(self) -> Iterator[tuple[nn.Parameter, int, Tensor, int, int]]:
        optimizer = self.optimizer
        for group, parameters in enumerate(optimizer.fp16_groups):
            flat = optimizer.fp32_partitioned_groups_flat[group]
            for parameter in parameters:
                _, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                begin = size * optimizer._get_param_partition_rank(parameter)
                yield parameter, begin, flat, offset, offset + self._real(parameter, size)

    def weights_of(self, parameter: nn.Parameter, start: int, stop: int) -> list[Tensor]:
        own: Tensor = parameter.ds_tensor.detach()[: stop - start]  # type: ignore[attr-defined]
        if parameter.ds_status is not ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
            return [own]
        # A small one, which stays whole: no forward gathers it anew.
        return [own, *super().weights_of(parameter, start, stop)]

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        # The small ones.
        for parameter, name in self.names.items():
            if parameter.ds_persist and parameter.ds_status is ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
                yield name, parameter.detach()

    def after_forwards(self) -> None:
        # Weights that were fetched ahead for the backward are still on their way; nothing else may touch them.
        self.optimizer.checkpoint_event_prologue()
        self.optimizer.checkpoint_event_epilogue()

    def before_load(self) -> None:
        self.optimizer.checkpoint_event_prologue()

    def after_load(self) -> None:
        for group in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        # Gathers the small weights that stay whole on every rank.
        self.optimizer.checkpoint_event_epilogue()


def adapt(engine: Any) -> Adapter:
    """The adapter for the optimizer that DeepSpeed built for `engine`."""
    kinds = {
        torch.optim.AdamW: Adapter,
        BF16_Optimizer: Bf16Adapter,
        DeepSpeedZeroOptimizer: ZeroAdapter,
        DeepSpeedZeroOptimizer_Stage3: Stage3Adapter,
    }
    return kinds[type(engine.optimizer)](engine)
