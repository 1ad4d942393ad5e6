"""Micro-batches through the model chunks of this rank: forward, backward, and the sends between pipeline stages.

Design choices:
- The order of a step is torch.distributed.pipelining's (1F1B, interleaved 1F1B). What it makes of stages (inferred
  shapes, votes between ranks, split batches, a receive buffer for every micro-batch) is replaced: a micro-batch is
  known on all ranks of its pipeline, so its shape is too. Buffers live as long as a micro-batch is in flight.
- One stage is the same code: each micro-batch's forward is followed by its backward.
- Every backward starts at a scalar, as DeepSpeed wants it. Hidden states that were sent become one whose gradient is
  what comes back for them; they themselves are freed, since only their place in the graph is needed.
- Losses are summed where they arise, as they come.

B is the number of samples, S the sequence length, tp the tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.pipelining.stage import _PipelineStageBase

from megatrain.batch import Batch
from megatrain.engines.common import Sums
from megatrain.model.transformer import Transformer
from megatrain.parallel.mesh import Mesh


class Chunk(Protocol):
    """A chunk of the model as an engine runs it."""

    module: Transformer

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """x: input_ids, or hidden states. The last chunk returns token losses [B, S], the others hidden states."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """From a scalar that came of a forward. last: no other backward follows in this step."""
        ...


class _Sent(torch.autograd.Function):
    """Of hidden states a scalar, without value, whose backward is theirs, from the gradient that comes back."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, returned: list[Tensor]) -> Tensor:
        ctx.returned = returned
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.returned.pop(), None


class _Stage(_PipelineStageBase):
    """A chunk as torch's schedules drive it, by the number of a micro-batch."""

    def __init__(self, chunk: Chunk, mesh: Mesh, dtype: torch.dtype) -> None:
        place = chunk.module.stage
        # The chunk's module is hidden from torch, which would decide when FSDP gathers, frees and reduces; and the
        # device, whose random state it would save.
        super().__init__(nn.Module(), place.index, place.count, torch.device("cpu"), mesh.pipeline_group)
        self.chunk = chunk
        self.dtype = dtype
        self.hidden_size = chunk.module.config.hidden_size
        self.share = mesh.tensor.size
        self.args_recv_info = {0: ()}
        # Of a micro-batch in flight, by number: what came in, where its backward starts, and what is sent next.
        self.inputs: dict[int, Tensor] = {}
        self.losses: dict[int, Tensor] = {}
        self.hidden: dict[int, Tensor] = {}
        self.gradients: dict[int, list[Tensor]] = {}

    def start(self, micro_batches: Sequence[Batch], scale: Tensor, sums: Sums) -> None:
        """Sets what a step is about. scale: of the sum of token losses."""
        self.micro_batches, self.scale, self.sums = micro_batches, scale, sums

    def send(self, tensor: Tensor, stage: int) -> dist.P2POp:
        """To the rank of another stage."""
        return dist.P2POp(dist.isend, tensor, group=self.group, group_peer=stage % self.group_size)

    def receive(self, batch: Batch, stage: int) -> tuple[Tensor, dist.P2POp]:
        """From the rank of another stage: the hidden states of a micro-batch, or their gradient."""
        samples, length = batch.input_ids.shape
        buffer = batch.input_ids.new_empty(samples, length // self.share, self.hidden_size, dtype=self.dtype)
        return buffer, dist.P2POp(dist.irecv, buffer, group=self.group, group_peer=stage % self.group_size)

    def forward_one_chunk(self, fwd_chunk_id: int, *_: Any, **__: Any) -> Tensor:
        """Computes the micro-batch; the schedule is given the loss's value."""
        batch = self.micro_batches[fwd_chunk_id]
        x = batch.input_ids if self.is_first else self.inputs[fwd_chunk_id].requires_grad_()
        y = self.chunk.forward(x, batch)
        if self.is_last:
            self.sums.add(batch, y.detach())
            loss = y.sum() * self.scale
        else:
            self.hidden[fwd_chunk_id], self.gradients[fwd_chunk_id] = y.detach(), []
            loss = _Sent.apply(y, self.gradients[fwd_chunk_id])  # type: ignore[no-untyped-call]
        self.losses[fwd_chunk_id] = loss
        return loss.detach()

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Any = None,  # noqa: ARG002
        full_backward: bool = True,  # noqa: ARG002
        last_backward: bool = False,
    ) -> None:
        """The backward of the same, to the weights and to what came in."""
        self.chunk.backward(self.losses.pop(bwd_chunk_id), last_backward)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """What has to come before the forward."""
        if self.is_first:
            return []
        self.inputs[fwd_chunk_id], operation = self.receive(self.micro_batches[fwd_chunk_id], self.stage_index - 1)
        return [operation]

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """What the next stage waits for."""
        return [] if self.is_last else [self.send(self.hidden.pop(fwd_chunk_id), self.stage_index + 1)]

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """What has to come before the backward."""
        if self.is_last:
            return []
        gradient, operation = self.receive(self.micro_batches[bwd_chunk_id], self.stage_index + 1)
        self.gradients.pop(bwd_chunk_id).append(gradient)
        return [operation]

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """What the stage before waits for."""
        if self.is_first:
            return []
        gradient = self.inputs.pop(bwd_chunk_id).grad
        assert gradient is not None
        return [self.send(gradient, self.stage_index - 1)]

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return []

    def _prepare_forward_infra(self, *_: Any, **__: Any) -> None:
        """Torch makes its buffers here."""

    def _prepare_backward_infra(self, *_: Any, **__: Any) -> None:
        """The same."""

    def _create_grad_recv_info(self, _: Any) -> tuple[()]:
        return ()


