"""What is served, by name: the base, and the adapters of one folder. Names come from requests; paths never do."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tnl.adapter.gate import CONFIG
from tnl.adapter.metadata import read_adapter_metadata, template_of
from tnl.data.template import Template
from tnl.errors import TnlError
from tnl.generate.adapters import Adapters, AdaptersBusy
from tnl.generate.sampling import Settings
from tnl.serve.errors import ApiError, shown, unknown_model
from tnl.serve.schema import ModelCard

NAME = re.compile(r"\w[\w.-]{0,99}")
RULE = "A name begins with a letter or digit and has at most 100 letters, digits, dots, dashes and underscores"


@dataclass(frozen=True)
class Served:
    """A model as clients know it, and how it was taught to be asked."""

    name: str
    template: Template
    system: str | None = None
    settings: Settings = field(default_factory=Settings)
    adapter: str | None = None
    """Key of its adapter, held for the request; None: the base, or one that is merged into it."""


class Catalog:
    """The base and the adapters beside it. An adapter is read when it is first asked for, and stays until others need its place."""

    def __init__(self, base: Served, adapters: Adapters, *, root: Path | None = None, tokenizer: str = "") -> None:
        self.base, self.adapters, self.tokenizer = base, adapters, tokenizer
        self.root = None if root is None else root.resolve()
        self.extra: dict[str, Path] = {}
        """Adapters that lie elsewhere, by name."""
        self.created = int(time.time())
        self._loaded: dict[str, Served] = {}
        self._lock = asyncio.Lock()

    def folders(self) -> dict[str, Path]:
        """Every adapter's folder by its name, as the disk is now; links that lead out of the root are none."""
        found = dict(self.extra)
        for entry in sorted(self.root.iterdir()) if self.root is not None and self.root.is_dir() else []:
            for folder in (entry, entry / "adapter"):
                if NAME.fullmatch(entry.name) and entry.name not in (self.base.name, *found) and (folder / CONFIG).is_file():
                    if self.root in folder.resolve().parents:
                        found[entry.name] = folder
                    break
        return found

    def cards(self) -> list[ModelCard]:
        """What GET /v1/models lists."""
        return [self._card(self.base.name), *(self._card(name, folder) for name, folder in self.folders().items())]

    def card(self, name: str) -> ModelCard:
        """One of them. Raises ApiError 404."""
        folder = None if name == self.base.name else self.folders().get(name)
        if folder is None and name != self.base.name:
            raise unknown_model(name)
        return self._card(name, folder)

    def _card(self, name: str, folder: Path | None = None) -> ModelCard:
        served = self.base if folder is None else self._loaded.get(name)
        loaded = served is not None and (served.adapter is None or served.adapter in self.adapters.keys)
        system = served.system if served else None
        if served is None and folder is not None:
            with suppress(TnlError, OSError):
                system = read_adapter_metadata(folder).system
        return ModelCard(id=name, created=self.created, root=self.base.name, loaded=loaded, system=system)

    async def take(self, name: str, *, anew: bool = False) -> Served:
        """The model of that name, its adapter in memory and held until `release`; anew: as it lies on the disk now.

        Raises ApiError: 404 for what is not served, 400 for an adapter that is refused, 429 where all places are in use.
        """
        if name == self.base.name:
            return self.base
        folder = (await asyncio.to_thread(self.folders)).get(name)
        if folder is None:
            raise unknown_model(name)
        if not anew and (served := self._held(name)):  # without the lock: nobody waits while another adapter is read
            return served
        async with self._lock:
            if not anew and (served := self._held(name)):
                return served
            try:
                self._loaded[name] = served = await asyncio.to_thread(self._load, name, folder)
            except AdaptersBusy as error:
                raise ApiError(429, f"no place for another adapter: {error}", code="adapters_busy", headers={"Retry-After": "5"}) from None
            except (TnlError, OSError) as error:
                what = error.what if isinstance(error, TnlError) else type(error).__name__
                message = f'the adapter "{name}" was refused: {what.replace(str(folder), name)}'
                raise ApiError(400, message, param="model", code="adapter_refused") from None
            return served

    def _held(self, name: str) -> Served | None:
        """An adapter that is in memory, held now."""
        served = self._loaded.get(name)
        if served is not None and served.adapter is not None:
            with suppress(KeyError):
                self.adapters.hold(served.adapter)
                return served
        return None

    def release(self, served: Served) -> None:
        """The request has been handed over, or has failed."""
        if served.adapter is not None:
            self.adapters.release(served.adapter)

    def unload(self, name: str) -> None:
        """Forget an adapter until it is asked for again. Raises ApiError: 404, 409 while it is in use, 400 for the base."""
        if name == self.base.name:
            raise ApiError(400, "the base cannot be unloaded", param="model")
        if name not in self.folders():
            raise unknown_model(name)
        served = self._loaded.get(name)
        if served is not None and served.adapter is not None:
            try:
                self.adapters.unload(served.adapter)
            except AdaptersBusy as error:
                raise ApiError(409, f'the adapter "{shown(name)}" is in use: {error}', param="model", code="adapter_in_use") from None
            del self._loaded[name]

    def _load(self, name: str, folder: Path) -> Served:
        metadata = read_adapter_metadata(folder)
        template = template_of(metadata, folder) or self.base.template
        if metadata.base is not None and metadata.base.tokenizer and self.tokenizer not in ("", metadata.base.tokenizer):
            raise TnlError(folder, "it was trained with another tokenizer")
        settings = Settings.of(metadata.generation) if metadata.generation else self.base.settings
        return Served(name, template, metadata.system, settings, self.adapters.load(folder, hold=True))
