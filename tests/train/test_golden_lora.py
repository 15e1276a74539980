"""golden/lora through the real Trainer path, by the definition and by the fused, packed, graphed step (Triton in its interpreter where
there is no card): ten losses and gradient norms, the adapter they end in, its logits, merged or not.
"""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tnl.model.load import load_model
from tnl.recipe.sections import LoraSection, TrainSection
from tnl.run_dir import RunDir
from tnl.train import arguments, checkpoint, lora
from tnl.train.graphed import Graphed
from tnl.train.paths_taken import why_eager
from tnl.train.step import Rows, step
from tnl.train.trainer import TnlTrainer

torch.set_num_threads(1)
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "lora"
EXPECTED = load_file(GOLDEN / "expected.safetensors")
STEPS, MICRO = 10, 2


def records() -> list[dict[str, object]]:
    found = []
    for number in range(STEPS):
        for micro in range(MICRO):
            ids, labels = (EXPECTED[f"step{number}.micro{micro}.{name}"] for name in ("input_ids", "labels"))
            for row in range(ids.shape[0]):
                name = f"step {number} micro {micro} row {row}"
                found.append({"id": name, "input_ids": ids[row].tolist(), "labels": labels[row].tolist()})
    return found


def train(run: Path, rows: Rows, backend: str = "reference") -> tuple[TnlTrainer, list[dict[str, float]]]:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    model = load_model(GOLDEN, dtype="float32", device=device, backend=backend)
    model = lora.attach(model, LoraSection(r=8, lora_alpha=32, lora_dropout=0.0), "golden", 0, print)
    checkpoint.load_weights(model, GOLDEN / "adapter-initial")
    section = TrainSection(
        per_device_train_batch_size=3,
        gradient_accumulation_steps=MICRO,
        max_steps=STEPS,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        use_cpu=device == "cpu",
    )
    args, settings = arguments.build(section, "golden", run, torch.device(device), measured=False)
    trainer = TnlTrainer(model, args, settings, rows, records(), [])
    if backend == "triton":
        trainer.graphed = Graphed(model)
        assert why_eager(model, rows, trainer.engine, True) == ("" if device == "cuda" else "there is no GPU")
    trainer.train()
    return trainer, [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    ("rows", "backend"),
    [
        pytest.param(Rows(10_000), "reference", id="one row"),
        pytest.param(Rows(60), "reference", id="rows of 60"),
        pytest.param(Rows(10_000, multiple=64), "triton", id="fused, packed, graphed", marks=[pytest.mark.slow, pytest.mark.gpu]),
    ],
)
def test_ten_losses_and_gradient_norms(tmp_path: Path, rows: Rows, backend: str) -> None:
    trainer, log = train(tmp_path, rows, backend)
    assert [line["loss"] for line in log] == pytest.approx(EXPECTED["losses"].tolist(), abs=1e-4)
    assert [line["grad_norm"] for line in log] == pytest.approx(EXPECTED["grad_norms"].tolist(), abs=1e-4)
    model = trainer.model
    final = load_file(GOLDEN / "adapter-final" / "adapter_model.safetensors")
    mine = checkpoint.trained_weights(model)
    assert mine.keys() == final.keys()
    # AdamW divides a gradient by its own size: one that is almost nothing moves a weight by its rounding (lr 2e-3, 10 steps)
    bound = 1e-4 if backend == "reference" else 5e-4
    for name in final:
        torch.testing.assert_close(mine[name].cpu(), final[name], atol=bound, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    ids = EXPECTED["step0.micro0.input_ids"].to(model.device)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits.cpu(), EXPECTED["final_logits"], atol=1e-4, rtol=0)
        merged = model.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(merged(input_ids=ids).logits.cpu(), EXPECTED["merged_logits"], atol=1e-4, rtol=0)


def test_the_first_gradients() -> None:
    """The recorded ones are as they were after clipping to 1."""
    model = load_model(GOLDEN, dtype="float32", device="cpu")
    model = lora.attach(model, LoraSection(r=8, lora_alpha=32, lora_dropout=0.0), "golden", 0, print)
    checkpoint.load_weights(model, GOLDEN / "adapter-initial")
    step(model.train(), records()[: 3 * MICRO], Rows(10_000))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    wanted = {name.removeprefix("step0.grad."): value for name, value in EXPECTED.items() if name.startswith("step0.grad.")}
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(grads[name], wanted[name], atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_what_is_saved_loads_in_plain_peft(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path / "run", Rows(10_000))
    folder = tmp_path / "adapter"
    folder.mkdir()
    checkpoint.save_weights(trainer.model, folder, base=str(GOLDEN))
    plain = PeftModel.from_pretrained(load_model(GOLDEN, dtype="float32", device="cpu"), folder)
    ids = EXPECTED["step0.micro0.input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(input_ids=ids).logits, EXPECTED["final_logits"], atol=1e-4, rtol=0)
    assert RunDir(tmp_path / "run").read_metadata() == {}
