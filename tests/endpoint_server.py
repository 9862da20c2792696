"""A server with OpenAI's interface on loopback: scripted faults, or a real model that answers."""

import json
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ROOM_TO_CLOSE = 0.05


def chat_answer(text, *, finish_reason="stop", usage=(5, 7)):
    """A chat completion's body."""
    return {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]},
    }


@contextmanager
def serving(respond, port=0):
    """A server whose answers are `respond(body, number)` -> (status, headers, body as JSON, text or bytes), or "reset",
    ("hang", seconds) or ("drip", bytes), one at a time. Yields (url, the requests received: path, headers, body)."""
    received, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(received)
                received.append((self.path, dict(self.headers), body))
            answer = respond(body, number)
            if answer == "reset":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{half of")
                self.wfile.flush()
                self.connection.close()
                return
            if answer[0] == "drip":
                with suppress(OSError):
                    for letter in answer[1] + b"x" * 100:
                        self.wfile.write(bytes([letter]))
                        self.wfile.flush()
                        time.sleep(0.05)
                return
            if answer[0] == "hang":
                time.sleep(answer[1])
                return
            status, headers, content = answer
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            """Nothing: a test's output is its own."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": ROOM_TO_CLOSE})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
