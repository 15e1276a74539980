"""Several adapters on one base in one batch: their matrices lie in one bank, and each row of a step names its own."""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from tnl.adapter.load import adapter_folder, read_adapter
from tnl.errors import ModelError
from tnl.generate.slots import Wrap
from tnl.kernels.reference import Projection
from tnl.kernels.row_linear import RowLinear
from tnl.model.layer import LayerWeights

MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
LAYER = {"qkvu_proj": "token_mixer", "out_proj": "token_mixer", "l1": "channel_mixer", "l2": "channel_mixer", "l3": "channel_mixer"}
HEAD = "lm_head"


class AdaptersBusy(Exception):
    """Every place, or the adapter in question, is in use by running requests."""


@dataclass
class Loaded:
    """One adapter of the bank."""

    row: int
    rank: int
    users: int = 0
    """Requests, waiting or running, that it may not be taken from."""


class Adapters:
    """The adapters in memory, known by what they contain and not by a name; the least recently used goes first, never one in use.

    Row 0 of the bank is zero: the base. A larger rank than all before widens the bank, which may change the last bits of
    what rows compute from then on.
    """

    def __init__(self, model: Any, capacity: int = 8) -> None:
        self.model, self.capacity = model, capacity
        self.device = model.model.embed_tokens.weight.device
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._bank: dict[str, tuple[Tensor, Tensor]] = {}
        """Module -> A [rows, R, in] and B [rows, out, R], the scale in B; float32, with the Triton kernels the model's dtype."""
        self.dtype = model.model.embed_tokens.weight.dtype if model.backend == "triton" else torch.float32
        self.version = 0
        """Counts how often a bank was made anew: what holds its addresses (a CUDA graph) is out of date then."""
        self._lock = threading.Lock()

    @property
    def keys(self) -> list[str]:
        """What is loaded, the least recently used first."""
        with self._lock:
            return list(self._loaded)

    def users(self, key: str) -> int:
        """Requests that use the adapter; 0 where it is not loaded."""
        with self._lock:
            return self._loaded[key].users if key in self._loaded else 0

    def load(self, folder: str | Path, *, hold: bool = False) -> str:
        """Read the adapter in a folder, all of it checked first, and return its key: a hash of its content.

        hold: count one user at once, so that it cannot be evicted before `release`.
        Raises ModelError; AdaptersBusy where every place is in use.
        """
        folder = adapter_folder(folder)
        config, tensors = read_adapter(self.model, folder)
        return self.add(scaled_matrices(config, tensors, folder), hold=hold)

    def add(self, matrices: Mapping[str, tuple[Tensor, Tensor]], *, hold: bool = False) -> str:
        """As `load`, from module -> A [R, in] and B [out, R] with the scale in it, both float32 on the CPU."""
        key = content_key(matrices)
        with self._lock:
            if key not in self._loaded:
                self._place(key, matrices)
            self._loaded.move_to_end(key)
            self._loaded[key].users += hold
        return key

    def hold(self, key: str) -> None:
        """Count one user of an adapter. Raises KeyError where it is not loaded (any more)."""
        with self._lock:
            self._loaded[key].users += 1
            self._loaded.move_to_end(key)

    def release(self, key: str) -> None:
        """One user less."""
        with self._lock:
            self._loaded[key].users -= 1

    def unload(self, key: str) -> None:
        """Forget an adapter; one that is not loaded is none. Raises AdaptersBusy while it is in use."""
        with self._lock:
            if key in self._loaded:
                if self._loaded[key].users:
                    raise AdaptersBusy(f"{self._loaded[key].users} requests use it")
                self._drop(key)

    def row(self, key: str | None) -> int:
        """The bank's row of a held adapter; None is the base."""
        with self._lock:
            return 0 if key is None else self._loaded[key].row

    def wrap(self, rows: Tensor) -> Wrap:
        """For `slots.forward`: row b of the call has the adapter in the bank's row rows[b] ([B] of any number type)."""
        bank = self._bank

        def wrapped(weights: LayerWeights, layer: int) -> LayerWeights:
            changed: dict[str, Any] = {}
            for name, part in LAYER.items():
                matrices = bank.get(f"model.layers.{layer}.{part}.{name}")
                if matrices is not None:
                    changed[name] = RowLinear(getattr(weights, name), *matrices, rows)
            return weights._replace(**changed)

        return wrapped

    def wrap_head(self, rows: Tensor) -> Projection | None:
        """The head with the rows' adapters; None where none has the head."""
        matrices = self._bank.get(HEAD)
        return None if matrices is None else RowLinear(self.model.lm_head, *matrices, rows)

    def _place(self, key: str, matrices: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        if len(self._loaded) >= self.capacity:
            idle = next((one for one, loaded in self._loaded.items() if not loaded.users), None)
            if idle is None:
                raise AdaptersBusy(f"all {self.capacity} places are in use")
            self._drop(idle)
        row = min(set(range(1, self.capacity + 1)) - {loaded.row for loaded in self._loaded.values()})
        for name, (a, b) in matrices.items():
            A, B = self._roomy(name, a, b)
            A[row, : len(a)], B[row, :, : len(a)] = a.to(A), b.to(B)
        self._loaded[key] = Loaded(row, max((len(a) for a, _ in matrices.values()), default=0))

    def _roomy(self, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The module's bank, made or widened to the rank of a; a step that runs meanwhile keeps the old one."""
        old = self._bank.get(name)
        rank = len(a)
        if old is None or old[0].shape[1] < rank:
            R = 1 << (rank - 1).bit_length()
            A = torch.zeros(self.capacity + 1, R, a.shape[1], device=self.device, dtype=self.dtype)
            B = torch.zeros(self.capacity + 1, b.shape[0], R, device=self.device, dtype=self.dtype)
            if old is not None:
                A[:, : old[0].shape[1]], B[:, :, : old[0].shape[1]] = old
            self._bank[name] = (A, B)
            self.version += 1
        return self._bank[name]

    def _drop(self, key: str) -> None:
        row = self._loaded.pop(key).row
        for A, B in self._bank.values():
            A[row], B[row] = 0, 0


def scaled_matrices(config: LoraConfig, tensors: Mapping[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> A and scale x B, float32. Raises ModelError for an adapter that is more than A and B on projections."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = MATRIX.fullmatch(name)
        module = match.group(1) if match else ""
        if match is None or (module != HEAD and module.rpartition(".")[2] not in LAYER):
            what = f"it changes more than projections ({name[:100]}), which cannot share a batch with other adapters"
            raise ModelError(folder, what, "Merge it (tnl merge) and serve the merged model")
        found.setdefault(module, {})[match.group(2)] = tensor.float()
    matrices = {}
    for module, pair in found.items():
        alphas: Any = config.alpha_pattern or {}
        alpha = alphas.get(get_pattern_key(alphas, module), config.lora_alpha)
        rank = len(pair["A"])
        matrices[module] = (pair["A"], pair["B"] * (alpha / (math.sqrt(rank) if config.use_rslora else rank)))
    return matrices


def content_key(matrices: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    """SHA-256 over names, shapes and values as they were read: the same for the same adapter under any name, in any process."""
    total = hashlib.sha256()
    for name in sorted(matrices):
        for matrix in matrices[name]:
            total.update(f"{name}{list(matrix.shape)}\0".encode())
            total.update(matrix.contiguous().numpy().tobytes())
    return total.hexdigest()
