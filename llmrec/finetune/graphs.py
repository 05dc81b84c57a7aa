"""The decoder's passes over token streams as CUDA graphs: recorded once per length, then replayed.

A step over few tokens is thousands of small operations, and a CPU takes longer to ask for them than a GPU to
do them. A recorded pass is one request. Streams come in few lengths (`packing.stream_bucket`), so few passes
are recorded; they compute what they were recorded from, in the same order.

Source: torch's own `make_graphed_callables`, whose gradients a second pass of a step would overwrite; here
gradients leave as a copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmrec.data.batches import sent
from llmrec.errors import TrainingError
from llmrec.finetune import flex
from llmrec.finetune.packing import TokenStream

MOST_TOKENS = 4096
"""Longest stream that is recorded: with more, the GPU's work takes longer than asking for it."""

WARM_UP = 3
"""Passes before recording, in which libraries compile, choose kernels and take memory of their own."""

MASK_TENSORS = ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices")

Decode = Callable[[Tensor, Any, Tensor, Mapping[str, nn.Parameter]], Tensor]
"""Embeddings (1, S, H), a mask, positions (1, S) and parameters by name, in place of the decoder's, to last
hidden states (1, S, H)."""


def cuda_graph(function: Callable[[], None], pool: Any) -> Callable[[], None]:
    """Record what a function does on the GPU; what it leaves in tensors is overwritten by every replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        function()
    return graph.replay


@contextlib.contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Passes before recording: on a stream of their own, and without a trace in the random numbers."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.random.fork_rng(devices=[device]), torch.cuda.stream(torch.cuda.Stream(device)):
        yield
    torch.cuda.synchronize(device)


class DecoderGraphs:
    """Forward and backward passes of a decoder over streams.

    Args:
        decode: the pass itself.
        parameters: what is trained in it, by name.
        record: how a function is recorded.
    """

    def __init__(
        self,
        decode: Decode,
        parameters: Mapping[str, nn.Parameter],
        record: Callable[[Callable[[], None], Any], Callable[[], None]] = cuda_graph,
    ) -> None:
        self.decode = decode
        self.names, self.parameters = tuple(parameters), tuple(parameters.values())
        self.record = record
        self.pool: Any = None
        self.recorded: dict[int, Recorded] = {}
        self.passes = 0
        """Forward passes so far."""
        self.sizes = [parameter.numel() for parameter in self.parameters]
        assert len({parameter.dtype for parameter in self.parameters}) == 1
        self.flat = self.parameters[0].new_empty(sum(self.sizes))
        """Gradients of all parameters after a backward pass, in one piece: one copy takes them all away."""

    def leaves(self) -> dict[str, nn.Parameter]:
        """The parameters' values as leaves that autograd has not met.

        Its node of a leaf belongs to the stream it was made on and lives as long as any graph that has it.
        Were a parameter's own node of some plain pass still there, a recorded pass would have to wait for the
        stream of that one, which a recording must not.
        """
        return {name: nn.Parameter(value.detach()) for name, value in zip(self.names, self.parameters)}

    def takes(self, stream: TokenStream) -> bool:
        """Whether a stream of this length is recorded."""
        return len(stream.source) <= MOST_TOKENS

    def __call__(self, embeddings: Tensor, stream: TokenStream, blocks: Tensor | None) -> Tensor:
        """Last hidden states (1, S, H), overwritten by the next call with as many tokens.

        Args:
            embeddings: (1, S, H).
            stream: on the host or on the device.
            blocks: its `visible_blocks`, for FlexAttention's block masks; None: dense ones.

        Raises:
            TrainingError: the decoder does what cannot be recorded.
        """
        size = len(stream.source)
        if size not in self.recorded:
            if self.pool is None and embeddings.device.type == "cuda":
                self.pool = torch.cuda.graph_pool_handle()
            try:
                self.recorded[size] = Recorded(self, embeddings, stream, blocks)
            except RuntimeError as error:
                # Ending a recording that failed fails too, so the last error seldom is the one that counts.
                first = first_of(error)
                if isinstance(first, torch.OutOfMemoryError):
                    raise first from None
                reason = str(first).strip().splitlines()[0]
                raise TrainingError(
                    f"the base model's passes cannot be recorded ({reason}); set finetune.cuda_graphs=false, "
                    "which changes no result"
                ) from error
        recorded = self.recorded[size]
        recorded.fill(stream, blocks)
        return _Replay.apply(recorded, embeddings, *self.parameters)


def first_of(error: BaseException) -> BaseException:
    """The error that others came of."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


