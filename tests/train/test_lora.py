"""LoRA goes where the recipe says, or the recipe is refused with the model's own names."""

import time

import pytest
import torch
from peft import PeftModel

from tnl.errors import ModelError, RecipeError
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.recipe.sections import LoraSection
from tnl.train import lora

OWN = {"qkvu_proj", "out_proj", "l1", "l2", "l3"}


def tiny(dtype: torch.dtype = torch.float32, **changes: object) -> TransnormerForCausalLM:
    sizes = {"vocab_size": 40, "decoder_embed_dim": 16, "hidden_dim": 16, "decoder_layers": 3, "decoder_attention_heads": 2, "glu_dim": 24}
    return TransnormerForCausalLM(TransnormerConfig(**{**sizes, **changes})).to(dtype)


def attach(**fields: object) -> tuple[PeftModel, list[str]]:
    lines: list[str] = []
    model = lora.attach(tiny(), LoraSection(**{"r": 2, **fields}), "recipe.yaml", 1, lines.append)
    assert isinstance(model, PeftModel)
    return model, lines


def targets(model: PeftModel) -> set[str]:
    return set(model.peft_config["default"].target_modules)


def test_all_linear_takes_every_layer_but_the_head() -> None:
    model, lines = attach()
    assert targets(model) == OWN and not lines
    rows = {row.name: row for row in lora.table(model)}
    assert set(rows) == OWN and all(row.layers == 3 for row in rows.values())
    assert rows["qkvu_proj"].parameters == 3 * 2 * (16 + 64)
    assert sum(row.parameters for row in rows.values()) == lora.count_parameters(model)[0]


def test_llamas_names_are_translated_with_one_line() -> None:
    model, lines = attach(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    assert targets(model) == OWN
    assert len(lines) == 1 and "q_proj -> qkvu_proj" in lines[0] and "down_proj -> l3" in lines[0]


def test_a_pattern_becomes_a_list() -> None:
    assert targets(attach(target_modules=r".*\.(qkvu_proj|l3)")[0]) == {"qkvu_proj", "l3"}
    partial = attach(target_modules=r"model\.layers\.[01]\..*\.qkvu_proj")[0]
    assert targets(partial) == {f"model.layers.{i}.token_mixer.qkvu_proj" for i in (0, 1)}
    assert {row.name: row.layers for row in lora.table(partial)} == {"qkvu_proj": 2}


def test_a_plain_word_means_the_name() -> None:
    assert targets(attach(target_modules="l1")[0]) == {"l1"}
    assert targets(attach(target_modules="q_proj, o_proj,l1")[0]) == {"qkvu_proj", "out_proj", "l1"}


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (["qkvu_proj", "query"], ['"query"', "qkvu_proj x3", "l3 x3", "all-linear"]),
        (["out_porj"], ['"out_porj"', "Did you mean out_proj?"]),
        ("l1,l9", ['"l9"', "l1 x3"]),
        (r".*\.nothing", ["matches no module", "l1 x3"]),
        ("(", ["not a regular expression"]),
        (["token_mixer"], ['"token_mixer"']),
    ],
)
def test_a_name_that_fits_nothing_is_refused(wanted: object, words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        attach(target_modules=wanted)
    assert "recipe.yaml:lora.target_modules" in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_pattern_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tnl.train.targets.SECONDS_FOR_A_PATTERN", 0.5)
    start = time.monotonic()
    with pytest.raises(ModelError, match="took more than"):
        attach(target_modules=r"(.*.*.*.*.*.*.*.*.*.*)*x(.+.+.+)+!")
    assert time.monotonic() - start < 5


def test_layers_exclusions_and_ranks() -> None:
    model, _ = attach(target_modules="all-linear", exclude_modules=["l3"], layers_to_transform=[0, 2], rank_pattern={"qkvu_proj": 5})
    assert {row.name: row.layers for row in lora.table(model)} == {"qkvu_proj": 2, "out_proj": 2, "l1": 2, "l2": 2}
    ranks = {p.shape[0] for name, p in model.named_parameters() if "qkvu_proj.lora_A" in name}
    assert ranks == {5}
    with pytest.raises(ModelError, match="no layer 7"):
        attach(layers_to_transform=7)
    with pytest.raises(ModelError, match="matches no adapted module"):
        attach(target_modules=["l1"], alpha_pattern={"l2": 3})
    with pytest.raises(RecipeError, match="positive integer"):
        attach(rank_pattern={"l2": "x"})


def test_fields_reach_peft() -> None:
    model, _ = attach(use_dora=True, use_rslora=True, lora_alpha=4, init_lora_weights="gaussian", modules_to_save=["lm_head"])
    config = model.peft_config["default"]
    assert config.use_dora and config.use_rslora and config.lora_alpha == 4 and config.modules_to_save == ["lm_head"]
    assert any("lora_magnitude_vector" in name for name, _ in lora.trainable(model))
    assert "lm_head" in {row.name for row in lora.table(model)}
    with pytest.raises(ModelError, match=r"lora\.modules_to_save"):
        attach(modules_to_save=["lm_haed"])


@pytest.mark.parametrize(
    "fields", [{"auto_mapping": {"a": "b"}}, {"task_type": "SEQ_CLS"}, {"init_lora_weights": "pissa"}, {"inference_mode": True}]
)
def test_a_field_that_cannot_act_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(RecipeError) as caught:
        attach(**fields)
    assert f"recipe.yaml:lora.{next(iter(fields))}" in str(caught.value)


def test_adapters_are_float32_on_a_bfloat16_base_and_start_from_the_seed() -> None:
    pair = [lora.attach(tiny(torch.bfloat16), LoraSection(r=2), "r", 7, print) for _ in range(2)]
    for (name, a), (_, b) in zip(lora.trainable(pair[0]), lora.trainable(pair[1])):
        assert a.dtype == torch.float32 and torch.equal(a, b), name
    other = lora.attach(tiny(), LoraSection(r=2), "r", 8, print)
    name = lora.adapter_matrices(other)[0]
    assert not torch.equal(dict(lora.trainable(other))[name], dict(lora.trainable(pair[0]))[name])


def test_without_lora_everything_is_trained() -> None:
    model = lora.attach(tiny(), None, "r", 1, print)
    assert not lora.is_adapted(model) and all(p.requires_grad for p in model.parameters())
    assert lora.count_parameters(model)[0] == lora.count_parameters(model)[1]


def test_attaches_to_a_model_without_weights() -> None:
    with torch.device("meta"):
        model = lora.attach(tiny(), LoraSection(), "r", 1, print)
    assert all(p.is_meta for _, p in lora.trainable(model)) and len(lora.table(model)) == 5
