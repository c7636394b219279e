"""Prompts to a language model behind an address with OpenAI's chat completions, and its answers."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from spd.config import Unreachable, UserError

TIMEOUT = 120
TRIES = 4
AGAIN = (408, 409, 429, 500, 502, 503, 504)
"""statuses after which the same request may work"""


class Judge(NamedTuple):
    """Where to ask, and whom."""

    url: str
    """up to and without `/chat/completions`"""
    model: str
    key_variable: str = "OPENAI_API_KEY"
    """the variable of the environment that holds the key; without it none is sent"""
    wait: float = 1.0
    """seconds before the second try, doubled with each"""

    def ask(self, prompt: str) -> str:
        """The answer to one prompt; `UserError` if it is refused, `Unreachable` if nothing answers."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        said = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                    return _content(json.loads(response.read()), address)
            except urllib.error.HTTPError as error:
                said = f"status {error.code}: {_start(error.read())}"
                if error.code not in AGAIN:
                    raise UserError(f"{address}: {said}") from None
            except (OSError, ValueError) as error:
                said = str(getattr(error, "reason", error))
        raise Unreachable(f"{address}: no answer after {TRIES} tries ({said})")

    def ask_all(
        self, prompts: Iterable[tuple[str, str]], n_at_once: int
    ) -> Iterator[tuple[str, str]]:
        """Key and answer of each key and prompt, in their order, several asked at a time."""
        pairs = list(prompts)
        with ThreadPoolExecutor(n_at_once) as pool:
            pending = [pool.submit(self.ask, prompt) for _, prompt in pairs]
            try:
                for (key, _), answer in zip(pairs, pending, strict=True):
                    yield key, answer.result()
            finally:
                for answer in pending:
                    answer.cancel()


def check_url(url: str) -> None:
    """`UserError` unless it is an address that may be asked."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--url {url}: an address that begins with http:// or https:// is needed")


def _content(answer: Any, address: str) -> str:
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise UserError(f"{address}: no chat completion, but {_start(json.dumps(answer).encode())}")
    return content


def _start(body: bytes) -> str:
    return " ".join(body.decode(errors="replace").split())[:200]
