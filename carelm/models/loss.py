"""The loss of a causal language model over its trained tokens alone, in chunks: no [batch, length, vocabulary] is made.

The hidden states that predict a trained token are gathered over the micro-batch, [tokens, hidden]; head and cross-entropy run
over them a chunk at a time. It all lies below PEFT, DDP and DeepSpeed: the forward of the causal model itself is replaced, and
the chunks are within one call of its head, so that ZeRO-3 gathers the head once, however many chunks a rank has.

What a model does to its logits besides (a cap, a scale, a loss of its own) is found by computing the start of the first
micro-batch both ways. What is found is kept with every checkpoint, so that a run that goes on computes as it did.
"""

import functools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from carelm.ranks import any_rank, say

# Of fp32 logits. A GPU wants large products; what is over 32 MiB a CPU's allocator maps anew each time (glibc's mallopt), which
# made head and loss of SmolLM2 in bf16 1.6 times as slow.
CHUNK_BYTES = {"cpu": 32 * 2**20, "gpu": 512 * 2**20}
# Of those, what the loss and its gradient are taken of at a time under a frozen head: a CPU keeps it near its cores over the
# half-dozen passes, which made head and loss in bf16 1.4 times as fast.
PART_BYTES = {"cpu": 4 * 2**20, "gpu": 512 * 2**20}
COMPARED_TOKENS = 64
TOLERANCE = 1e-5  # relative; both ways make the compared logits by the same product, so that 16 bits round alike
# A token's loss is the logarithm of a sum of 1 or more, which fp32 holds to steps of 2**-23: no nearer are two sums of 64.
FLOOR = COMPARED_TOKENS * torch.finfo(torch.float32).eps
IGNORED = -100


def use_chunked_loss(
    model: PreTrainedModel, label_smoothing: float = 0.0, *, zero_stage: int = 0, is_chunked: bool | None = None
) -> None:
    """Replaces the forward of a causal model for calls with labels; called once the adapter is on it.

    The loss is the fp32 cross-entropy summed over the trained tokens and divided by `num_items_in_batch` (by their number where
    that is not given), as in transformers' ForCausalLMLoss; there are no logits in the output. `by_row=True` gives the sums of
    the rows, [rows] in fp64, for a loss that is made of them. Without labels the model's own forward runs.

    Args:
        is_chunked: what an earlier start of the run has found; None where the first micro-batch is to tell. The model says it
            in `is_loss_chunked`, which all ranks have alike.
    """
    plain, body, head = model.forward, model.base_model, model.get_output_embeddings()
    model.is_loss_chunked = is_chunked
    if body is model or head is None:
        model.is_loss_chunked = False
        _say_whole(model, "its body and head are not told apart")
    elif is_chunked is False:
        _say_whole(model, "the run was begun with the logits of whole rows")
    else:
        _let_sum_loss(head, model.config.get_text_config().vocab_size, label_smoothing)
        if zero_stage == 3:
            from deepspeed.utils import set_z3_leaf_module

            set_z3_leaf_module(head, True)  # an adapter on the head is gathered with it, once

    @functools.wraps(plain)
    def forward(*args, labels=None, num_items_in_batch=None, by_row=False, **kwargs):
        if labels is None:
            return plain(*args, **kwargs)
        if model.is_loss_chunked is None:
            model.is_loss_chunked = not any_rank(_differ(plain, body, head, labels, kwargs), labels.device)
            if not model.is_loss_chunked:
                _say_whole(model, "its loss is not that of its head alone")
        if num_items_in_batch is None:
            num_items_in_batch = (labels[:, 1:] != IGNORED).sum()
        if model.is_loss_chunked:
            hidden, targets = body(*args, **kwargs)[0], _next(labels)
            trained = (targets != IGNORED).flatten().nonzero()[:, 0]
            if not len(trained):  # the head takes part all the same: other ranks wait for it
                trained = trained.new_zeros(1)
            losses = head(hidden.flatten(0, 1)[trained], targets.flatten()[trained])
            loss = _by_row(losses, trained, labels.shape) if by_row else losses.sum() / num_items_in_batch
        elif by_row:
            loss = _whole_rows(plain, labels, *args, **kwargs)
        else:
            loss = _whole_loss(plain, labels, num_items_in_batch, label_smoothing, *args, **kwargs)
        return CausalLMOutputWithPast(loss=loss)

    model.forward = forward


