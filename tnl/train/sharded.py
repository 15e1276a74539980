"""FSDP2 and DeepSpeed: a process holds a part of the weights, or of what the optimizer keeps, and the engine moves the parts."""

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

from tnl.evaluate import perplexity
from tnl.evaluate.perplexity import causal_lm
from tnl.train.crew import Crew
from tnl.train.engines import Compute, Engine, Record, local, through
from tnl.train.plan import Plan


class Sharded(Engine):
    """What both have in common: every row is computed inside the engine's forward, and all processes compute as many."""

    sharded = True

    def passes(self, rows: int) -> int:
        return int(self.crew.most(torch.tensor(rows, device=self.device)))

    def spread(self, needs: Plan) -> Plan:
        """What one process needs of memory, where one alone would need so much: a part, and beside it what is whole for a while.

        That is the layer that is computed, the next one, what stands outside the layers, and of those that are trained the gradients.
        """
        size, trained = self.crew.size, needs.trained / (needs.trained + needs.weights)
        beside = int((2 * needs.layer + needs.outside) * (1 + trained)) + needs.trained // size
        return replace(needs, weights=needs.weights // size, trained=needs.trained // size, beside=beside, host=False)

    def settle(self, net: nn.Module, loss: Tensor, failed: bool) -> tuple[Tensor, bool]:
        return self.crew.sum(loss.float()), failed

    def measure(
        self, net: nn.Module, records: Sequence[Record], budget: int, chunk: int, after_row: Callable[[], None]
    ) -> perplexity.Perplexity:
        """All processes measure all records, since each has a part of every weight."""
        found: list[perplexity.Perplexity] = []

        def all_of_them() -> Tensor:
            found.append(perplexity.loss(net, records, budget, chunk=chunk))
            return torch.zeros((), device=self.device)

        with self.crew.together(), torch.no_grad():
            through(self.wrapped, net, all_of_them)
        return found[0]


class Fsdp(Sharded):
    """FSDP2: each process holds a part of every weight, gradient and optimizer state; a layer is whole only while it is computed."""

    parts = True
    scale = 1  # type: ignore[assignment]  # gradients are summed, not averaged

    def __init__(self, crew: Crew, device: torch.device, reshard_after_forward: bool = True, cpu_offload: bool = False) -> None:
        super().__init__(crew, device)
        self.reshard, self.offload = reshard_after_forward, CPUOffloadPolicy(device.type == "cuda") if cpu_offload else OffloadPolicy()

    def prepare(self, net: nn.Module) -> None:
        mesh = init_device_mesh(self.device.type, (self.crew.size,))
        options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": self.reshard, "offload_policy": self.offload}
        parts: list[Any] = [fully_shard(module, **options) for module in (*causal_lm(net).model.layers, net)]
        for part in parts:
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        causal_lm(net).model.pick_kernels(device=self.device)

    def wrap(self, net: nn.Module, optimizer: Any) -> tuple[Any, Any]:
        self.wrapped = net
        return Shell(net), optimizer

    def run(self, net: nn.Module, compute: Compute, last: bool) -> Tensor:
        loss = through(self.wrapped, net, compute)
        loss.backward()
        return loss.detach()

    def clip(self, parameters: Sequence[nn.Parameter], limit: float, norm: Tensor) -> None:
        share = torch.clamp(limit / (norm + 1e-6), max=1.0)
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, share.to(gradients[0].device))

    def whole(self, collect: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        found = {}
        for name, x in collect().items():
            full = gathered(x)  # all must take part
            if self.crew.saves:
                found[name] = full.detach().cpu().contiguous()
        return found

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        values = optimizer.state_dict()
        whole = {index: {key: gathered(x) for key, x in one.items()} for index, one in values["state"].items()}
        return {**values, "state": whole} if self.crew.saves else {}

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def part(index: int, x: Any) -> Any:
            return scattered(x, parameters[index]) if isinstance(x, Tensor) and x.dim() else x

        parts = {index: {key: part(index, x) for key, x in one.items()} for index, one in state["state"].items()}
        optimizer.load_state_dict({**state, "state": parts})


class DeepSpeed(Sharded):
    """DeepSpeed's ZeRO: its engine sums gradients and updates; optimizer states are shared out, with stage 2 gradients, with 3 weights."""

    def __init__(self, crew: Crew, device: torch.device, config: dict[str, Any]) -> None:
        super().__init__(crew, device)
        # an extra, and slow to import
        import deepspeed

        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # of the names that it calls torch by
        self.library: Any = deepspeed
        self.config = copy.deepcopy(config)
        self.stage = int(config["zero_optimization"]["stage"])
        self.parts = self.stage == 3
        self.half = bool(config["bf16"]["enabled"])

    def spread(self, needs: Plan) -> Plan:
        if self.half:
            needs = replace(needs, states=2 * (1 + needs.states))  # kept in float32, and the weights once more
        if self.stage < 3:
            return replace(needs, states=needs.states / self.crew.size, host=False)
        return super().spread(replace(needs, overhead=needs.overhead + self.buffers(needs.weights + needs.trained)))

    def buffers(self, weights: int) -> int:
        """Bytes that stage 3 takes for itself: weights that have been gathered ahead, and on a GPU gradients that are being summed."""
        given, size = self.config["zero_optimization"], 2 if self.half else 4
        sizes = {"stage3_max_live_parameters": 1_000_000_000, "reduce_bucket_size": 500_000_000}
        ahead, summed = (size * (usual if given.get(name, "auto") == "auto" else int(given[name])) for name, usual in sizes.items())
        return min(ahead, weights) + (summed if self.device.type == "cuda" else 0)  # on a CPU memory that is not written is not taken

    def prepare(self, net: nn.Module) -> None:
        if self.half:
            keep_exact(net)
        if self.stage == 3:
            # a layer reads its modules' weights itself, so all of them are made ready at once
            self.library.utils.set_z3_leaf_modules(net, [type(causal_lm(net).model.layers[0])])
            # and their gradients are collected when that of a layer's input is there, which a frozen embedding's output has not
            causal_lm(net).enable_input_require_grads()

    def wrap(self, net: nn.Module, optimizer: Any) -> tuple[Any, Any]:
        # the engine takes empty groups out, which a checkpoint and the schedule have
        self.groups = list(optimizer.param_groups)
        self.members = [list(group["params"]) for group in self.groups]
        exact = [(p, p.detach().cpu()) for p in self.order if self.half and p.dtype == torch.float32]
        options = {"model": net, "optimizer": optimizer, "config": self.config, "dist_init_required": False}
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has compiled something
            if self.stage == 3:
                self.take_parts(net)
            self.wrapped = self.library.initialize(**options)[0]
        for p, value in exact:
            self.put(p, value)
        return self.wrapped, Stepper(optimizer, self.wrapped, self.groups)

    def take_parts(self, net: nn.Module) -> None:
        """Bring the weights to the device one by one, and keep this process's part; DeepSpeed itself would bring the whole model first."""
        for p in net.parameters() if self.half else ():
            p.data = p.data.bfloat16()
        self.library.zero.Init(module=net, config_dict_or_path=self.config)
        for x in net.buffers():
            x.data = x.data.to(self.device)
        causal_lm(net).model.pick_kernels(device=self.device)

    @property
    def order(self) -> list[Any]:
        """The trained weights, as the optimizer of one process numbers them."""
        return [p for group in self.members for p in group]

    def run(self, net: nn.Module, compute: Compute, last: bool) -> Tensor:
        self.wrapped.set_gradient_accumulation_boundary(last)
        loss = through(self.wrapped, net, compute)
        self.wrapped.backward(loss)
        if not last:
            self.wrapped.step()  # counts the row; weights change at the boundary alone
        return loss.detach()

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        utils = self.library.utils
        return [utils.safe_get_local_grad(p) if self.stage == 3 else utils.safe_get_full_grad(p) for p in parameters]

    def kept(self, optimizer: Any) -> list[Tensor]:
        return []  # flat buffers that the next loss tells of

    def clip(self, parameters: Sequence[nn.Parameter], limit: float, norm: Tensor) -> None:
        """The engine clips when it updates."""

    def whole(self, collect: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        with self.library.zero.GatheredParameters(self.order, enabled=self.stage == 3):
            at = {p.data_ptr(): p for p in self.order}
            there = {name: (x.data_ptr(), x.detach().cpu().contiguous()) for name, x in collect().items()}
        exact = {place: self.library.utils.safe_get_full_fp32_param(p).cpu() for place, p in at.items()}
        return {name: exact.get(place, x) for name, (place, x) in there.items()} if self.crew.saves else {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        inner = self.wrapped.optimizer.optimizer
        flat, first = next((key, one) for key, one in inner.state.items() if one)
        keys = [key for key, x in first.items() if isinstance(x, Tensor) and x.shape == flat.shape and x.dim()]
        rest = {key: x for key, x in first.items() if key not in keys}
        take, state = self.library.utils.safe_get_full_optimizer_state, {}
        for index, p in enumerate(self.order):
            state[index] = {**copy.deepcopy(rest), **{key: take(p, key).cpu() for key in keys}}  # each counts its own steps
        starts = [sum(map(len, self.members[:number])) for number in range(len(self.members))]
        numbers = [list(range(start, start + len(members))) for start, members in zip(starts, self.members)]
        groups = [{**group, "params": members} for group, members in zip(self.groups, numbers)]
        return {"state": state, "param_groups": groups} if self.crew.saves else {}

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        zero = self.wrapped.optimizer
        values = state["state"]
        keys = [key for key, x in values[0].items() if isinstance(x, Tensor) and x.dim()]
        for flat in zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups:
            rest = {key: copy.deepcopy(x) for key, x in values[0].items() if key not in keys}
            zero.optimizer.state[flat] = {**rest, **{key: torch.zeros_like(flat) for key in keys}}
        if self.stage != 3:
            zero._lazy_init_hp_params_optimizer_state()  # else only its first step would let anybody set them
        for index, p in enumerate(self.order):
            for key in keys:
                self.put(p, values[index][key], key)
        for group, saved in zip(self.groups, state["param_groups"]):
            group.update({key: value for key, value in saved.items() if key != "params"})

    def load_exact(self, net: nn.Module, weights: dict[str, Tensor]) -> None:
        for name, p in net.named_parameters() if self.half else ():
            if name in weights:
                self.put(p, weights[name])

    def put(self, p: Any, value: Tensor, key: str | None = None) -> None:
        """Set the exact value of a weight, or, with a key, what the optimizer keeps of it."""
        utils = self.library.utils
        value = value.to(self.device, torch.float32)
        if self.stage != 3:
            _ = utils.safe_set_full_fp32_param(p, value) if key is None else utils.safe_set_full_optimizer_state(p, value, key)
            return
        size = p.ds_tensor.numel()
        padded = nn.functional.pad(value.flatten(), (0, size * self.crew.size - value.numel()))
        part = padded[size * self.crew.rank :][:size]
        _ = utils.safe_set_local_fp32_param(p, part) if key is None else utils.safe_set_local_optimizer_state(p, part, key)


class Stepper(torch.optim.Optimizer):
    """The optimizer as Trainer knows it, stepped by DeepSpeed's engine."""

    def __init__(self, plain: torch.optim.Optimizer, engine: Any, groups: list[dict[str, Any]]) -> None:
        self.plain, self.engine, self.groups = plain, engine, groups
        self.defaults = plain.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.plain.state

    def state_dict(self) -> dict[str, Any]:
        return self.plain.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """Accelerate puts back what it has just asked for; a checkpoint's goes through the engine."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The engine does that."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.engine.step()


class Shell(nn.Module):
    """A model that has been wrapped already, so that Trainer does not put DDP around it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)


def keep_exact(net: nn.Module) -> None:
    """Make buffers of frozen float32 parameters, such as LRPE's angles: DeepSpeed rounds every parameter to bfloat16, and no buffer."""
    for module in net.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if not p.requires_grad and p.dtype == torch.float32:
                delattr(module, name)
                module.register_buffer(name, p.detach())


def gathered(x: Any) -> Any:
    """The whole of a tensor; all processes must ask. Anything else as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def scattered(value: Tensor, like: Any) -> Tensor:
    """A whole value laid out as another tensor is; every process has the value."""
    if not hasattr(like, "device_mesh"):
        return value
    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None)
