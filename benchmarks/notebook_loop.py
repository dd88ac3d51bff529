"""The usual notebook way to fine-tune: every row padded to 512 tokens, and a plain loop of PyTorch over them.

    python benchmarks/notebook_loop.py --model FOLDER --rows rows/train.jsonl --times FILE --epochs 2

transformers, peft and bitsandbytes as in most tutorials: 4-bit base, LoRA on all linear layers, AdamW, batches drawn at
random, the padding masked out of the labels, no gradient checkpointing. Writes the same lines as benchmarks/timed.py.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from timed import peak_memory
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def tokenize(tokenizer, row: dict, max_length: int) -> dict[str, torch.Tensor]:
    """One row as input_ids, attention_mask and labels of exactly `max_length` tokens."""
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    tokens = tokenizer(
        text,
        padding="max_length",
        truncation=True,
        max_length=max_length,
        add_special_tokens=False,
        return_tensors="pt",
    )
    tokens = {name: tokens[name][0] for name in ("input_ids", "attention_mask")}
    return tokens | {"labels": tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True, help=".jsonl with a column `messages`")
    parser.add_argument("--times", type=Path, required=True, help="file to append a JSON line per step to")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    options = parser.parse_args()

    torch.manual_seed(42)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=quantization, dtype=torch.float32)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    model = get_peft_model(model, lora)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
    rows = [tokenize(tokenizer, row, options.max_length) for row in rows]
    loader = DataLoader(rows, batch_size=options.batch_size, shuffle=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.learning_rate)

    model.train()
    step = 0
    for _ in range(options.epochs):
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            with open(options.times, "a", encoding="utf-8") as file:
                line = {"step": step, "time": time.time(), "world_size": 1} | peak_memory()
                file.write(json.dumps(line) + "\n")
                file.write(json.dumps({"step": step, "loss": loss.item()}) + "\n")


if __name__ == "__main__":
    main()