def use_summed_loss(model: PreTrainedModel, label_smoothing: float = 0.0) -> None:
    """Replaces the forward of an encoder-decoder for calls with labels.

    Its own takes any `num_items_in_batch` and leaves it unused: a mean over each micro-batch, of which a step adds up as many
    as it has. The loss here is the fp32 cross-entropy summed over the labels and divided by `num_items_in_batch` (by their
    number where that is not given). The decoder reads the labels one place later, behind its start token.
    """
    plain, start = model.forward, model.config.decoder_start_token_id
    model.is_loss_chunked, model.accepts_loss_kwargs = False, True
    _say_whole(model, "it is an encoder-decoder")

    @functools.wraps(plain)
    def forward(*args, labels=None, num_items_in_batch=None, decoder_input_ids=None, **kwargs):
        if labels is None:
            return plain(*args, decoder_input_ids=decoder_input_ids, **kwargs)
        read = F.pad(labels[:, :-1], (1, 0), value=start)
        read = read.masked_fill(read == IGNORED, model.config.pad_token_id)
        logits = plain(*args, decoder_input_ids=read, **(kwargs | {"use_cache": False})).logits.float()
        if num_items_in_batch is None:
            num_items_in_batch = (labels != IGNORED).sum()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=label_smoothing)
        return CausalLMOutputWithPast(loss=loss / num_items_in_batch)

    model.forward = forward


def _say_whole(model: PreTrainedModel, reason: str) -> None:
    say(
        f"{type(model).__name__}: {reason}, so that the logits of whole rows are made, which takes more memory and time"
    )


