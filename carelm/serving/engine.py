"""The engine in this process: one thread steps a batcher for each model, and models of one base share it in memory."""

import asyncio
import queue
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel

from carelm.models.batcher import Batcher, Request, why_not
from carelm.models.decoding import Decoding
from carelm.models.generation import generate
from carelm.models.key_values import cache_tokens, causal_model
from carelm.models.streaming import Tokens
from carelm.recipe import Recipe
from carelm.serving.log import note
from carelm.talk.speaker import Speaker


class EngineError(Exception):
    """The engine broke in the middle of an answer; the next one may go well."""


class _Cancelled(Exception):
    """Whoever asked has gone."""


@dataclass(eq=False)
class Asked:
    """A prompt, and where its tokens go: behind the last one comes None, or what broke."""

    prompt: list[int]
    decoding: Decoding
    loop: asyncio.AbstractEventLoop
    told: asyncio.Queue
    is_cancelled: bool = False
    request: Request | None = None

    def tell(self, what: int | EngineError | None) -> None:
        if not self.is_cancelled:
            self.loop.call_soon_threadsafe(self.told.put_nowait, what)

    def took(self, token: int) -> None:
        if self.is_cancelled:
            raise _Cancelled
        self.tell(token)

    def took_one_of(self, request: Request, token: int) -> None:
        self.took(token)
        if request.finish_reason:
            self.tell(None)


class Base:
    """A base in memory with the LoRA adapters on it, of which one or none is active."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.is_shared = True
        self.lora: PeftModel | None = None
        self.active: str | None = None

    def activate(self, adapter: str | None) -> None:
        """Lets this adapter count, or none."""
        if self.lora is None or adapter == self.active:
            return
        if adapter is None:
            self.lora.base_model.disable_adapter_layers()
        else:
            self.lora.base_model.enable_adapter_layers()
            self.lora.set_adapter(adapter)
        self.active = adapter


class Served:
    """One model, used by the thread that steps.

    Args:
        speaker: the model, loaded.
        base: what it stands on.
        adapter: the name of its LoRA adapter there, or None.
        max_batch_tokens: see `Batcher`.
    """

    def __init__(self, speaker: Speaker, base: Base, adapter: str | None, max_batch_tokens: int):
        self.name, self.chat, self.model, self.device = speaker.name, speaker.chat, speaker.model, speaker.device
        self.base, self.adapter, self.max_batch_tokens = base, adapter, max_batch_tokens
        self.generation_config = causal_model(self.model).generation_config
        self.is_batched = why_not(self.model) is None
        self.asked: list[Asked] = []
        self.meanwhile: Callable[[], None] = lambda: (
            None
        )  # what others do between two tokens of an answer of `generate`
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Lets go of what is asked, and of its keys and values."""
        self.asked.clear()
        causal_model(self.model).generation_config = self.generation_config
        self.batcher = Batcher(self.model, device=self.device, max_batch_tokens=self.max_batch_tokens)

    def step(self) -> None:
        """One token more for each of its answers, or one whole answer where the batcher cannot serve it. What breaks ends them
        with an error, and the next ones begin anew."""
        try:
            self.base.activate(self.adapter)
            if self.is_batched:
                self._step()
            else:
                self._generate(self.asked.pop(0))
        except Exception as error:  # whatever it is, the others and the next ones go on
            at = traceback.extract_tb(error.__traceback__)[-1]
            note(
                f"{self.name}: {type(error).__name__} at {Path(at.filename).name}:{at.lineno}; "
                f"{len(self.asked)} answers end with an error"
            )
            for asked in self.asked:
                asked.tell(EngineError("the engine broke in the middle of this answer; ask again"))
            self._begin_anew()

    def _step(self) -> None:
        for asked in self.asked:
            if asked.request is None:
                asked.request = self.batcher.submit(asked.prompt, asked.decoding, asked.took_one_of)
            if asked.is_cancelled:
                self.batcher.cancel(asked.request)
        over = {id(request) for request in self.batcher.step()}
        self.asked = [asked for asked in self.asked if id(asked.request) not in over]

    def _generate(self, asked: Asked) -> None:
        def took(token: int) -> None:
            asked.took(token)
            self.meanwhile()
            self.base.activate(self.adapter)

        causal_model(self.model).generation_config = self.generation_config
        try:
            generate(self.model, self.chat, [asked.prompt], asked.decoding, device=self.device, streamer=Tokens(took))
            asked.tell(None)
        except _Cancelled:
            pass
        except Exception:
            self.asked.insert(0, asked)
            raise


