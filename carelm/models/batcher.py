"""A continuous batcher: every step gives each request in flight one token, and a request that ends makes room for the next.

    batcher = Batcher(model, device=device, max_batch_tokens=16384)
    request = batcher.submit(prompt_ids, Decoding(max_new_tokens=256), on_token=print)
    while batcher.busy:
        batcher.step()

Keys and values lie in tensors made once, [places, heads, capacity, head_dim] a layer. Row r belongs to the r-th request in
flight; its tokens lie from column 0 on, and a step writes each row's new key at the row's own length. A forward sees the rows
in use and the columns in use, as views: nothing is copied per step, and no row stands empty. The longer half of the requests
lies in front, so that attention over the other half ends where its longest one does.
"""

import gc
import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

import torch
from peft import PeftType
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from carelm.models.decoding import Decoding, choose
from carelm.models.key_values import Layer, Window, attention_in_parts, causal_model
from carelm.ranks import rank

T = TypeVar("T")
PREFILL_TOKENS = 2048  # of the prompts that are read in one forward: bounds its memory and how long the others wait
LIKE_LENGTH = 0.75  # prompts shorter than this share of the longest are read in a forward of their own
EXCEPT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LESS = 0.8  # of the columns: from here on it pays to attend over the shorter half of the rows by itself
FREE_SHARE = 0.125  # of the places: so many are free before waiting prompts are read, and read together


@dataclass(eq=False)
class Request:
    """One prompt and its answer so far.

    Attributes:
        ahead: virtual tokens of the model, which stand before the prompt.
        tokens: ids of the answer so far; the end of turn is one.
        finish_reason: None while it is not over, then "stop", "length" or "cancelled".
        error: what its `on_token` raised, which cancelled it; the others go on.
    """

    prompt: list[int]
    decoding: Decoding
    on_token: Callable[["Request", int], None] | None
    draws: Random
    ahead: int = 0
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None

    @property
    def longest(self) -> int:
        """Columns that it may come to need."""
        return self.ahead + len(self.prompt) + self.decoding.max_new_tokens

    @property
    def known(self) -> int:
        return self.ahead + len(self.prompt) + len(self.tokens)

    @property
    def read(self) -> int:
        """Tokens whose keys and values are there once it is in flight: all but the newest."""
        return self.known - 1


def why_not(model: torch.nn.Module) -> str | None:
    """Why the batcher cannot serve this model, or None where it can.

    It can where every layer keeps all keys and values of plain attention, and where positions can be told by `position_ids`.
    """
    if has_virtual_tokens(model) and model.active_peft_config.peft_type != PeftType.PROMPT_TUNING:
        return "it has virtual tokens that are no trained prompt"
    inner = causal_model(model)
    if inner.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    for name in ("past_key_values", "position_ids"):
        if name not in inspect.signature(inner.forward).parameters:
            return f"its forward takes no {name}"
    if getattr(inner, "_is_stateful", False):
        return "it keeps a recurrent state"
    if "local" in getattr(inner.config, "attention_layers", ()):
        return "it has layers of local attention"
    for layer in DynamicCache(config=inner.config).layers:
        if type(layer) is not DynamicLayer:
            return f"it caches by {type(layer).__name__}"
    return None


def has_virtual_tokens(model: torch.nn.Module) -> bool:
    return getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch may help. On a CPU torch raises a plain RuntimeError, Python and NumPy a MemoryError.

    oneDNN's "could not create a primitive" is none: it comes where not even a kernel's code has room (or may not be executed),
    never for a batch's own tensors, and in that process it comes again however much memory is let go.
    """
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in ("DefaultCPUAllocator: can't allocate memory", "std::bad_alloc")
    )


def unless_out_of_memory(compute: Callable[[], T], batch: int) -> T | None:
    """What it computes; None where memory has no room for a batch of more than one. By then the exception no longer holds
    the batch's memory."""
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:
        if batch == 1 or not is_out_of_memory(error):
            raise
    return None


def halve(batch: int) -> int:
    """Half of a batch that memory had no room for, which is said; what it held is let go."""
    gc.collect()
    torch.cuda.empty_cache()
    print(f"carelm: rank {rank()}: out of memory with a batch of {batch}; goes on with {batch // 2}",
          file=sys.stderr, flush=True)  # fmt: skip
    return batch // 2


def stop_ids(model: torch.nn.Module) -> set[int]:
    """The tokens that end an answer."""
    ids = model.generation_config.eos_token_id
    return {ids} if isinstance(ids, int) else set(ids or ())


