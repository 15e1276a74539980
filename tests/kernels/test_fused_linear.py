"""The fused projections against PEFT's forward and autograd, through a whole layer: outputs, and every gradient."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

pytest.importorskip("triton")
from tnl.kernels import dispatch
from tnl.kernels.reference import Rows
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import TransnormerForCausalLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(targets: list[str] | str = "all-linear", dropout: float = 0.0, **options: object) -> nn.Module:
    torch.manual_seed(0)
    config = TransnormerConfig(
        vocab_size=50, decoder_embed_dim=32, hidden_dim=32, decoder_attention_heads=2, decoder_layers=2, glu_dim=48,
        linear_use_lrpe_list=[1, 0], linear_act_fun="silu",
    )  # fmt: skip
    model = TransnormerForCausalLM(config)
    lora = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM", **options)  # type: ignore[arg-type]
    peft = get_peft_model(model, lora)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return peft.train()


def run(
    model: nn.Module, backend: str, keys: torch.Tensor | None, dtype: torch.dtype = torch.float32, **inputs: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = copy.deepcopy(model).to(DEVICE)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    model.base_model.model.model.pick_kernels(backend)
    out = model(dropout_keys=keys, use_cache=False, **inputs)
    weights = torch.linspace(-1, 1, out.logits.numel(), device=DEVICE).view_as(out.logits)
    (out.logits * weights).sum().backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def compare(model: nn.Module, keys: torch.Tensor | None, **inputs: torch.Tensor) -> None:
    logits, grads = run(model, "triton", keys, **inputs)
    expected, wanted = run(model, "reference", keys, **inputs)
    assert (logits - expected).norm() < 1e-5 * expected.norm()
    assert grads.keys() == wanted.keys() and grads
    for name, want in wanted.items():
        assert want is not None and want.norm() > 0, name
        assert (grads[name] - want).norm() < 2e-5 * want.norm(), name


def batch(T: int = 21) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 50, (1, T), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    positions = torch.cat([torch.arange(8), torch.arange(T - 8)])[None].to(DEVICE)
    return {"input_ids": ids, "position_ids": positions}


def keys_of(T: int = 21) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (1, T), dtype=torch.int32, generator=torch.Generator().manual_seed(2)).to(DEVICE)


@pytest.mark.parametrize("targets", ["all-linear", ["qkvu_proj"], ["l1", "l3"], ["out_proj", "l2"]])
def test_any_subset_of_modules(targets: list[str] | str) -> None:
    compare(make(targets), None, **batch())


def test_a_second_backward_pass_is_refused() -> None:
    """The GLU's halves have been written over: the gradients would be wrong without a word."""
    model = make().to(DEVICE)
    model.base_model.model.model.pick_kernels("triton")
    loss = model(dropout_keys=None, use_cache=False, **batch()).logits.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()


def test_the_same_masks_as_the_reference() -> None:
    compare(make(dropout=0.4), keys_of(), **batch())


@pytest.mark.gpu
def test_bfloat16_is_as_near_as_plain_bfloat16() -> None:
    model = make(dropout=0.4)
    _, exact = run(model, "reference", keys_of(), **batch())
    errors = {}
    for backend in ("triton", "reference"):
        _, grads = run(model, backend, keys_of(), torch.bfloat16, **batch())
        errors[backend] = max(((grads[name].float() - want).norm() / want.norm()).item() for name, want in exact.items())
    assert errors["triton"] < 1.5 * errors["reference"] < 0.1


def test_padded_rows() -> None:
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    compare(make(use_rslora=True), None, input_ids=ids, attention_mask=mask)


def glu_again(model: nn.Module) -> nn.Module:
    for layer in model.base_model.model.model.layers:
        layer.glu_again = True
    return model


def test_recomputed_layers_see_their_masks_again() -> None:
    model, twin = make(dropout=0.4), make(dropout=0.4)
    twin.base_model.model.model.gradient_checkpointing_enable({"use_reentrant": False})
    _, once = run(model, "triton", keys_of(), **batch())
    for other in (twin, glu_again(make(dropout=0.4)), glu_again(twin)):
        _, again = run(other, "triton", keys_of(), **batch())
        assert once and all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("targets", [["qkvu_proj"], ["l1", "l3"], ["l2", "l3"]])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_a_glu_computed_again_gives_the_same_bits(targets: list[str], options: dict[str, bool]) -> None:
    """DoRA leaves what it is on to PEFT's own forward: all of the GLU, or l3 alone."""
    _, once = run(make(targets, **options), "triton", None, **batch())
    _, again = run(glu_again(make(targets, **options)), "triton", None, **batch())
    assert once and all(torch.equal(once[name], again[name]) for name in once)


def test_options_outside_the_fast_path_run_as_peft_does() -> None:
    compare(make(["qkvu_proj", "l1"], use_dora=True), None, **batch())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("number", [0, 1], ids=["LRPE", "no LRPE"])
def test_neither_inputs_of_products_nor_masks_are_kept(number: int, again: bool, dropout: float) -> None:
    """Per layer: the residual stream twice, qkvu, the attention output, thin things, and the GLU's halves unless they are made again."""
    saved: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, nn.Parameter) and x.dim() > 1 and x.shape[-1] > 3:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model = make(dropout=dropout).to(DEVICE)
    model.base_model.model.model.pick_kernels("triton")
    assert isinstance(model.base_model.model.model.ops, dispatch.Ops)
    frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    layer, T = model.base_model.model.model.layers[number], 21
    x = torch.randn(1, T, 32, device=DEVICE, requires_grad=True)
    rows, layer.glu_again = Rows(torch.arange(T, device=DEVICE)[None], dropout_keys=keys_of(T)), again
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        layer(x, None, rows, model.base_model.model.model.ops)
    kept = sum(size for pointer, size in saved.items() if pointer not in frozen)
    wide = T * 4 * (2 * 32 + 4 * 32 + 32 + (0 if again else 2 * 48))
    assert wide <= kept <= wide * 1.02
