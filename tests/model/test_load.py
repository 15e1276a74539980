import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tnl.errors import MemoryBudgetError, ModelError, RecipeError
from tnl.model import load
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.load import load_model, load_tokenizer, pick_device
from tnl.model.modeling_transnormer import TransnormerForCausalLM

GOLDEN = Path(__file__).parents[1] / "golden"


def test_dtype_and_device() -> None:
    assert load_model(GOLDEN / "base", device="cpu").dtype == torch.float32
    assert load_model(GOLDEN / "base", dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    with pytest.raises(RecipeError, match=r"^device gpu: is none"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match=r"^device cuda: there is no GPU"):
            pick_device("cuda")


def test_what_does_not_fit_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 where it fits a CPU's memory, else bfloat16, else an error with what is needed, before a weight is read."""
    weights = sum(parameter.numel() for parameter in load_model(GOLDEN / "base", device="cpu").parameters())
    monkeypatch.setattr(load, "free_memory", lambda device: 3 * weights)
    assert load_model(GOLDEN / "base", device="cpu").dtype == torch.bfloat16
    with pytest.raises(MemoryBudgetError, match=r"base: its weights take .* GiB in float32, and .* are free on cpu.*bfloat16 or a smaller"):
        load_model(GOLDEN / "base", device="cpu", dtype="float32")
    monkeypatch.setattr(load, "free_memory", lambda device: weights)
    with pytest.raises(MemoryBudgetError, match="in bfloat16"):
        load_model(GOLDEN / "base", device="cpu")


def test_a_tokenizer_of_more_pieces_than_rows_is_refused(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "tokenizer", tmp_path, dirs_exist_ok=True)
    shutil.copy(GOLDEN / "base" / "config.json", tmp_path)
    with pytest.raises(ModelError, match="6000 pieces, the model rows for 160"):
        load_tokenizer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 6000}), encoding="utf-8")
    assert len(load_tokenizer(tmp_path)) == 6000


PEAK = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from tnl.model import convert
from tnl.model.load import load_model
from tnl.train.callbacks import peak_memory
folder, how = Path(sys.argv[1]), sys.argv[2]
before = peak_memory()
if how == "read":
    for file in convert.weight_files(folder):
        convert.headers(file)
    for file in convert.weight_files(folder):
        for _, tensor in convert.tensors(file):
            tensor.sum()
else:
    model = load_model(folder, device="cpu", dtype=torch.float32)
print(peak_memory() - before)
"""


@pytest.fixture(scope="module")
def three_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 600 MB in three pickled shards."""
    folder = tmp_path_factory.mktemp("shards")
    sizes = {"vocab_size": 32, "decoder_embed_dim": 1024, "decoder_layers": 18, "hidden_dim": 1024, "glu_dim": 1024}
    config = TransnormerConfig(**sizes, decoder_attention_heads=8)
    config.save_pretrained(folder)
    state = TransnormerForCausalLM(config).state_dict()
    state.pop("lm_head.weight")
    names, parts = list(state), 3
    index = {}
    for i in range(parts):
        shard = {name: state[name] for name in names[i::parts]}
        torch.save(shard, folder / f"pytorch_model-{i}.bin")
        index.update(dict.fromkeys(shard, f"pytorch_model-{i}.bin"))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", ["read", "load"])
def test_loading_shards_holds_one_at_a_time(three_shards: Path, how: str) -> None:
    """Beside the model, which on a CPU lies in the host's memory too, there is one shard at a time."""
    sizes = [file.stat().st_size for file in three_shards.glob("*.bin")]
    made = subprocess.run([sys.executable, "-c", PEAK, str(three_shards), how], capture_output=True, text=True, check=True)
    model = 0 if how == "read" else sum(sizes)
    assert sum(sizes) > 550e6 and model * 0.9 < int(made.stdout) < model + max(sizes) * 1.15 + 50e6


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_mapped_weights_are_those_of_the_file(suffix: str, tmp_path: Path) -> None:
    """What needs no conversion takes no memory of the process, and is nobody else's to change."""
    whole = load_model(GOLDEN / "base", dtype="float32", device="cpu")
    whole.config.save_pretrained(tmp_path)
    file = tmp_path / ("model.safetensors" if suffix == "safetensors" else "pytorch_model.bin")
    state = {name: x.clone() for name, x in whole.state_dict().items() if name != "lm_head.weight"}
    _ = save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    before = file.read_bytes()
    model = load_model(tmp_path, dtype="float32", device="cpu", mapped=True)
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines() if str(file) in line]
    assert all(any(int(a, 16) <= p.data_ptr() < int(b, 16) for a, b in ranges) for p in model.parameters())
    with torch.no_grad():
        for p, value in zip(model.parameters(), whole.parameters()):
            assert torch.equal(p, value)
            p.zero_()
    assert file.read_bytes() == before
    converted = load_model(tmp_path, dtype="bfloat16", device="cpu", mapped=True)
    assert converted.dtype == torch.bfloat16 and bool(converted.get_input_embeddings().weight.any())