class Recorded:
    """One length's passes and the tensors that they read and write.

    Between a forward pass and its backward pass no other may run: they share memory.
    """

    def __init__(
        self, owner: DecoderGraphs, embeddings: Tensor, stream: TokenStream, blocks: Tensor | None
    ) -> None:
        device = embeddings.device
        self.owner = owner
        self.embeddings = embeddings.detach().clone().requires_grad_()
        self.stream = stream.to(device)
        # What a host tensor is moved to is new; what lies on the device already belongs to somebody.
        self.stream = type(stream)(**{name: value.clone() for name, value in vars(self.stream).items()})
        self.mask = None if blocks is None else flex.block_mask(self.stream, blocks)
        self.hidden = self.grad = self.embeddings_grad = torch.empty(0)
        leaves: dict[str, nn.Parameter] = {}
        kind = device.type
        dtype = torch.get_autocast_dtype(kind)
        enabled = torch.is_autocast_enabled(kind)

        def forward() -> None:
            # Casts that autocast remembers would be made by one pass and used by another.
            autocast = torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
            with torch.enable_grad(), autocast:
                mask = self.stream.visible() if self.mask is None else self.mask
                self.hidden = owner.decode(self.embeddings, mask, self.stream.position[None], leaves)

        def backward() -> None:
            with torch.autocast(kind, enabled=False):
                sources = [self.embeddings, *leaves.values()]
                self.embeddings_grad, *others = torch.autograd.grad(self.hidden, sources, self.grad)
                torch.cat([gradient.flatten() for gradient in others], out=owner.flat)

        with aside(device):
            leaves = owner.leaves()
            for _ in range(WARM_UP):
                forward()
                self.grad = torch.zeros_like(self.hidden)
                backward()
            self.hidden = self.hidden.detach()
        leaves, self.embeddings = owner.leaves(), self.embeddings.detach().requires_grad_()
        self.replay_forward = owner.record(forward, owner.pool)
        self.replay_backward = owner.record(backward, owner.pool)
        self.hidden = self.hidden.detach()

    def fill(self, stream: TokenStream, blocks: Tensor | None) -> None:
        """Let the passes read this stream."""
        for name, value in vars(self.stream).items():
            if name != "readout":
                value.copy_(sent(getattr(stream, name), value.device))
        if self.mask is not None and blocks is not None:
            mask = flex.host_mask(blocks)
            for name in MASK_TENSORS:
                blocks_there = getattr(self.mask, name)
                blocks_there.copy_(sent(getattr(mask, name), blocks_there.device))


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorded: Recorded, embeddings: Tensor, *parameters: Tensor) -> Tensor:
        recorded.embeddings.copy_(embeddings)
        recorded.replay_forward()
        recorded.owner.passes += 1
        ctx.recorded, ctx.number = recorded, recorded.owner.passes
        return recorded.hidden.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        recorded, owner = ctx.recorded, ctx.recorded.owner
        if ctx.number != owner.passes:
            raise RuntimeError(
                "another recorded pass came between this one and its gradients, which are lost"
            )
        recorded.grad.copy_(grad)
        recorded.replay_backward()
        parts = owner.flat.clone().split(owner.sizes)
        owner.passes += 1  # a second backward pass would find other activations
        shaped = [part.view_as(parameter) for part, parameter in zip(parts, owner.parameters)]
        return None, recorded.embeddings_grad.clone(), *shaped
