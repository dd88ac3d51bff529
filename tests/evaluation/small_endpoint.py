"""A small endpoint of an OpenAI-compatible model, which says what a test wants: slow, wrong, down or right."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, **more):
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop"} | more],
            "usage": {"prompt_tokens": 20, "completion_tokens": len(text.split())}}  # fmt: skip


class Endpoint:
    """A small server; `say(body, number)` gives the reply to the request of this number: an object, bytes, a status with
    bytes and headers, or seconds to be silent for."""

    def __init__(self):
        self.say, self.bodies, self.keys, self.lock = (
            lambda body, n: completion(f"Order {n} it is."),
            [],
            [],
            threading.Lock(),
        )
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                outer.keys.append(self.headers.get("Authorization"))
                self.reply(404, b"{}")

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.bodies.append(body)
                    outer.keys.append(self.headers.get("Authorization"))
                    said = outer.say(body, len(outer.bodies))
                if isinstance(said, float):
                    time.sleep(said)
                    said = completion("late")
                if isinstance(said, tuple):
                    self.reply(*said)
                else:
                    self.reply(200, said if isinstance(said, bytes) else json.dumps(said).encode())

            def reply(self, status, data, headers=()):
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": len(data), **dict(headers)}.items():
                        self.send_header(name, str(value))
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