def _next(labels: torch.Tensor) -> torch.Tensor:
    """For each position the token that it predicts, [batch, length]."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _keep(labels: torch.Tensor) -> int:
    """How many positions at the end of the rows predict all trained tokens."""
    trained = (labels != IGNORED).any(dim=0).nonzero()
    return labels.shape[1] - max(int(trained[0]) - 1, 0) if len(trained) else 1


def _whole_loss(plain, labels, num_items_in_batch, label_smoothing, *args, **kwargs) -> torch.Tensor:
    """The loss as the model computes it, with logits from the first trained token of the batch on."""
    keep = _keep(labels)
    labels = labels[:, -keep:]
    if not label_smoothing:
        kwargs |= {"labels": labels, "num_items_in_batch": num_items_in_batch}
        return plain(*args, logits_to_keep=keep, **kwargs)[0]
    logits = plain(*args, logits_to_keep=keep, **kwargs)[0].float()
    targets = _next(labels)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=label_smoothing)
    return loss / num_items_in_batch


def _by_row(losses: torch.Tensor, places: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The losses of tokens at these places of a batch of this shape, summed by row. The sums of long answers are far larger
    than what they differ by, hence fp64."""
    return losses.new_zeros(shape[0], dtype=torch.float64).index_add(0, places // shape[1], losses.double())


def _whole_rows(plain, labels, *args, **kwargs) -> torch.Tensor:
    """The same from the logits that the model makes."""
    keep = _keep(labels)
    logits = plain(*args, logits_to_keep=keep, **kwargs)[0].float()
    losses = F.cross_entropy(logits.transpose(1, 2), _next(labels[:, -keep:]), reduction="none")
    return losses.double().sum(1)


@torch.compiler.disable
def _differ(plain, body, head, labels, inputs) -> bool:
    """Whether the model's own loss is another than its head's, at the places of the first trained tokens of the first row.

    Few of them, so that this takes neither memory nor time; in the same random state, so that dropout drops the same. Token 0
    is asked for at each: of the row's own a tuned model may be sure, and in a loss near 0 no cap shows.
    """
    trained = (labels[0] != IGNORED).nonzero()
    length = min(int(trained[0]) + COMPARED_TOKENS, labels.shape[1]) if len(trained) else 1
    is_by_token = {name: torch.is_tensor(v) and v.shape[:2] == labels.shape for name, v in inputs.items()}
    inputs = {name: v[:1, :length] if is_by_token[name] else v for name, v in inputs.items()}
    labels = labels[:1, :length].clamp(max=0)
    gpus = [labels.device] if labels.device.type == "cuda" else []
    with torch.no_grad():
        with torch.random.fork_rng(gpus):
            own = _whole_loss(plain, labels, 1, 0.0, **inputs)
        with torch.random.fork_rng(gpus):
            hidden, keep = body(**inputs)[0], _keep(labels)
            ours = head(hidden[0, -keep:], _next(labels)[0, -keep:], 0.0).sum()
    torch.clear_autocast_cache()  # it holds the weights without their gradients
    return not torch.allclose(ours, own.float(), rtol=TOLERANCE, atol=FLOOR, equal_nan=True)


def _let_sum_loss(head: torch.nn.Module, vocabulary: int, label_smoothing: float) -> None:
    """Lets a head that is given targets return the loss of each of them, [targets]."""
    project = head.forward

    @torch.compiler.disable
    @functools.wraps(project)
    def forward(hidden, targets=None, label_smoothing=label_smoothing):
        if targets is None:
            return project(hidden)
        device = "cpu" if hidden.device.type == "cpu" else "gpu"
        chunk, part = (max(1, size[device] // (4 * vocabulary)) for size in (CHUNK_BYTES, PART_BYTES))

        def of_logits(logits, targets):
            return F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing)

        def loss(hidden, targets):
            return of_logits(project(hidden), targets)

        if torch.is_grad_enabled() and not any(p.requires_grad for p in head.parameters()):
            return _GradientsInForward.apply(hidden, targets, project, of_logits, chunk, part)
        chunks = zip(hidden.split(chunk), targets.split(chunk))
        if not torch.is_grad_enabled():
            return torch.cat([loss(*pair) for pair in chunks])
        # Gradients of trained weights are not taken ahead: they are larger than fp16 holds without the loss scaler's say.
        return torch.cat([checkpoint(loss, *pair, use_reentrant=False) for pair in chunks])

    head.forward = forward


class _GradientsInForward(torch.autograd.Function):
    """The losses under a frozen head: the gradient of each chunk is taken at once, so that its logits are made only once.

    Any loss scaling comes later, in the backward. fp16 would round small gradients of logits to 0 until then, hence SCALE.
    """

    SCALE = 2.0**8

    @staticmethod
    def forward(ctx, hidden, targets, project, loss, chunk, part):
        """
        Args:
            project: hidden states to logits.
            loss: logits and targets to the loss of each.
            chunk, part: tokens for `project` and for `loss` at a time.
        """
        gradients, losses = torch.empty_like(hidden), []
        for states, aims, of_states in zip(*(x.split(chunk) for x in (hidden, targets, gradients))):
            states = states.detach().requires_grad_()
            with torch.enable_grad():
                logits = project(states)
            of_logits = torch.empty_like(logits)
            for few, goals, of_few in zip(logits.detach().split(part), aims.split(part), of_logits.split(part)):
                few.requires_grad_()
                with torch.enable_grad():
                    value = loss(few, goals)
                    of_few.copy_(*torch.autograd.grad(value.sum() * _GradientsInForward.SCALE, few))
                losses.append(value.detach())
            of_states.copy_(*torch.autograd.grad(logits, states, of_logits))
        ctx.save_for_backward(gradients)
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        (gradients,) = ctx.saved_tensors
        scaled = gradients.float() * (grad_output / _GradientsInForward.SCALE)[:, None]
        return scaled.to(gradients.dtype), None, None, None, None, None
