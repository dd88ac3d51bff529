"""Encoder-decoders: their loss, their answers, their output layer and precision; no training."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from carelm.chat.chat import make_chat
from carelm.errors import UserError
from carelm.evaluation.candidates import find
from carelm.models import adapters, base, merge
from carelm.models.decoding import Decoding
from carelm.models.generation import generate
from carelm.models.likelihood import score_answers
from carelm.models.precision import Precision, choose_precision
from carelm.recipe_file import load_recipe, save_recipe
from carelm.training.batches import BLANK, Collate, Rows

FP32, CPU = Precision("fp32", "test"), torch.device("cpu")
QUESTIONS = ["Where is my order HP-57447?", "I lost my card.", "When is the shop open on Saturday? I want to come by."]
METHODS = (("full",), ("lora",), ("prompt_tuning", "--num_virtual_tokens", "6"))


@pytest.fixture(scope="module")
def bases(base, tmp_path_factory):
    """The project's tiny T5, and a BART of drawn weights with the demo's tokenizer, which keeps blanks and newlines."""
    bart = tmp_path_factory.mktemp("bart")
    torch.manual_seed(0)
    BartForConditionalGeneration(BartConfig(
        vocab_size=2048, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, init_std=0.3,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128, dropout=0.0,
        bos_token_id=0, pad_token_id=2, eos_token_id=5, decoder_start_token_id=5, forced_eos_token_id=None,
    )).save_pretrained(bart)  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, bart / name)
    return {"t5": base.parent / "t5", "bart": bart}


def load(folder, method="full", *keys, bits="false"):
    words = ("--model_name_or_path", folder, "--load_in_4bit", bits, "--max_length", 64, "--method", method, *keys)
    recipe = load_recipe([*map(str, words)], usage="")
    chat = make_chat(recipe)
    adapters.check_base(recipe)
    return recipe, chat, adapters.load_model(recipe, chat, FP32).eval()


def rows(chat):
    """Three examples in tokens, and one with nothing to learn, as a rank may have it."""
    asked = [[{"role": "user", "content": text}] for text in QUESTIONS]
    told = ["It is late.", "A new card is on its way, free of charge.", "Until 19."]
    ids = [(chat.prompt_ids(q), chat.answer_ids(q, {"role": "assistant", "content": a})) for q, a in zip(asked, told)]
    split = [(np_of(q + a), np_of([False] * len(q) + [True] * len(a))) for q, a in ids]
    return [*split, Rows(split)[BLANK]]


def np_of(values):
    return torch.tensor(values).numpy()


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m[0])
def test_the_loss_is_a_sum_over_the_step_however_its_rows_are_batched(bases, kind, method):
    """Their own is a mean over each micro-batch, whatever num_items_in_batch says."""
    _, chat, model = load(bases[kind], *method)
    examples, collate, one = rows(chat), Collate(chat.tokenizer.pad_token_id, 1, True), torch.ones(())
    with torch.no_grad():
        whole, halves, single = (
            float(sum(model(**collate(examples[i : i + n]), num_items_in_batch=one).loss for i in range(0, 4, n)))
            for n in (4, 2, 1)
        )
    assert whole > 50
    assert halves == pytest.approx(whole, rel=1e-5) and single == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_decoder_inputs_are_the_labels_behind_the_start_token_as_the_model_itself_shifts_them(bases, kind):
    _, chat, model = load(bases[kind])
    batch = Collate(chat.tokenizer.pad_token_id, 8, True)(rows(chat))
    assert {part.shape[1] % 8 for part in batch.values()} == {0}
    own = AutoModelForSeq2SeqLM.from_pretrained(bases[kind], dtype=torch.float32).eval()
    with torch.no_grad():
        assert float(model(**batch).loss) == pytest.approx(float(own(**batch).loss), rel=1e-5)


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("method", METHODS[1:], ids=lambda m: m[0])
def test_an_answer_does_not_depend_on_the_prompts_beside_it(bases, kind, method):
    """BART has learnt its positions: padded on the left, a short text would begin at another one."""
    _, chat, model = load(bases[kind], *method)
    shake(model)
    prompts = [chat.prompt_ids([{"role": "user", "content": text}]) for text in QUESTIONS]
    for decoding in (Decoding(12), Decoding(12, temperature=1.0, seed=4)):
        together = generate(model, chat, prompts, decoding, device=CPU)
        assert together == [generate(model, chat, [prompt], decoding, device=CPU)[0] for prompt in prompts]
    assert len({answer.ids for answer in together}) == len(prompts)


def test_a_trained_prompt_answers_into_a_streamer_that_cannot_be_copied(bases):
    class Heard(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            pass

        def __deepcopy__(self, memo):
            raise AssertionError("PEFT's generate does this")

    _, chat, model = load(bases["t5"], *METHODS[2])
    prompt, heard = chat.prompt_ids([{"role": "user", "content": QUESTIONS[0]}]), Heard()
    answer = generate(model, chat, [prompt], Decoding(8), device=CPU, streamer=heard)[0]
    assert tuple(heard.tokens) == (model.config.decoder_start_token_id, *answer.ids)
    ids = torch.tensor([prompt])
    theirs = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert tuple(theirs[0, 1:].tolist()) == answer.ids


@pytest.mark.parametrize("method", METHODS[1:], ids=lambda m: m[0])
def test_answers_are_scored_by_the_decoder_whatever_stands_beside_them(bases, method):
    _, chat, model = load(bases["t5"], *method)
    shake(model)
    asked = [[{"role": "user", "content": text}] for text in QUESTIONS]
    prompts = [chat.prompt_ids(q) for q in asked]
    answers = [
        [chat.answer_ids(q, {"role": "assistant", "content": a}) for a in ("late", "It is late.")] for q in asked
    ]
    scores = {}
    score_answers(model, prompts, answers, device=CPU, max_batch_tokens=4096, done=scores.__setitem__)
    collate = Collate(chat.tokenizer.pad_token_id, 1, True)
    for i, (prompt, several) in enumerate(zip(prompts, answers)):
        for ids, score in zip(several, scores[i]):
            row = np_of(prompt + ids), np_of([False] * len(prompt) + [True] * len(ids))
            with torch.no_grad():
                assert float(model(**collate([row]), num_items_in_batch=torch.ones(())).loss) == pytest.approx(
                    -score, rel=1e-4
                )


def shake(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


# The output layer


def test_an_untied_output_layer_stays_untied_where_deepspeed_would_load_in_parts(bases):
    """Empty parts compare equal, and transformers ties what is equal: FLAN-T5 loses its output layer without a word."""
    from transformers.integrations import deepspeed as integration

    recipe, _, _ = load(bases["t5"])
    held = integration.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        assert integration.is_deepspeed_zero3_enabled()
        model = base.load_base(recipe, FP32)
        assert integration.is_deepspeed_zero3_enabled()
    finally:
        integration.unset_hf_deepspeed_config()
        del held
    assert model.lm_head.weight is not model.shared.weight
    assert torch.equal(model.lm_head.weight, load_file(bases["t5"] / "model.safetensors")["lm_head.weight"].float())


def test_what_is_saved_says_that_the_output_layer_is_its_own(bases, tmp_path):
    _, _, model = load(bases["t5"])
    with torch.no_grad():
        model.lm_head.weight.copy_(2 * model.shared.weight)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, 2 * again.shared.weight)


def test_checking_a_base_leaves_its_configuration_as_it_was(bases, monkeypatch):
    """from_config writes into the one that it is given."""
    read, given = base.load_config, []

    def keep(recipe):
        given.append(read(recipe))
        return given[-1]

    monkeypatch.setattr(adapters, "load_config", keep)
    load(bases["t5"], "full", "--attn_implementation", "eager")
    fresh = read(load_recipe(["--model_name_or_path", str(bases["t5"])], usage=""))
    assert given[0].to_dict() == fresh.to_dict() and given[0]._attn_implementation == fresh._attn_implementation


@pytest.mark.parametrize("bits", ["none", "4", "8"])
def test_a_merge_is_its_adapter_also_where_bitsandbytes_has_left_layers_whole(bases, tmp_path, bits):
    """wo and lm_head stay whole, so that they must not be rounded in the merge."""
    run = tmp_path / "run"
    held = ("--load_in_8bit", "true") if bits == "8" else ()
    recipe, chat, model = load(bases["t5"], "lora", "--output_dir", run, "--lora_dropout", 0, "--precision", "fp32", *held,
                               bits="true" if bits == "4" else "false")  # fmt: skip
    shake(model)
    model.save_pretrained(run)
    save_recipe(recipe, run / "recipe.yaml")
    onto = "base" if bits == "none" else "quantized"
    merge.merge_weights(recipe, run, tmp_path / "merged", onto, "fp32")
    merge.save_beside(recipe, run, chat, tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is False
    whole, _ = find(recipe, str(tmp_path / "merged")).load(chat)
    batch = Collate(chat.tokenizer.pad_token_id, 1, True)(rows(chat)[:3])
    asked = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"],
             "decoder_input_ids": batch["labels"].clamp(min=0)}  # fmt: skip
    with torch.no_grad():
        ours, theirs = (m(**asked).logits.log_softmax(-1) for m in (model, whole))
        with model.disable_adapter():
            untrained = model(**asked).logits.log_softmax(-1)
    tolerance = 1e-2 if bits == "8" else 1e-6  # LLM.int8 rounds what it multiplies too
    assert divergence(ours, theirs) < tolerance and divergence(untrained, theirs) > 3e-2
    names = {n: type(m).__name__ for n, m in model.named_modules() if n.endswith((".wo.base_layer", "lm_head"))}
    assert len(names) > 3 and set(names.values()) == {"Linear"}


def divergence(p, q):
    """Mean KL of two tensors of log-probabilities, in nats."""
    return float((p.exp() * (p - q)).sum(-1).mean())


# Precision


@pytest.mark.parametrize("capability, chosen", [((7, 5), "fp32"), ((8, 0), "bf16")])
def test_a_t5_is_trained_in_fp32_on_a_t4(monkeypatch, capability, chosen):
    on_gpu(monkeypatch, capability)
    assert choose_precision("auto", overflows_in_fp16=True).name == chosen
    assert choose_precision("auto").name == ("fp16" if chosen == "fp32" else "bf16")


def test_a_t5_is_refused_in_fp16_for_training_and_for_answers(monkeypatch, bases):
    on_gpu(monkeypatch, (7, 5))
    with pytest.raises(
        UserError, match="^precision: the sums of a T5 overflow in fp16; set precision: auto, fp32 or bf16"
    ):
        choose_precision("fp16", overflows_in_fp16=True)
    recipe = load_recipe(["--model_name_or_path", str(bases["t5"]), "--load_in_4bit", "false"], usage="")
    with pytest.raises(UserError, match="overflow in fp16"):
        find(recipe, "base@fp16").precision()
    assert (
        find(load_recipe(["--model_name_or_path", str(bases["bart"])], usage=""), "base@fp16").precision().name
        == "fp16"
    )


def on_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")


def test_a_base_without_a_start_token_is_one_line(bases, tmp_path):
    shutil.copytree(bases["t5"], tmp_path / "t5")
    file = tmp_path / "t5/config.json"
    config = json.loads(file.read_text())
    del config["decoder_start_token_id"]
    file.write_text(json.dumps(config))
    recipe = load_recipe(["--model_name_or_path", str(tmp_path / "t5")], usage="")
    with pytest.raises(UserError, match="^model_name_or_path: .* names no decoder_start_token_id"):
        adapters.check_base(recipe)
