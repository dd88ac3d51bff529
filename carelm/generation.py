"""Answers of a model to prompts: batched, greedy, left-padded."""

import torch

from carelm.chat import Chat


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    chat: Chat,
    prompts: list[list[dict]],
    *,
    device: torch.device,
    max_new_tokens: int,
    synced_gpus: bool = False,
) -> list[str]:
    """The model's greedy answers, in the order of the prompts.

    Args:
        model: a causal language model with or without adapter; its mode (train or eval) is restored.
        chat: renders the prompts as in training.
        prompts: lists of messages, each ending before the answer.
        device: where the model computes (its weights may lie elsewhere, under ZeRO with offload).
        max_new_tokens: longest answer in tokens.
        synced_gpus: True under ZeRO-3, where every rank must take part in every step.
    """
    if not prompts:
        return []
    ids = [torch.tensor(chat.prompt_ids(messages)) for messages in prompts]
    longest = max(len(i) for i in ids)
    pad_id = chat.tokenizer.pad_token_id
    input_ids = torch.full((len(ids), longest), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt_ids in enumerate(ids):
        input_ids[row, longest - len(prompt_ids) :] = prompt_ids
        attention_mask[row, longest - len(prompt_ids) :] = 1
    was_training = model.training
    model.eval()
    output = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        synced_gpus=synced_gpus,
    )
    model.train(was_training)
    return [text.strip() for text in chat.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)]
