"""Runs train/sft.py and, from inside its ranks, writes down what only they can see.

The loss is taken in chunks of 16 tokens, so that the ranks of a step have unlike numbers of them.

Into $PROBE: rank-R.json with the bytes of the 4-bit base that rank R holds under ZeRO-3, and logits.safetensors with
the final logits on fixed tokens.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch
import transformers.trainer
from safetensors.torch import save_file

from carelm.models import loss

TOKENS = torch.arange(40, 72).reshape(2, 16)


class Probe(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        base = [p for p in model.parameters() if p.dtype == torch.uint8 or type(p).__name__ == "Params4bit"]
        held = {
            "resident": sum(p.data.numel() * p.data.element_size() for p in base)
            + sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in base if hasattr(p, "ds_tensor")),
            "whole": sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in base),
            "persistent": sum(p.ds_numel * p.element_size() for p in base if getattr(p, "ds_persist", False)),
        }
        (Path(os.environ["PROBE"]) / f"rank-{args.process_index}.json").write_text(json.dumps(held))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=TOKENS).logits.float().contiguous()
        if args.process_index == 0:
            save_file({"logits": logits}, Path(os.environ["PROBE"]) / "logits.safetensors")


if __name__ == "__main__":
    transformers.trainer.DEFAULT_CALLBACKS.append(Probe)
    loss.CHUNK_BYTES["cpu"] = 16 * 4 * 2048
    sys.argv[0] = "train/sft.py"
    sys.path.insert(0, "train")
    runpy.run_path("train/sft.py", run_name="__main__")
