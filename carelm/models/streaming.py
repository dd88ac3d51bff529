"""One answer, shown as it comes; Ctrl-C ends it."""

from collections.abc import Callable

import torch
from transformers.generation.streamers import BaseStreamer

from carelm.chat.chat import Chat
from carelm.errors import UserError
from carelm.models.batcher import Batcher, is_out_of_memory, stop_ids, why_not
from carelm.models.decoding import Decoding
from carelm.models.generation import Answer, generate


class Tokens(BaseStreamer):
    """Hands on every new token of `generate`, whose first value is the prompt."""

    def __init__(self, took: Callable[[int], None]):
        self.took, self.is_prompt = took, True

    def put(self, value: torch.Tensor) -> None:
        if not self.is_prompt:
            self.took(int(value))
        self.is_prompt = False

    def end(self) -> None:
        pass


def stream(
    model: torch.nn.Module,
    chat: Chat,
    prompt: list[int],
    decoding: Decoding,
    *,
    device: torch.device,
    show: Callable[[str], None],
) -> Answer:
    """The model's answer to one prompt, by the evaluator's own way.

    `show` is called with the answer's whole text so far whenever that has grown; it begins with what was shown before, except
    where thoughts end and the answer takes their place.

    Returns:
        the answer; its `finish_reason` is "cancelled" where KeyboardInterrupt has ended it.

    Raises:
        UserError: where the memory does not hold it.
    """
    stops, tokens, spoken, shown = stop_ids(model), [], chat.listen(), ""

    def took(token: int) -> None:
        nonlocal shown
        tokens.append(token)
        spoken.add(token)
        if token not in stops and (text := spoken.so_far) != shown:
            shown = text
            show(text)

    try:
        if why_not(model):
            generate(model, chat, [prompt], decoding, device=device, streamer=Tokens(took))
        else:
            batcher = Batcher(model, device=device, max_batch_tokens=1)
            request = batcher.submit(prompt, decoding, on_token=lambda request, token: took(token))
            while batcher.busy:
                batcher.step()
            if request.error:
                raise request.error
        reason = "stop" if tokens[-1] in stops else "length"
    except KeyboardInterrupt:
        reason = "cancelled"
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"memory does not hold {len(prompt)} tokens of prompt and {decoding.max_new_tokens} of answer; set max_new_tokens "
            "or max_length lower, or begin anew"
        ) from None
    text = chat.spoken(tokens)
    if reason != "stop":  # it may have ended inside a character
        text = text.rstrip("\ufffd").rstrip()
    if text != shown:
        show(text)
    return Answer(text, tuple(tokens), reason)
