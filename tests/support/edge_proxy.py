"""A cloud that lies: answers of the real one, changed on their way, over real sockets."""

import http.server
import threading

import httpx


class Liar:
    """Passes requests on; ``lies`` maps a part of a path to ``(status, headers, body) -> the
    same``, changed.

    ``asked`` lists (path, Range header). An answer says what its headers say, also where that is
    not true.
    """

    def __init__(self, url):
        liar = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                headers = {
                    name: value for name, value in self.headers.items() if name.lower() != "host"
                }
                liar.asked.append((self.path, headers.get("range")))
                answer = liar._client.get(
                    url + self.path, headers=headers | {"accept-encoding": "identity"}
                )
                status, body = answer.status_code, answer.content
                said = {
                    k: v
                    for k, v in answer.headers.items()
                    if k in ("content-range", "content-type")
                }
                said["content-length"] = str(len(body))
                for part, lie in liar.lies.items():
                    if part in self.path:
                        status, said, body = lie(status, said, body)
                said["connection"] = "close"
                self.send_response_only(status)
                for name, value in said.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    for piece in [body] if isinstance(body, bytes) else body:
                        self.wfile.write(piece)
                except OSError:
                    pass  # it was refused before its end: as it should be
                self.close_connection = True

            def log_message(self, *_):
                pass

        self.lies, self.asked, self._client = {}, [], httpx.Client()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._client.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def instead(body):
    """A lie: this body, honestly announced."""
    return lambda status, said, _: (200, {"content-length": str(len(body))}, body)
