"""The loss in chunks: with its gradients it is that of whole logits, whatever is trained, and no whole logits are made."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)
from transformers.trainer_pt_utils import LabelSmoother

from carelm.models import adapters, loss
from carelm.recipe_file import load_recipe

WORDS = 97
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
LORA = ("--lora_target_modules", "q_proj", "v_proj")


@pytest.fixture(autouse=True)
def chunks_of_seven_tokens(monkeypatch):
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 7 * 4 * WORDS)
    monkeypatch.setitem(loss.PART_BYTES, "cpu", 3 * 4 * WORDS)


def llama(tied=False, **keys):
    torch.manual_seed(1)
    return sharpened(LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied, **keys)))


def sharpened(model):
    """With logits of a trained model's size, on which a cap shows."""
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
        model.get_output_embeddings().weight.mul_(20)
    return model


def batch():
    """Two rows of unlike length with trained tokens in several places: 21 of them, so three chunks."""
    torch.manual_seed(0)
    ids = torch.randint(0, WORDS, (2, 24))
    labels = torch.full_like(ids, -100)
    labels[0, 5:12], labels[0, 17:24], labels[1, 2:9] = ids[0, 5:12], ids[0, 17:24], ids[1, 2:9]
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "num_items_in_batch": torch.tensor(40)}


def loss_and_gradients(model, inputs, scale=1.0):
    value = model(**inputs).loss
    (scale * value).backward()
    gradients = {name: p.grad / scale for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return value.detach(), gradients


def both(base, *keys, method="lora"):
    """The same model twice: as it is, and with the loss in chunks."""
    models = []
    for model in (base, copy.deepcopy(base)):
        recipe = load_recipe(["--load_in_4bit", "false", "--method", method, *keys], usage="")
        trained = model if method == "full" else adapters.add_adapter(model, recipe)
        with torch.no_grad():
            for number, (name, parameter) in enumerate(trained.named_parameters()):
                if "lora_B" in name:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
        if models:
            loss.use_chunked_loss(model)
        models.append(trained.train())
    return models


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "method, keys",
    [
        ("lora", LORA),
        ("lora", ("--lora_target_modules", "q_proj", "lm_head")),
        ("lora", (*LORA, "--lora_modules_to_save", "lm_head")),
        ("lora", (*LORA, "--gradient_checkpointing", "true")),
        ("prompt_tuning", ("--num_virtual_tokens", "5")),
        ("full", ()),
    ],
    ids=["lora", "head under lora", "head in modules_to_save", "gradient checkpointing", "prompt tuning", "full"],
)
def test_loss_and_gradients_are_those_of_whole_logits(tied, method, keys):
    plain, chunked = both(llama(tied), *keys, method=method)
    if "--gradient_checkpointing" in keys:
        chunked.gradient_checkpointing_enable()
    value, gradients = loss_and_gradients(plain, batch())
    for _ in range(2):  # the first of them compares both ways
        own, own_gradients = loss_and_gradients(chunked, batch())
        assert own == pytest.approx(float(value), rel=1e-6)
        assert own_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(own_gradients[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max())), (
                name
            )


def tiny(kind, config, **keys):
    torch.manual_seed(1)
    return sharpened(kind(config(**{"vocab_size": WORDS, "pad_token_id": 0, **keys})).eval())


