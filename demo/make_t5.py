"""Train the tokenizer and the tiny T5 that the tests of encoder-decoders use, from the plain text of ``make_data.py``.

It has the shape of FLAN-T5 (gated feed-forward layers, an output layer of its own) in small, and has learnt by span corruption
alone (Raffel et al. 2020, section 3.3.4): with random weights no fine-tune of a few steps finds out that there is an encoder.
In every second row the span goes from the middle to the end (the "prefix language modelling" of section 3.2.1).

    python demo/make_t5.py              # writes demo/t5; stopped, the same command goes on

Measured on one of two busy cores: 700 steps in 733 s, loss 2.64 over the last 50.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import T5ForConditionalGeneration, T5Tokenizer

EXTRA_IDS = 48
PAD, END = 0, 1


def train_tokenizer(texts: list[str], vocabulary: int) -> T5Tokenizer:
    """A unigram model as SentencePiece trains it for T5, whose digits are tokens of their own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Tokenizer

    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Punctuation(),
    ])  # fmt: skip
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    pieces = [(piece, score) for piece, score in json.loads(trained.to_str())["model"]["vocab"]]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(EXTRA_IDS))]
    return T5Tokenizer(vocab=pieces, extra_ids=EXTRA_IDS, model_max_length=512)


def build_model(tokenizer: T5Tokenizer) -> T5ForConditionalGeneration:
    """The base with random weights."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_decoder_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0, decoder_start_token_id=PAD,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = type(model.lm_head.weight)(model.lm_head.weight.detach().clone())  # transformers 5 ties it
    model.lm_head.weight.data.normal_(std=config.d_model**-0.5)
    return model


def corrupt(row: list[int], share: float, first_mark: int, draws: random.Random) -> tuple[list[int], list[int]]:
    """A row with about `share` of its tokens taken out in spans of one to five (three on average), or all from its middle on,
    and what was taken out."""
    if draws.random() < 0.5:
        middle = draws.randint(len(row) // 4, len(row) // 2)
        return [*row[:middle], first_mark, END], [first_mark, *row[middle:], END]
    left: list[int] = []
    taken: list[int] = []
    at = marks = 0
    while at < len(row):
        if marks < EXTRA_IDS and draws.random() < share / (3 * (1 - share)):
            span = draws.randint(1, 5)
            left.append(first_mark - marks)
            taken += [first_mark - marks, *row[at : at + span]]
            at, marks = at + span, marks + 1
        if at < len(row):
            left.append(row[at])
            at += 1
    return [*left, END], [*taken, END]


def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
    import torch

    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def main(arguments: list[str] | None = None) -> int:
    """Train tokenizer and base and save both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).resolve().parent / "t5")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--corpus_characters", type=int, default=8_000_000, help="how much text is read")
    parser.add_argument("--length", type=int, default=64, help="tokens in a row")
    parser.add_argument("--batch_size", type=int, default=12, help="rows in a step")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--share", type=float, default=0.3, help="of the tokens that are taken out")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)

    import torch
    from tqdm import tqdm

    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import make_data

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    draws = random.Random(options.seed)
    tokenizer = train_tokenizer(list(make_data.corpus()), options.vocabulary)
    ids = [i for row in tokenizer(list(make_data.corpus(options.corpus_characters)))["input_ids"] for i in row[:-1]]
    rows = [ids[at : at + options.length] for at in range(0, len(ids) - options.length, options.length)]
    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    first_mark = tokenizer.convert_tokens_to_ids("<extra_id_0>")

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 60) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / options.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    started, recent, first, seconds = time.perf_counter(), [], 0, 0.0
    options.output_dir.mkdir(parents=True, exist_ok=True)
    state = options.output_dir / "pretraining.pt"
    if state.exists():
        *states, recent, first, seconds, drawn = torch.load(state, weights_only=False)
        for part, held in zip((model, optimizer, schedule), states):
            part.load_state_dict(held)
        draws.setstate(drawn)
    for step in (bar := tqdm(range(first, options.steps), desc="pretraining", mininterval=10)):
        pairs = [corrupt(row, options.share, first_mark, draws) for row in draws.sample(rows, options.batch_size)]
        inputs, labels = padded([left for left, _ in pairs], PAD), padded([taken for _, taken in pairs], -100)
        loss = model(input_ids=inputs, attention_mask=(inputs != PAD).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent = [*recent[-49:], loss.item()]
        bar.set_postfix({"loss": f"{sum(recent) / len(recent):.3f}"}, refresh=False)
        if (step + 1) % 25 == 0:
            states = [part.state_dict() for part in (model, optimizer, schedule)]
            so_far = seconds + time.perf_counter() - started
            torch.save((*states, recent, step + 1, so_far, draws.getstate()), state.with_suffix(".partial"))
            state.with_suffix(".partial").replace(state)

    state.unlink(missing_ok=True)
    model.to(torch.bfloat16).save_pretrained(options.output_dir)
    config = options.output_dir / "config.json"  # transformers 5 calls the output layer tied there, which it is not
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}, indent=2) + "\n")
    tokenizer.save_pretrained(options.output_dir)
    report = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": options.steps,
        "seconds": round(seconds + time.perf_counter() - started),
        "loss_of_the_last_50_steps": round(sum(recent) / len(recent), 3),
    }
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
