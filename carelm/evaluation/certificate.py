"""How far a merged model is from the adapter that it was made of, measured on real prompts."""

import dataclasses

import torch

from carelm.evaluation.candidates import Candidate
from carelm.evaluation.questions import Question
from carelm.models.generation import Decoding, generate_all
from carelm.models.key_values import causal_model

# The largest mean KL divergence (nats per token) that a merge may have. Where the merged weights are those that the adapter
# computes with, all that differs is the rounding of the dtype; else the weights (4 bits onto the base), or what is done with
# them (8 bits: LLM.int8 rounds the inputs too). The first is promised. The others leave room over what was measured: 2.4e-5
# and 3.7e-7 for bf16 and fp16, 3e-3 onto the base (the demo, benchmarks/results/merging.json), 1.4e-3 for 8 bits (drawn). For
# SmolLM2-135M, trained and computed in bf16 on a CPU, it was 2.9e-3 and 4.5e-3 (two runs), and 3.3e-3 in fp32: the answers of
# the adapter itself are rounded too.
ROUNDING = {"fp32": 1e-6, "bf16": 1e-2, "fp16": 1e-4}
OTHER_FUNCTION = {4: 2e-2, 8: 1e-2}
ANSWER_TOKENS = 32  # of each prompt's reference, over which the divergence is taken


@dataclasses.dataclass(frozen=True)
class Certificate:
    """How far a merged model is from its adapter, on the same prompts.

    Attributes:
        mean_kl: mean over tokens of KL(adapter || merged), in nats.
        max_kl: the largest of them.
        top1_agreement: share of tokens whose likeliest next token is the same.
        same_text_share: share of prompts with the same greedy answer.
    """

    prompts: int
    tokens: int
    mean_kl: float
    max_kl: float
    top1_agreement: float
    same_text_share: float


def tolerance(onto: str, bits: int | None, dtype: str, computed_in: str = "fp32") -> float:
    """The largest mean KL divergence of such a merge, in nats.

    Args:
        bits: how the adapter's base was held.
        dtype: of the merge.
        computed_in: the precision of the adapter's own answers here, which are rounded too.
    """
    rounding = max(ROUNDING[dtype], ROUNDING[computed_in])
    same_weights = bits is None or (onto == "quantized" and bits == 4)
    return rounding if same_weights else OTHER_FUNCTION[bits] + rounding


def certify(adapter: Candidate, merged: Candidate, questions: list[Question], max_new_tokens: int) -> Certificate:
    """Runs both models on the questions with their references, one model after the other, and compares them."""
    of_adapter, answers = _follow(adapter, questions, max_new_tokens)
    of_merged, other_answers = _follow(merged, questions, max_new_tokens)
    divergences, agreed = [], []
    for p, q in zip(of_adapter, of_merged):
        p, q = p.double(), q.double()
        divergences.append((p.exp() * (p - q)).sum(-1))
        agreed.append(p.argmax(-1) == q.argmax(-1))
    divergence, agreement = torch.cat(divergences), torch.cat(agreed)
    return Certificate(
        prompts=len(questions),
        tokens=len(divergence),
        mean_kl=max(0.0, float(divergence.mean())),
        max_kl=max(0.0, float(divergence.max())),
        top1_agreement=float(agreement.double().mean()),
        same_text_share=sum(a == b for a, b in zip(answers, other_answers)) / len(questions),
    )


@torch.no_grad()
def _follow(
    candidate: Candidate, questions: list[Question], max_new_tokens: int
) -> tuple[list[torch.Tensor], list[str]]:
    """Log-probabilities [tokens, vocabulary] at the reference of each question, and the model's own greedy answers."""
    chat = candidate.make_chat()
    model, _ = candidate.load(chat)
    device = next(model.parameters()).device
    rows, prompts = [], []
    for question in questions:
        ids = chat.prompt_ids(question.messages, tools=question.tools)
        answer = chat.tokenizer(question.references[0], add_special_tokens=False)["input_ids"][:ANSWER_TOKENS]
        if chat.is_encoder_decoder:
            start = causal_model(model).config.decoder_start_token_id
            read = {"input_ids": [ids], "decoder_input_ids": [[start, *answer]]}
        else:
            read = {"input_ids": [ids + answer]}
        logits = model(**{name: torch.tensor(rows, device=device) for name, rows in read.items()}).logits
        logits = logits[0, -len(answer) - 1 :]
        rows.append(logits.float().log_softmax(-1).cpu())
        prompts.append(ids)
    answers = [""] * len(prompts)
    generate_all(model, chat, prompts, Decoding(max_new_tokens), device=device, max_batch_tokens=8192,
                 done=lambda i, a: answers.__setitem__(i, a.text), show=candidate.name)  # fmt: skip
    return rows, answers