GPT2_SHAPE = {"n_embd": 16, "n_layer": 1, "n_head": 2}
OPT_SHAPE = {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "model, is_whole",
    [
        (lambda: tiny(LlamaForCausalLM, LlamaConfig, **SHAPE), False),
        (lambda: tiny(GPT2LMHeadModel, GPT2Config, **GPT2_SHAPE), False),
        (lambda: tiny(OPTForCausalLM, OPTConfig, **OPT_SHAPE, word_embed_proj_dim=16), False),
        (lambda: tiny(PhiForCausalLM, PhiConfig, **SHAPE), False),
        (lambda: tiny(BloomForCausalLM, BloomConfig, hidden_size=16, n_layer=1, n_head=2), False),
        (lambda: tiny(MixtralForCausalLM, MixtralConfig, **SHAPE, num_key_value_heads=2, num_local_experts=4), False),
        (lambda: tiny(GraniteForCausalLM, GraniteConfig, **SHAPE, logits_scaling=1.0), False),
        (lambda: tiny(GraniteForCausalLM, GraniteConfig, **SHAPE, logits_scaling=8.0), True),
        (lambda: tiny(CohereForCausalLM, CohereConfig, **SHAPE), True),
        (lambda: tiny(Gemma2ForCausalLM, Gemma2Config, **SHAPE, head_dim=8, num_key_value_heads=2), True),
    ],
    ids=["llama", "gpt2", "opt", "phi", "bloom", "mixtral", "granite", "granite scaled", "cohere", "gemma2"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_that_does_more_to_its_logits_is_found_and_said(model, is_whole, dtype, capsys):
    model = model().to(dtype)
    inputs = batch()
    value, gradients = loss_and_gradients(model, inputs)
    loss.use_chunked_loss(model)
    own, own_gradients = loss_and_gradients(model, inputs)
    assert own == pytest.approx(float(value), rel=1e-5 if dtype == torch.float32 else 2e-3)
    if dtype == torch.float32:
        for name, gradient in gradients.items():
            assert torch.allclose(own_gradients[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max())), (
                name
            )
    said = f"{type(model).__name__}: its loss is not that of its head alone" in capsys.readouterr().err
    assert said == is_whole


def sure_of(model, inputs):
    """The same rows, where they train it asking for what the model says by itself: a loss of 0."""
    with torch.no_grad():
        said = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.argmax(-1)
    trained = inputs["labels"] != -100
    return inputs | {"labels": torch.where(trained, said.roll(1, dims=1), -100)}


def test_a_model_that_does_more_to_its_logits_is_found_also_where_it_is_sure_of_its_first_rows():
    model = tiny(GraniteForCausalLM, GraniteConfig, **SHAPE, logits_scaling=8.0)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    known = sure_of(model, batch())
    with torch.no_grad():
        value = float(model(**batch()).loss)
    loss.use_chunked_loss(model)
    assert model(**known).loss == 0
    assert float(model(**batch()).loss) == pytest.approx(value, rel=1e-5)


class OrderByRows(torch.nn.Linear):
    """Sums in another order for many rows, as products on a machine may."""

    def forward(self, hidden):
        if hidden.shape[-2] <= 7:
            return super().forward(hidden)
        half = self.in_features // 2
        return hidden[..., half:] @ self.weight.T[half:] + (hidden[..., :half] @ self.weight.T[:half] + self.bias)


@torch.no_grad()
def test_a_loss_near_0_may_differ_by_how_its_logits_round(capsys):
    model = tiny(PhiForCausalLM, PhiConfig, **SHAPE)
    head = OrderByRows(16, WORDS)
    head.load_state_dict(model.lm_head.state_dict())
    head.bias[0], model.lm_head = 21, head
    model, inputs = model.to(torch.bfloat16), batch()
    inputs |= {"labels": inputs["labels"].clamp(max=0), "num_items_in_batch": torch.tensor(1)}
    value = float(model(**inputs).loss)
    loss.use_chunked_loss(model)
    assert 1e-5 * value < abs(float(model(**inputs).loss) - value) < loss.FLOOR
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("was", [True, False])
def test_a_later_start_takes_the_way_of_the_first_one_without_comparing(was, monkeypatch, capsys):
    model = tiny(LlamaForCausalLM, LlamaConfig, **SHAPE)
    loss.use_chunked_loss(model, is_chunked=was)
    monkeypatch.setattr(loss, "_differ", lambda *_: pytest.fail("it was compared again"))
    model(**batch())
    assert model.is_loss_chunked is was
    assert ("the run was begun with the logits of whole rows" in capsys.readouterr().err) is not was


def test_a_model_without_a_head_of_its_own_is_taken_whole_and_said(monkeypatch, capsys):
    model = llama()
    value = model(**batch()).loss
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda self: None)
    loss.use_chunked_loss(model)
    assert float(model(**batch()).loss) == pytest.approx(float(value), rel=1e-6)
    assert "LlamaForCausalLM: its body and head are not told apart" in capsys.readouterr().err


class LargestTensor(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if torch.is_tensor(tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_no_more_logits_are_made_at_a_time_than_a_chunk(training):
    model = both(llama(), *LORA)[1]
    ids = torch.randint(0, WORDS, (8, 12))
    inputs = {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(88)}
    model(**inputs)
    with LargestTensor() as largest, torch.set_grad_enabled(training):
        value = model(**inputs).loss
        if training:
            value.backward()
    assert largest.numbers < 8 * 11 * WORDS
    with LargestTensor() as largest:
        both(llama(), *LORA)[0](**inputs)
    assert largest.numbers >= 8 * 12 * WORDS  # which this test would see


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen head", "trained head"])
def test_a_micro_batch_with_nothing_to_learn_has_gradients_of_zero(frozen):
    """DDP and DeepSpeed wait for every gradient on every rank."""
    model = both(llama(), *LORA)[1] if frozen else both(llama(), method="full")[1]
    ids = torch.zeros((1, 1), dtype=torch.long)
    blank = {"input_ids": ids, "labels": torch.full_like(ids, -100), "num_items_in_batch": torch.tensor(40)}
    for _ in range(2):
        value, gradients = loss_and_gradients(model, blank)
        assert value == 0 and all((gradient == 0).all() for gradient in gradients.values())
    assert loss_and_gradients(model, batch())[0] > 0


def test_label_smoothing_is_that_of_transformers():
    plain, chunked = llama(), llama()
    loss.use_chunked_loss(chunked, label_smoothing=0.2)
    inputs = batch()
    own, gradients = loss_and_gradients(chunked, inputs)
    labels, number = inputs.pop("labels"), inputs.pop("num_items_in_batch")
    value = LabelSmoother(0.2)(plain(**inputs), labels, shift_labels=True, num_items_in_batch=number)
    value.backward()
    assert own == pytest.approx(float(value), rel=1e-6)
    assert torch.allclose(gradients["lm_head.weight"], plain.lm_head.weight.grad, rtol=1e-5, atol=1e-7)


def test_label_smoothing_is_that_of_transformers_also_with_whole_logits():
    model = tiny(CohereForCausalLM, CohereConfig, **SHAPE)
    inputs = batch()
    without = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    value = LabelSmoother(0.2)(model(**without), inputs["labels"], shift_labels=True, num_items_in_batch=40)
    loss.use_chunked_loss(model, label_smoothing=0.2)
    assert float(model(**inputs).loss) == pytest.approx(float(value), rel=1e-6)


def rows_and_gradients(model, of_rows, inputs):
    """The losses of both rows, and the gradients of a loss that weighs them unlike."""
    inputs = {name: value for name, value in inputs.items() if name != "num_items_in_batch"}
    losses = of_rows(model, inputs)
    (2 * losses[0] - 3 * losses[1]).backward()
    return losses.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def rows_of_whole_logits(model, inputs):
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), inputs["labels"][:, 1:], reduction="none")
    return losses.double().sum(1)


@pytest.mark.parametrize(
    "method, keys",
    [("lora", LORA), ("lora", (*LORA, "--lora_modules_to_save", "lm_head")), ("full", ())],
    ids=["lora", "head in modules_to_save", "full"],
)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_losses_of_rows_have_the_gradients_of_whole_logits(kind, method, keys):
    """Gemma 2 caps its logits, so that they are made whole."""
    base = (
        llama()
        if kind == "llama"
        else tiny(Gemma2ForCausalLM, Gemma2Config, **SHAPE, head_dim=8, num_key_value_heads=2)
    )
    plain, chunked = both(base, *keys, method=method)
    value, gradients = rows_and_gradients(plain, rows_of_whole_logits, batch())
    own, own_gradients = rows_and_gradients(chunked, lambda model, inputs: model(**inputs, by_row=True).loss, batch())
    assert own.dtype == torch.float64 and own.tolist() == pytest.approx(value.tolist(), rel=1e-6)
    with torch.no_grad():
        assert chunked(**batch(), by_row=True).loss.tolist() == pytest.approx(value.tolist(), rel=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(own_gradients[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())), name


def test_without_labels_the_logits_are_those_of_the_model():
    plain, chunked = both(llama(), *LORA)
    ids = batch()["input_ids"]
    assert torch.equal(plain(input_ids=ids).logits, chunked(input_ids=ids).logits)
    assert torch.equal(
        plain.generate(input_ids=ids, max_new_tokens=4), chunked.generate(input_ids=ids, max_new_tokens=4)
    )


def test_the_comparison_draws_no_random_numbers_and_dropout_does_not_disturb_it(capsys):
    plain, chunked = both(llama(attention_dropout=0.5), *LORA, "--lora_dropout", "0.5")
    capsys.readouterr()  # of the recipe
    values = []
    for model in (plain, chunked):
        torch.manual_seed(3)
        values.append([float(model(**batch()).loss) for _ in range(2)])
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert capsys.readouterr().err == ""


def test_the_first_micro_batch_has_its_gradients_under_autocast():
    """Autocast keeps the weights that it has cast: those that the comparison used would have no gradients."""
    plain, chunked = both(llama(), *LORA)
    for model in (plain, chunked):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = model(**batch()).loss
        value.backward()
    for (name, parameter), other in zip(plain.named_parameters(), chunked.parameters()):
        if parameter.requires_grad:
            assert other.grad is not None, name
            assert torch.allclose(
                other.grad, parameter.grad, rtol=0.05, atol=0.02 * float(parameter.grad.abs().max())
            ), name


def test_small_gradients_survive_fp16_until_the_loss_is_scaled():
    """Of a token that is all but certain: under what fp16 holds, and seen by loss scaling alone."""
    head = torch.nn.Linear(8, WORDS).requires_grad_(False)
    torch.manual_seed(0)
    hidden, targets, gradients = torch.randn(5, 8), torch.full((5,), 3), []
    head.weight[3], head.bias[3] = 0, 18
    for dtype in (torch.float32, torch.float16):
        part, own = hidden.clone().requires_grad_(), copy.deepcopy(head)
        loss._let_sum_loss(own, WORDS, 0.0)
        with torch.autocast("cpu", dtype=torch.float16, enabled=dtype == torch.float16):
            value = own(part, targets).sum()
        (value / 1000 * 65536).backward()
        gradients.append(part.grad / 65.536)
    assert 0 < gradients[0].abs().max() < 6e-7
    assert torch.allclose(*gradients, rtol=0.1, atol=0.02 * float(gradients[0].abs().max()))
