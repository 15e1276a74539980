"""The code of the tutorial, cell by cell as it stands there, and the edits that make it run.

The tutorial is `TransNormerLLM-7B Lora 微调`; its prose is not repeated here. Every edit is one line with its reason, and the
list in README.md ("What to change in the tutorial") is this list: tests/journeys/test_tutorial.py holds the two together.
"""

from typing import NamedTuple

CELLS = {
    "prompt": r"""
def process_func(example):
    MAX_LENGTH = 384
    input_ids, attention_mask, labels = [], [], []
    instruction = tokenizer(f"<|im_start|>system\n现在你要扮演皇帝身边的女人--甄嬛<|im_end|>\n<|im_start|>user\n{example['instruction'] + example['input']}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    response = tokenizer(f"{example['output']}", add_special_tokens=False)
    input_ids = instruction["input_ids"] + response["input_ids"] + [tokenizer.pad_token_id]
    attention_mask = instruction["attention_mask"] + response["attention_mask"] + [1]
    labels = [-100] * len(instruction["input_ids"]) + response["input_ids"] + [tokenizer.pad_token_id]
    if len(input_ids) > MAX_LENGTH:
        input_ids = input_ids[:MAX_LENGTH]
        attention_mask = attention_mask[:MAX_LENGTH]
        labels = labels[:MAX_LENGTH]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels
    }
""",
    "load": r"""
tokenizer = AutoTokenizer.from_pretrained('/root/autodl-tmp/OpenNLPLab/TransNormerLLM-7B/', use_fast=False, trust_remote_code=True, trust_remote_code=True)

model = AutoModelForCausalLM.from_pretrained('/root/autodl-tmp/OpenNLPLab/TransNormerLLM-7B/', trust_remote_code=True, device_map="auto",torch_dtype=torch.bfloat16)
""",
    "lora": r"""
config = LoraConfig(
    task_type=TaskType.CAUSAL_LM,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    inference_mode=False,
    r=8,
    lora_alpha=32,
    lora_dropout=0.1
)
""",
    "arguments": r"""
args = TrainingArguments(
    output_dir="./output/TransNormerLLM-7B-Lora",
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    logging_steps=10,
    num_train_epochs=3,
    save_steps=100,
    learning_rate=1e-4,
    save_on_each_node=True,
    gradient_checkpointing=True
)
""",
    "train": r"""
trainer = Trainer(
    model=model,
    args=args,
    train_dataset=tokenized_id,
    data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True),
)
trainer.train()
""",
    "chat": r"""
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch
from peft import PeftModel

mode_path = '/root/autodl-tmp/OpenNLPLab/TransNormerLLM-7B/'
lora_path = './output/DeepSeek'

tokenizer = AutoTokenizer.from_pretrained(mode_path)

model = AutoModelForCausalLM.from_pretrained(mode_path, device_map="auto",torch_dtype=torch.bfloat16)

model = PeftModel.from_pretrained(model, model_id=lora_path, config=config)

prompt = "你是谁？"
messages = [
    {"role": "system", "content": "现在你要扮演皇帝身边的女人--甄嬛"},
    {"role": "user", "content": prompt}
]

text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

model_inputs = tokenizer([text], return_tensors="pt").to('cuda')

generated_ids = model.generate(
    model_inputs.input_ids,
    max_new_tokens=512
)
generated_ids = [
    output_ids[len(input_ids):] for input_ids, output_ids in zip(model_inputs.input_ids, generated_ids)
]

response = tokenizer.batch_decode(generated_ids, skip_special_tokens=True)[0]

print(response)
""",
}


class Edit(NamedTuple):
    """One change: `old` (empty: put `new` first in the cell) becomes `new`, wherever it stands in the cell."""

    cell: str
    old: str
    new: str
    reason: str


EDITS = [
    Edit(
        "load",
        "",
        "import tnl.model",
        "teaches transformers the model: no remote code, no triton 2.0.0",
    ),
    Edit(
        "load",
        ", trust_remote_code=True, trust_remote_code=True",
        "",
        "one keyword given twice is a syntax error, and no remote code is needed",
    ),
    Edit(
        "prompt",
        "[tokenizer.pad_token_id]",
        "[tokenizer.eos_token_id]",
        "an answer ends in `</s>`; the padding token teaches the model never to stop",
    ),
    Edit(
        "prompt",
        "input_ids = input_ids[:MAX_LENGTH]",
        "input_ids = input_ids[:MAX_LENGTH - 1] + [tokenizer.eos_token_id]",
        "cutting a long record must not cut its end token off",
    ),
    Edit(
        "prompt",
        "labels = labels[:MAX_LENGTH]",
        "labels = labels[:MAX_LENGTH - 1] + [tokenizer.eos_token_id]",
        "and the end token stays a label",
    ),
    Edit(
        "lora",
        '["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]',
        '["qkvu_proj", "out_proj", "l1", "l2", "l3"]',
        "those are LLaMA's names; these are this model's",
    ),
    Edit(
        "train",
        "",
        "model = get_peft_model(model, config)",
        "the text forgets to attach the adapter",
    ),
    Edit(
        "train",
        "trainer.train()",
        "trainer.train(); trainer.save_model()",
        "a short run ends before its first checkpoint",
    ),
    Edit(
        "chat",
        "./output/DeepSeek",
        "./output/TransNormerLLM-7B-Lora",
        "the folder that was trained into",
    ),
    Edit(
        "chat",
        ", config=config",
        "",
        "the adapter brings its own config",
    ),
    Edit(
        "chat",
        "tokenizer([text], return_tensors=\"pt\").to('cuda')",
        'tokenizer([text], add_special_tokens=False, return_tensors="pt").to(model.device)',
        "the prompt as it was trained, without `<s>`, and on whatever device there is",
    ),
]

MODEL_PATH = "/root/autodl-tmp/OpenNLPLab/TransNormerLLM-7B/"
BEFORE_THE_FIRST_CELL = """
import json
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
"""
"""What the tutorial's notebook imports and its text leaves out."""

LEARNED = """
def loss_of(record):
    batch = {name: torch.tensor([record[name]], device=model.device) for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        return model(**batch).loss.item()
model.eval()
with_adapter = sum(loss_of(record) for record in tokenized_id[:3])
with model.disable_adapter():
    without = sum(loss_of(record) for record in tokenized_id[:3])
assert with_adapter < 0.95 * without, f"the adapter that was loaded has learned nothing: {with_adapter} of {without}"
"""
"""A last cell, of the tests alone: what was saved, loaded anew, knows the records better than the base does."""


def edited(cell: str) -> str:
    """The cell with its edits; an edit that finds nothing to change is an error."""
    code = CELLS[cell]
    for edit in EDITS:
        if edit.cell != cell:
            continue
        if edit.old and edit.old not in code:
            raise AssertionError(f"the cell {cell} does not hold {edit.old!r}")
        code = code.replace(edit.old, edit.new) if edit.old else f"{edit.new}\n{code}"
    return code
