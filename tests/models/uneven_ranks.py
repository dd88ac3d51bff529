"""Three steps on two ranks that have 91 and 0, then 26 and 65 tokens to learn, in chunks of seven; prints the largest relative
difference from the losses of one process with whole logits, for each way to share a model and each way to train its head."""

import json
import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from carelm.models import adapters, loss
from carelm.recipe_file import load_recipe

WORDS = 97
WAYS = {
    "lora": ("lora", "--lora_target_modules", "q_proj", "v_proj"),
    "modules_to_save": ("lora", "--lora_target_modules", "q_proj", "v_proj", "--lora_modules_to_save", "lm_head"),
    "head under lora": ("lora", "--lora_target_modules", "q_proj", "v_proj", "lm_head"),
    "prompt_tuning": ("prompt_tuning",),
    "full": ("full",),
}


def build(method, *keys):
    torch.manual_seed(1)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=WORDS, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                    tie_word_embeddings=method == "full")
    )  # fmt: skip
    recipe = load_recipe(["--load_in_4bit", "false", "--method", method, *keys], usage="")
    model = base if method == "full" else adapters.add_adapter(base, recipe)
    return base, model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)


def batch(rows):
    ids = torch.randint(0, WORDS, (4, 40), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :3] = labels[1, 20:] = labels[2, 12:] = labels[3] = -100
    return {"input_ids": ids[rows], "labels": labels[rows], "num_items_in_batch": (labels != -100).sum().float()}


def main() -> None:
    deepspeed.init_distributed("gloo", verbose=False)
    loss.CHUNK_BYTES["cpu"] = 7 * 4 * WORDS
    rank = torch.distributed.get_rank()
    for name, way in WAYS.items():
        _, model, optimizer = build(*way)
        expected = []
        for _ in range(3):
            expected.append(model(**batch([0, 1, 2, 3])).loss)
            optimizer.zero_grad()
            expected[-1].backward()
            optimizer.step()
        for stage in (0, 2, 3):
            base, model, optimizer = build(*way)
            loss.use_chunked_loss(base, zero_stage=stage)
            if stage:
                config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
                          "zero_force_ds_cpu_optimizer": False, "gradient_clipping": 0.0,
                          "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}  # fmt: skip
                model = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
            else:
                model = DistributedDataParallel(model)
            own = []
            for step in range(3):
                value = model(**batch([[[0, 1, 2], [3]], [[3, 2], [1, 0]]][step % 2][rank])).loss
                own.append(value.detach().clone())
                torch.distributed.all_reduce(own[-1])
                if stage:
                    model.backward(2 * value)  # the ranks' gradients are averaged
                    model.step()
                else:
                    optimizer.zero_grad()
                    (2 * value).backward()
                    optimizer.step()
            if stage:
                model.destroy()
            if rank == 0:
                distance = max(float(abs(a / b - 1)) for a, b in zip(own, expected))
                print(json.dumps([name, stage, distance]), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
