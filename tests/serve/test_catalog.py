import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tnl.adapter.metadata import describe, write_metadata
from tnl.data.template import TEMPLATES
from tnl.generate.adapters import Adapters
from tnl.generate.sampling import Settings
from tnl.model.load import load_model
from tnl.serve.catalog import Catalog, Served
from tnl.serve.errors import ApiError


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return load_model(base, device="cpu")


@pytest.fixture
def root(tmp_path: Path, base: Path, adapters: Path) -> Path:
    """Adapters with a record of how they were taught."""
    for name, template in (("alpaca", "alpaca"), ("plain", "chatml")):
        folder = tmp_path / "root" / name
        shutil.copytree(adapters / "one", folder)
        generation = {"temperature": 0.3, "max_new_tokens": 9}
        write_metadata(folder, describe(folder, str(base), template=TEMPLATES[template], system="你是甄嬛。", generation=generation))
    return tmp_path / "root"


@pytest.fixture
def catalog(model: Any, root: Path) -> Catalog:
    return Catalog(Served("tiny", TEMPLATES["chatml"]), Adapters(model, capacity=1), root=root)


def test_each_is_asked_as_it_was_taught(catalog: Catalog) -> None:
    assert catalog.card("alpaca").system == "你是甄嬛。" and not catalog.card("alpaca").loaded
    served = asyncio.run(catalog.take("alpaca"))
    assert served.template.name == "alpaca" and served.system == "你是甄嬛。"
    assert served.settings == Settings(temperature=0.3, max_new_tokens=9)
    assert served.adapter is not None and catalog.adapters.users(served.adapter) == 1
    assert catalog.card("alpaca").loaded
    catalog.release(served)
    assert catalog.adapters.users(served.adapter) == 0
    assert asyncio.run(catalog.take("tiny")) is catalog.base


def test_all_places_in_use_is_429(catalog: Catalog, adapters: Path) -> None:
    shutil.copytree(adapters / "two", catalog.root / "two")  # type: ignore[operator]
    served = asyncio.run(catalog.take("alpaca"))
    with pytest.raises(ApiError, match="no place for another adapter") as refused:
        asyncio.run(catalog.take("two"))
    assert refused.value.status == 429 and refused.value.headers["Retry-After"] == "5"
    catalog.release(served)
    other = asyncio.run(catalog.take("two"))
    assert not catalog.card("alpaca").loaded and catalog.card("two").loaded
    catalog.release(other)


@pytest.mark.parametrize("damage", ["template", "base", "json", "weights", "tokenizer"])
def test_one_that_does_not_belong_is_refused_without_a_path(catalog: Catalog, root: Path, damage: str) -> None:
    file = root / "plain" / "tnl.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    match damage:
        case "template":
            values["template_hash"] = "0" * 64
        case "base":
            values["base"]["config"]["decoder_layers"] = 9
        case "tokenizer":
            catalog.tokenizer = "f" * 64
        case "weights":
            (root / "plain" / "adapter_model.safetensors").unlink()
    file.write_text("{" if damage == "json" else json.dumps(values), encoding="utf-8")
    with pytest.raises(ApiError) as refused:
        asyncio.run(catalog.take("plain"))
    assert refused.value.status == 400 and refused.value.code == "adapter_refused" and str(root) not in refused.value.message
    assert catalog.adapters.keys == [] and catalog.card("plain").id == "plain"
    catalog.release(asyncio.run(catalog.take("alpaca")) if damage != "tokenizer" else catalog.base)


def test_the_base_hides_an_adapter_of_its_name(catalog: Catalog, root: Path) -> None:
    (root / "plain").rename(root / "tiny")
    assert list(catalog.folders()) == ["alpaca"] and [card.id for card in catalog.cards()] == ["tiny", "alpaca"]
    catalog.base = replace(catalog.base, name="another")
    assert list(catalog.folders()) == ["alpaca", "tiny"]
