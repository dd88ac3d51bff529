"""A small run's models behind the gateway, for the tests of this room."""

import contextlib
import threading
import time

import uvicorn
from starlette.testclient import TestClient

from carelm.evaluation import candidates
from carelm.serving.engine import BatcherEngine
from carelm.serving.gateway import Gateway
from carelm.serving.server import Connection
from carelm.talk.speaker import Speaker

KEYS = ["--max_new_tokens", "24", "--max_length", "96", "--load_in_4bit", "false"]
ASKED = [{"role": "user", "content": "Where is my order?"}]
CHAT = "/v1/chat/completions"


def make_gateway(recipe, *names):
    speakers = [Speaker(recipe, candidates.find(recipe, name)) for name in names]
    return Gateway(recipe, speakers, BatcherEngine(recipe, speakers))


def make_client(gateway, key=None):
    return TestClient(gateway.app(key), base_url="http://127.0.0.1", raise_server_exceptions=False)


def ask(client, messages=ASKED, model="base", **more):
    return client.post(CHAT, json={"model": model, "messages": messages, **more})


def until(is_so, seconds=10):
    """Waits; fails where it is not so after these seconds."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextlib.contextmanager
def listening(gateway, key=None):
    """A real server in this process; its port."""
    server = uvicorn.Server(uvicorn.Config(gateway.app(key), port=0, log_config=None, lifespan="off", http=Connection))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()
