"""Frozen weights that are divided over processes, or wait in the RAM: torch's `fully_shard` (FSDP2).

Each process holds a part of every block. A block is whole on the device only while it runs, forward or backward. Adapters are
added later and belong to no block's shards, so each process has them whole, and their gradients are added up by the trainer.
The LM head stays whole, because log-probs read its weight (scoring/lm_head.py). So does the table of embeddings: libraries take
the device of a model from its first weight.

To make a block whole is an exchange of all processes, so each of them has to run the model as often as the others do.
`Lockstep` sees to that: a process that has fewer rows runs the model on two tokens meanwhile, and uses nothing of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_cli.errors import DoesNotFit, Problem, RunFailed
from dpo_cli.providers.out_of_memory import is_out_of_memory
from dpo_cli.storage.world import World

FORWARD, BOTH, DONE = 2, 1, 0  # what a process does next; the largest number of all processes is what all of them do
OF_4_BITS = ("quant_state", "compress_statistics", "quant_type")  # attributes of a weight that bitsandbytes and PEFT read


def shard(model: PreTrainedModel, device: torch.device, world: World, in_ram: bool) -> None:
    """Divide the blocks of a frozen model, which is in the RAM, over the processes; the rest of it goes to the device.

    `in_ram`: the shards wait in the RAM. A single process has one shard, and then only that is of use.
    Raises `RunFailed` for a model without blocks that can be divided.
    """
    blocks = list(blocks_of(model.base_model))
    if not blocks:
        raise RunFailed(f"{type(model).__name__} has no blocks that can be divided", 'set "fsdp" and "cpu_offload" to false')
    # Between two runs all is in shards, in each process: to save an adapter makes shards of what is whole, in that process.
    options: dict[str, Any] = {"mesh": _mesh(device, world), "reshard_after_forward": True}
    waiting = CPUOffloadPolicy(pin_memory=device.type == "cuda") if in_ram else OffloadPolicy()
    base, embedding = model.base_model, model.get_input_embeddings()
    embedding.to(device)
    for part in model.children():
        if part is not base:
            part.to(device)
    kept = _of_4_bits(model)
    model.requires_grad_(False)  # PEFT does that too, but torch asks a shard when it is first made whole
    for block in blocks:
        fully_shard(block, **options, offload_policy=waiting)
    fully_shard(base, **options, ignored_params=set(embedding.parameters()))
    for module, attributes in kept.items():
        attributes["quant_state"].to(device)
        module.quant_state = attributes["quant_state"]  # which bitsandbytes reads where the weight has none
        vars(module.weight).update(attributes)
    steps = Lockstep(base, device, world)
    if world.size > 1:
        world.steps = steps


def place_adapters(model: nn.Module, device: torch.device) -> None:
    """Move what was added to a sharded model to its device: PEFT puts an adapter where the weight is, which may be the RAM."""
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor) and any(part in name for part in ("lora_", "modules_to_save")):
            parameter.data = parameter.data.to(device)


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a model of transformers: those that it checkpoints, and none within another."""
    for child in model.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from blocks_of(child)


def _of_4_bits(model: nn.Module) -> dict[Any, dict[str, Any]]:
    """By layer, what its 4-bit weight has and a shard of it would lack."""
    layers = (module for module in model.modules() if hasattr(getattr(module, "weight", None), "quant_state"))
    return {layer: {name: getattr(layer.weight, name) for name in OF_4_BITS} for layer in layers}


def _mesh(device: torch.device, world: World) -> DeviceMesh:
    if not distributed.is_initialized():  # torch asks for a group, also of one process
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return init_device_mesh(device.type, (world.size,))


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be a shard. Of a shard all processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_copy(layer: nn.Module) -> nn.Module:
    """A copy of an adapted layer with whole weights, where its adapter is; all processes have to ask for it."""
    shards = [parameter for parameter in layer.parameters() if isinstance(parameter, DTensor)]
    if not shards:
        return copy.deepcopy(layer)
    device = next(parameter.device for parameter in layer.parameters() if not isinstance(parameter, DTensor))
    wholes = {id(shard): nn.Parameter(whole(shard.detach()).to(device), requires_grad=False) for shard in shards}
    return copy.deepcopy(layer, wholes)


class Lockstep:
    """The runs of a sharded model, which all processes do together: before each they agree on what comes next.

    A forward without gradients comes before one with its backward pass. So all have the same order of exchanges, whatever rows
    they have. A run that has failed, as where the memory is full, leaves blocks whole. A process alone makes them shards again,
    and repeats the row in parts; of several the others wait within the run, so all end.
    """

    def __init__(self, backbone: nn.Module, device: torch.device, world: World) -> None:
        self._backbone, self._device, self._world = backbone, device, world
        self.is_open = False  # a run has started, and not ended
        self._is_idle = False  # a run without use
        backbone.register_forward_pre_hook(self._before, prepend=True)
        backbone.register_forward_hook(self._after)

    def finish(self) -> None:
        """Run without use until no process runs the model any more."""
        if self.is_open:  # a run has failed in all processes, and none ends with that
            self._make_shards()
        while (chosen := self._world.largest(DONE)) != DONE:
            self._run_idle(chosen)

    def failure(self, error: BaseException) -> BaseException:
        """The error to end with, for one that was raised within a run."""
        return _too_large(self._world.size) if isinstance(error, Exception) and is_out_of_memory(error) else error

    def _before(self, *_: object) -> None:
        if self._is_idle:
            return
        if self.is_open:  # the row is to be repeated in parts
            if self._world.size > 1:
                raise _too_large(self._world.size)
            self._make_shards()
        own = BOTH if torch.is_grad_enabled() else FORWARD
        while (chosen := self._world.largest(own)) != own:
            self._run_idle(chosen)
        self.is_open = True

    def _make_shards(self) -> None:
        """Of all blocks, as before a run."""
        cast(FSDPModule, self._backbone).reset_iter_state()
        self.is_open = False

    def _after(self, module: nn.Module, args: object, output: Any) -> None:
        states = output[0]
        if self._is_idle:
            return
        if not states.requires_grad:
            self.is_open = False
            return

        def close() -> None:
            self.is_open = False

        states.register_hook(lambda _: Variable._execution_engine.queue_callback(close))  # at the end of the backward pass

    def _run_idle(self, kind: int) -> None:
        self.is_open = self._is_idle = True
        try:
            with torch.random.fork_rng(), torch.set_grad_enabled(kind == BOTH):
                ids = torch.zeros(1, 2, dtype=torch.long, device=self._device)
                states = self._backbone(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
                if states.requires_grad:  # a model without an adapter has no backward pass
                    (states.float().sum() * 0).backward()
        finally:
            self._is_idle = False
        self.is_open = False


def _too_large(processes: int) -> DoesNotFit:
    message = f"a row does not fit the memory, and the weights are divided over {processes} processes, so it cannot be repeated"
    fix = 'write a smaller "per_device_train_batch_size", "per_device_eval_batch_size" or "max_seq_length", and use --resume'
    return DoesNotFit([Problem("error", "does-not-fit", message, fix)])
