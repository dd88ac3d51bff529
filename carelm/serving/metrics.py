"""What Prometheus may know: requests, tokens, times; no text, and no name that a client makes up."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counts of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        known = {"registry": self.registry}
        self.requests = Counter("carelm_requests", "Requests that are over", ["route", "status"], **known)
        self.prompt_tokens = Counter("carelm_prompt_tokens", "Tokens of prompts", ["model"], **known)
        self.answer_tokens = Counter("carelm_answer_tokens", "Tokens of answers", ["model"], **known)
        self.queue = Gauge("carelm_queue", "Requests that wait or are answered", **known)
        self.first_token = Histogram(
            "carelm_first_token_seconds", "From a request to its first token", ["model"], buckets=SECONDS, **known
        )
        self.total = Histogram(
            "carelm_answer_seconds", "From a request to its last token", ["model"], buckets=SECONDS, **known
        )

    def as_text(self) -> bytes:
        return generate_latest(self.registry)
