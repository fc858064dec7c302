"""Somebody to send to: takes whatever comes over TCP on ports 80 (HTTP PUT and POST) and 9000 (anything), and keeps nothing."""

import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Taker(BaseHTTPRequestHandler):
    """Reads a body to its end and says 200."""

    def do_PUT(self) -> None:
        left = int(self.headers.get("Content-Length", "0"))
        while left > 0 and (piece := self.rfile.read(min(left, 1 << 16))):
            left -= len(piece)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_PUT  # noqa: N815 (names that http.server looks for)

    def log_message(self, format: str, *args: object) -> None:
        pass


def drain(peer: socket.socket) -> None:
    with peer:
        while peer.recv(1 << 16):
            pass


def main() -> None:
    address = sys.argv[1]
    web = ThreadingHTTPServer((address, 80), Taker)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    with socket.create_server((address, 9000)) as server:
        print("ready", flush=True)
        while True:
            peer, _ = server.accept()
            threading.Thread(target=drain, args=(peer,), daemon=True).start()


if __name__ == "__main__":
    main()
