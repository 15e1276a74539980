from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tnl.kernels import dispatch
from tnl.model.modeling_transnormer import TransnormerForCausalLM


def test_auto_and_reference_give_the_five_ops() -> None:
    assert dispatch.ops("reference").backend == "reference"
    assert all(callable(op) for op in dispatch.ops("auto")[1:])


def test_a_name_that_is_no_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match='no backend is called "cuda"'):
        dispatch.ops("cuda")


def test_triton_is_asked_for_where_it_runs() -> None:
    assert dispatch.ops("triton").backend == "triton"
    assert dispatch.ops("auto").backend == "reference"
    with pytest.raises(ValueError, match="key dims up to 256"):
        dispatch.ops("triton", head_dim=512)
    with pytest.raises(ValueError, match="the model is float64"):
        dispatch.ops("triton", dtype=torch.float64)


def test_auto_is_triton_on_a_card_and_says_why_where_it_cannot_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert dispatch.ops("auto", "cuda").backend == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    assert dispatch.ops("auto", "cuda").backend == "reference"
    assert "Tesla V100 is older than compute capability 8.0" in caplog.text


def test_without_interpreter_or_card_triton_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="they need a GPU"):
        dispatch.ops("triton", "cpu")


GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize(
    "folder", ("base", pytest.param("left-pad", marks=pytest.mark.slow), pytest.param("bias-elu", marks=pytest.mark.slow))
)
def test_the_golden_folders_pass_with_the_triton_kernels(folder: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = TransnormerForCausalLM.from_pretrained(GOLDEN / folder, backend="triton", device_map=device)
    assert model.backend == "triton"
    expected = load_file(GOLDEN / folder / "expected.safetensors", device=device)
    mask = expected["attention_mask"]
    out = model(expected["input_ids"], attention_mask=mask, labels=expected["labels"])
    assert (out.logits - expected["train_logits"])[mask.bool()].abs().max() < 1e-4
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad - expected[f"grad.{name}"]).abs().max() < 1e-4, name
    with torch.no_grad():
        prefilled = model(expected["input_ids"], attention_mask=mask, use_cache=True)
        for i, state in enumerate(prefilled.past_key_values.states):
            assert (state - expected[f"state.{i}"])[mask.bool().all(1)].abs().max() < 1e-4
        stepped = model(expected["input_ids"][:, :1], past_key_values=prefilled.past_key_values).logits
        reference = TransnormerForCausalLM.from_pretrained(GOLDEN / folder, backend="reference", device_map=device)
        cache = reference(expected["input_ids"], attention_mask=mask, use_cache=True).past_key_values
        assert (stepped - reference(expected["input_ids"][:, :1], past_key_values=cache).logits).abs().max() < 1e-4