class Pipeline:
    """This rank's stages of the pipeline."""

    def __init__(self, chunks: Sequence[Chunk], mesh: Mesh, dtype: torch.dtype) -> None:
        """chunks: ascending. dtype: of hidden states."""
        self.ranks = mesh.pipeline_size
        self.stages = [_Stage(chunk, mesh, dtype) for chunk in chunks]
        self.schedules: dict[int, Schedule1F1B | ScheduleInterleaved1F1B] = {}

    def train(self, micro_batches: Sequence[Batch], scale: Tensor, sums: Sums) -> None:
        """Forward and backward of all; every rank of the pipeline is given the same."""
        for stage in self.stages:
            stage.start(micro_batches, scale, sums)
        if self.ranks > 1:
            # The target stands for the micro-batch, of which torch need not know more.
            numbers = torch.arange(len(micro_batches))
            self._schedule(len(micro_batches)).step(target=numbers, return_outputs=False)
            return
        (stage,) = self.stages
        for number in range(len(micro_batches)):
            stage.forward_one_chunk(number)
            stage.backward_one_chunk(number, last_backward=number == len(micro_batches) - 1)

    def _schedule(self, micro_batches: int) -> Schedule1F1B | ScheduleInterleaved1F1B:
        if micro_batches not in self.schedules:
            settings: dict[str, Any] = {"loss_fn": _as_it_is, "scale_grads": False}
            self.schedules[micro_batches] = (
                Schedule1F1B(self.stages[0], micro_batches, **settings)
                if len(self.stages) == 1
                else ScheduleInterleaved1F1B([*self.stages], micro_batches, **settings)
            )
        return self.schedules[micro_batches]

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Batch], sums: Sums) -> None:
        """Forward only, of as many micro-batches as come."""
        sending: list[dist.P2POp] = []
        for stage, batch in self._forwards(micro_batches):
            x = batch.input_ids
            if not stage.is_first:
                x, operation = stage.receive(batch, stage.stage_index - 1)
                sending.append(operation)
            # Together: in a ring of stages each rank would wait for the next one to receive.
            _exchange(sending)
            y = stage.chunk.forward(x, batch)
            sending = [] if stage.is_last else [stage.send(y, stage.stage_index + 1)]
            if stage.is_last:
                sums.add(batch, y)
        _exchange(sending)

    def _forwards(self, micro_batches: Iterable[Batch]) -> Iterator[tuple[_Stage, Batch]]:
        """What this rank computes, in order: as many micro-batches at a time as keep all ranks busy."""
        rest = iter(micro_batches)
        while together := list(islice(rest, self.ranks)):
            for stage in self.stages:
                for batch in together:
                    yield stage, batch


def _as_it_is(loss: Tensor, _: Tensor) -> Tensor:
    return loss


def _exchange(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