class Batcher:
    """Requests come at any time; `submit` and `cancel` may be called by any thread and by callbacks, `step` by one thread.

    Args:
        model: a causal language model in evaluation mode, with or without adapter, of which `why_not` says None.
        device: where it computes.
        max_batch_tokens: places times capacity stay under it (a single request always has its place). Halved, and said, where
            memory ends: what was in flight is then read again and goes on.

    Attributes:
        running: the requests in flight.
        waiting: those that have no place yet, first come first served.
        largest: the most requests that were in flight together.
    """

    def __init__(self, model: torch.nn.Module, *, device: torch.device, max_batch_tokens: int):
        self.model, self.device, self.max_batch_tokens = model, device, max_batch_tokens
        self.stops = stop_ids(model)
        inner = causal_model(model)
        takes = inspect.signature(inner.forward).parameters
        # A trained prompt, [virtual tokens, hidden size], is read before each prompt, and not put there by PEFT at each step.
        with torch.no_grad():
            self._virtual = model.get_prompt(1)[0].to(inner.dtype) if has_virtual_tokens(model) else None
        self._answering = model if self._virtual is None else inner
        self._keeps_logits = "logits_to_keep" in takes
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.largest = 0
        self._window = Window()
        self._forget()

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(
        self, prompt: list[int], decoding: Decoding, on_token: Callable[[Request, int], None] | None = None
    ) -> Request:
        """A new request; `on_token(request, token)` is called for each of its tokens, in order, by the thread that steps.

        Raises:
            ValueError: where there is no prompt, no token is asked for, or the model has too few positions for both.
        """
        positions = getattr(causal_model(self.model).config.get_text_config(), "max_position_embeddings", None)
        if not prompt or decoding.max_new_tokens < 1:
            raise ValueError("a request needs a prompt and at least one new token")
        ahead = 0 if self._virtual is None else len(self._virtual)
        if positions is not None and ahead + len(prompt) + decoding.max_new_tokens > positions:
            raise ValueError(
                f"{ahead + len(prompt)} tokens of prompt and {decoding.max_new_tokens} new ones are more than {positions} "
                "positions"
            )
        request = Request(prompt, decoding, on_token, decoding.draws_for(prompt), ahead)
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request: it gets no further token, and its place is free at the next step."""
        request.finish_reason = request.finish_reason or "cancelled"

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Reads waiting prompts into free places and gives every request in flight one more token.

        Returns:
            the requests that are over since the last step.

        Raises:
            torch.OutOfMemoryError: where a single request does not fit.
        """
        over = self._drop_ended() + self._drop_cancelled()
        new = self._admitted()
        tried = len(self.running) + len(new)
        try:
            for first, group in self._take_in(new):
                self._read(first, group)
            self.largest = max(self.largest, len(self.running))
            over += self._drop_ended()
            if self.running:
                self._advance()
            return over + self._drop_ended()
        except (RuntimeError, MemoryError) as error:
            if tried == 1 or not is_out_of_memory(error):
                raise
        # Here the exception no longer holds the memory of the forward.
        back = list(dict.fromkeys([*self.running, *new]))
        while self.waiting and self.waiting[0] in back:
            self.waiting.popleft()
        self.waiting.extendleft(reversed(back))
        longest = max(request.longest for request in back)
        for request in back:
            request.draws = request.decoding.draws_for(request.prompt, used=len(request.tokens))
        self.running.clear()
        self._window.places = self._window.capacity = 0
        self._forget()
        self.max_batch_tokens = longest * halve(tried)
        return over

    def _drop_cancelled(self) -> list[Request]:
        over = [request for request in list(self.waiting) if request.finish_reason]
        for request in over:
            self.waiting.remove(request)
        return over

    def _drop_ended(self) -> list[Request]:
        """Takes out what is over; rows move into the places that are left, so that the longer half lies in front."""
        ended = {row for row, request in enumerate(self.running) if request.finish_reason}
        if not ended:
            return []
        over = [self.running[row] for row in sorted(ended)]
        rows = [row for row in range(len(self.running)) if row not in ended]
        rows.sort(key=lambda row: -self.running[row].read)
        half, sources, targets = len(rows) // 2, [], []
        for part, places in ((rows[:half], range(half)), (rows[half:], range(half, len(rows)))):
            sources += [row for row in part if row not in places]
            targets += sorted(set(places) - set(part))
        if sources:
            width = max(self.running[row].read for row in sources)
            for layer in self._cache.layers:
                layer.move(sources, targets, width)
        running = dict(zip(rows, (self.running[row] for row in rows)))
        running |= dict(zip(targets, (self.running[row] for row in sources)))
        self.running = [running[row] for row in range(len(rows))]
        self._last, self._half = None, half
        return over

    def _admitted(self) -> list[Request]:
        """The waiting requests that have a place now."""
        longest, new = max((request.longest for request in self.running), default=0), []
        for request in list(self.waiting):
            longest = max(longest, request.longest)
            if len(self.running) + len(new) >= max(1, self.max_batch_tokens // longest):
                break
            new.append(request)
        enough = min(len(self.waiting), FREE_SHARE * (len(self.running) + len(new)))
        return new if len(new) >= enough else []

    def _take_in(self, new: list[Request]) -> Iterator[tuple[int, list[Request]]]:
        """Takes them into flight: groups of like length, with the row of the first one of each."""
        if not new:
            return
        count = len(self.running)
        self._make_room(count + len(new), max(request.longest for request in (*self.running, *new)))
        for _ in new:
            self.waiting.popleft()
        new = sorted(new, key=lambda request: -request.known)
        self.running += new
        while new:
            longest = new[0].known
            most = max(1, PREFILL_TOKENS // longest)
            group = [request for request in new[:most] if request.known >= LIKE_LENGTH * longest]
            yield count, group
            count, new = count + len(group), new[len(group) :]

    def _make_room(self, places: int, capacity: int) -> None:
        window, in_flight = self._window, len(self.running)
        if places <= window.places and capacity <= window.capacity:
            return
        if places > window.places:  # twice as many where the budget has them, so that room is not made for each one
            places = max(places, min(2 * window.places, self.max_batch_tokens // capacity))
        else:
            places = max(places, min(window.places, self.max_batch_tokens // capacity))
        window.places, window.capacity = places, capacity
        if not in_flight:
            self._forget()
            return
        width = max(request.read for request in self.running)
        for layer in self._cache.layers:
            layer.lay_out_anew(in_flight, width)

    def _forget(self) -> None:
        """Lets go of all keys and values."""
        self._cache = Cache(
            layers=[Layer(self._window) for _ in DynamicCache(config=causal_model(self.model).config).layers]
        )
        self._last, self._half = None, 0

    def _read(self, first: int, group: list[Request]) -> None:
        """Reads prompts [rows, longest], padded at their end: what is causal never sees that, and later keys are written over
        it. Each gets its first token."""
        prompts = [request.prompt + request.tokens for request in group]
        lengths = [request.known for request in group]
        width, longest = max(lengths), max(map(len, prompts))
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=self.device)
        inputs = {"input_ids": ids}
        if self._virtual is not None:
            embedded = self._answering.get_input_embeddings()(ids)
            inputs = {"inputs_embeds": torch.cat([self._virtual.expand(len(ids), -1, -1), embedded], 1)}
        self._window.first, self._window.columns, self._window.width = first, None, width
        ends = sorted(set(lengths))
        kept = 1 if len(ends) == 1 else torch.tensor(ends, device=self.device) - 1
        positions = torch.arange(width, device=self.device).expand(len(ids), -1)
        logits = self._forward(inputs, positions, None, kept)
        if logits.shape[1] == len(ends):
            at = [ends.index(length) for length in lengths]
        else:  # it keeps all logits
            at = [length - 1 for length in lengths]
        self._last = None
        self._give(group, logits[range(len(group)), at])
        self._tell(group)

    def _advance(self) -> None:
        """One token for each row."""
        if self._last is None:  # rows have come or gone
            read = [request.read for request in self.running]
            self._last = torch.tensor([request.tokens[-1] for request in self.running], device=self.device)
            self._read_each = torch.tensor(read, device=self.device)
            self._width, self._ragged = max(read), min(read) < max(read)
            self._window.rows = torch.arange(len(read), device=self.device)
            self._shorter = max(read[self._half :])
        self._width += 1
        self._shorter += 1
        self._window.parts = None
        if self._shorter < LESS * self._width:
            self._window.parts = [(slice(0, self._half), self._width), (slice(self._half, None), self._shorter)]
        self._window.columns, self._window.width = self._read_each, self._width
        mask = None
        if self._ragged:
            mask = (torch.arange(self._width, device=self.device) <= self._read_each[:, None]).long()
        logits = self._forward({"input_ids": self._last[:, None]}, self._read_each[:, None], mask, 1)
        self._last = self._give(self.running, logits[:, -1])
        self._read_each = self._read_each + 1
        self._tell(self.running)

    def _forward(
        self,
        inputs: dict[str, torch.Tensor],
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        kept: int | torch.Tensor,
    ) -> torch.Tensor:
        """Logits [rows, kept or all, vocabulary]."""
        more = {"logits_to_keep": kept} if self._keeps_logits else {}
        # cuDNN's attention, which torch prefers on Hopper and later, plans anew for each shape, and here each step is another
        # (pytorch/pytorch#155958).
        with attention_in_parts(self.model), sdpa_kernel(EXCEPT_CUDNN):
            return self._answering(
                **inputs, attention_mask=mask, position_ids=positions, past_key_values=self._cache, use_cache=True,
                return_dict=True, **more,
            ).logits  # fmt: skip

    def _give(self, requests: list[Request], logits: torch.Tensor) -> torch.Tensor:
        """The next token of each request, [rows]."""
        chosen = choose(logits, [request.decoding for request in requests], [request.draws for request in requests])
        for request, token in zip(requests, chosen.tolist()):
            if request.finish_reason:  # cancelled meanwhile
                continue
            request.tokens.append(token)
            if token in self.stops:
                request.finish_reason = request.finish_reason or "stop"
            elif len(request.tokens) == request.decoding.max_new_tokens:
                request.finish_reason = request.finish_reason or "length"
        return chosen

    def _tell(self, requests: list[Request]) -> None:
        """Calls those who asked for each token, once all that the next step builds on is in place."""
        for request in requests:
            if request.on_token and request.finish_reason != "cancelled":
                try:
                    request.on_token(request, request.tokens[-1])
                except Exception as error:  # its owner's, whatever it is; it is kept for him
                    request.finish_reason, request.error = "cancelled", error
