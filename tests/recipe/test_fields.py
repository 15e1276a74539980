"""The generated table is that of the installed peft and transformers."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tnl.recipe import fields, sections

ROOT = Path(__file__).resolve().parents[2]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_fields", ROOT / "scripts/generate_fields.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_is_what_the_script_writes() -> None:
    assert generator().generate() == (ROOT / "tnl/recipe/fields.py").read_text(encoding="utf-8")


def test_every_field_of_both_libraries_stands_in_it() -> None:
    from dataclasses import fields as fields_of

    from peft import LoraConfig
    from transformers import TrainingArguments

    assert list(fields.LoraFields.model_fields) == [field.name for field in fields_of(LoraConfig) if field.init]
    assert list(fields.TrainingFields.model_fields) == [field.name for field in fields_of(TrainingArguments) if field.init]


def test_our_defaults_are_taken_by_the_libraries(tmp_path: Path) -> None:
    from peft import LoraConfig
    from transformers import TrainingArguments

    LoraConfig(**sections.LoraSection().arguments())
    given = sections.TrainSection(output_dir=str(tmp_path)).arguments()
    given["activation_checkpointing"] = given.pop("gradient_checkpointing")  # its name since transformers 5.20
    for name in sections.NOT_TRANSFORMERS:
        del given[name]
    TrainingArguments(**{**given, "eval_steps": given["save_steps"]})


def test_the_checks_of_the_libraries_are_ours() -> None:
    """A type that the library would refuse late is refused at once."""
    with pytest.raises(ValueError, match="lr_scheduler_type"):
        sections.TrainSection(lr_scheduler_type="cosin")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="neftune_noise_alpha"):
        sections.TrainSection(neftune_noise_alpha="5")  # type: ignore[arg-type]


def test_it_needs_no_torch() -> None:
    code = "import sys; import tnl.recipe.fields; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'peft')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
