"""A mail server that keeps what it is given."""

from __future__ import annotations

import email
import socketserver
import threading
from email.message import Message


class Mailbox(socketserver.ThreadingTCPServer):
    """SMTP as far as a program speaks it that sends one message at a time: without extensions, for anybody."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Session)
        self.messages: list[Message] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        """Return where it listens."""
        return f"127.0.0.1:{self.server_address[1]}"

    def with_subject(self, *words: str) -> list[Message]:
        """Return the messages whose subject has all these words."""
        return [message for message in self.messages if all(word in str(message["subject"]) for word in words)]

    def end(self) -> None:
        """Stop listening."""
        self.shutdown()
        self.server_close()


class _Session(socketserver.StreamRequestHandler):
    server: Mailbox

    def handle(self) -> None:
        self._say("220 mailbox")
        while line := self.rfile.readline().upper():
            if line.startswith(b"DATA"):
                self._say("354 go on")
                lines = iter(self.rfile.readline, b".\r\n")
                self.server.messages.append(email.message_from_bytes(b"".join(lines)))
            self._say("221 bye" if line.startswith(b"QUIT") else "250 ok")

    def _say(self, text: str) -> None:
        self.wfile.write(f"{text}\r\n".encode())


def text_of(message: Message) -> str:
    """Return what a message says."""
    parts = [part for part in message.walk() if not part.is_multipart()]
    return "".join(part.get_payload(decode=True).decode() for part in parts)  # type: ignore[union-attr]