class BatcherEngine:
    """Answers by the evaluator's own way: token ids in, token ids out.

    Args:
        recipe: names `max_batch_tokens`.
        speakers: the models; their weights are loaded here, and none takes a request that is longer than a batch may be.

    Raises:
        UserError: where one cannot be loaded.
    """

    def __init__(self, recipe: Recipe, speakers: list[Speaker]):
        # Each thread that computes has a pool of its own in OpenMP. Where the pools together have more threads than there are
        # cores, theirs sleep between two operations: with a second pool the demo gave a third of the tokens on two cores.
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._served: dict[str, Served] = {}
        for speaker, base, adapter in _load(speakers):
            share = int(min(recipe.max_batch_tokens, cache_tokens(speaker.model, speaker.device) / len(speakers)))
            speaker.bound(share)  # the keys and values of a request are set aside when it comes
            served = self._served[speaker.name] = Served(speaker, base, adapter, share)
            served.meanwhile = self._step_batches
        self._inbox: queue.SimpleQueue[tuple[Served, Asked] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def models(self) -> list[str]:
        return list(self._served)

    async def answer(self, model: str, prompt_ids: list[int], decoding: Decoding) -> AsyncIterator[int]:
        """The ids of an answer as they come, the end of turn too; closing the iterator ends the answer.

        Raises:
            EngineError: where the engine broke.
        """
        asked = Asked(prompt_ids, decoding, asyncio.get_running_loop(), asyncio.Queue())
        self._inbox.put((self._served[model], asked))
        try:
            while (told := await asked.told.get()) is not None:
                if isinstance(told, EngineError):
                    raise told
                yield told
        finally:
            asked.is_cancelled = True

    async def ready(self) -> bool:
        return self._thread.is_alive()

    async def close(self) -> None:
        """Ends the thread; what is not over ends with an error."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        torch.set_num_threads(self._threads)

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while self._take_in():
            for served in self._served.values():
                if served.asked:
                    served.step()
        for served in self._served.values():
            for asked in served.asked:
                asked.tell(EngineError("the server stops"))

    def _step_batches(self) -> None:
        """One token more for each answer that a batcher gives; its models may be asked meanwhile."""
        if not self._take_in(waits=False):
            self._inbox.put(None)  # the end, once this answer is over
        for served in self._served.values():
            if served.is_batched and served.asked:
                served.step()

    def _take_in(self, waits: bool = True) -> bool:
        """Gives what has been asked to its model, and waits where there is nothing to do; False at the end."""
        is_idle = waits and not any(served.asked for served in self._served.values())
        while is_idle or not self._inbox.empty():
            if (new := self._inbox.get()) is None:
                return False
            served, asked = new
            served.asked.append(asked)
            is_idle = False
        return True


def _load(speakers: list[Speaker]) -> list[tuple[Speaker, Base, str | None]]:
    """Loads the models, each base once; an adapter that changes more of it than LoRA layers has a base of its own."""
    loaded: list[tuple[Speaker, Base, str | None]] = []
    for speaker in speakers:
        parts = _parts_of(speaker.candidate.adapter)
        shared = [base for other, base, _ in loaded
                  if base.is_shared and other.candidate.shares_base(speaker.candidate)]  # fmt: skip
        base = shared[0] if shared and "other" not in parts else None
        onto = base and (base.lora if parts == {"lora"} and base.lora else base.model)
        speaker.load(onto)
        base = base or Base(causal_model(speaker.model))
        base.is_shared = "other" not in parts
        adapter = speaker.candidate.adapter_name if parts and "prompt" not in parts else None
        if adapter:
            base.lora, base.active = speaker.model, None
            base.activate(adapter)
        loaded.append((speaker, base, adapter))
    return loaded


def _parts_of(adapter: Path | None) -> set[str]:
    """What kinds of tensors an adapter holds: lora, prompt, other."""
    if adapter is None:
        return set()
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return {
            "lora" if ".lora_" in key else "prompt" if key == "prompt_embeddings" else "other" for key in file.keys()
        }
