import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tnl.errors import ModelError
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.load import load_model, load_tokenizer, pick_device
from tnl.model.modeling_transnormer import TransnormerForCausalLM

GOLDEN = Path(__file__).parents[1] / "golden"


def test_dtype_and_device() -> None:
    assert load_model(GOLDEN / "base", device="cpu").dtype == torch.float32
    assert load_model(GOLDEN / "base", dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    with pytest.raises(ModelError, match="names no device"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="no GPU"):
            pick_device("cuda")


def test_a_tokenizer_of_more_pieces_than_rows_is_refused(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "tokenizer", tmp_path, dirs_exist_ok=True)
    shutil.copy(GOLDEN / "base" / "config.json", tmp_path)
    with pytest.raises(ModelError, match="6000 pieces, the model rows for 160"):
        load_tokenizer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 6000}), encoding="utf-8")
    assert len(load_tokenizer(tmp_path)) == 6000


PEAK = """
import resource, sys, torch
from tnl.model import convert
from pathlib import Path
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for file in convert.weight_files(Path(sys.argv[1])):
    convert.headers(file)
for file in convert.weight_files(Path(sys.argv[1])):
    for _, tensor in convert.tensors(file):
        tensor.sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_reading_shards_holds_one_at_a_time(tmp_path: Path) -> None:
    """Three pickled shards of 128 MB each: the reader's memory stays near one of them."""
    config = TransnormerConfig(
        vocab_size=32, decoder_embed_dim=1024, decoder_layers=12, hidden_dim=1024, glu_dim=1024, decoder_attention_heads=8
    )
    state = TransnormerForCausalLM(config).state_dict()
    state.pop("lm_head.weight")
    names, parts = list(state), 3
    index = {}
    for i in range(parts):
        shard = {name: state[name] for name in names[i::parts]}
        torch.save(shard, tmp_path / f"pytorch_model-{i}.bin")
        index.update(dict.fromkeys(shard, f"pytorch_model-{i}.bin"))
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    largest = max(file.stat().st_size for file in tmp_path.glob("*.bin"))
    made = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(made.stdout) * 1024 < largest * 1.3 + 50e6
