"""Who speaks for a judge: a chat model in this process, or one behind an OpenAI-compatible endpoint.

A speaker takes conversations (lists of messages with `role` and `content`) and returns one reply for each.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol
from urllib.parse import urlsplit

from mechguard.errors import MechguardError, first_line

Conversation = list[dict[str, str]]
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
PASSING = {408, 409, 425, 429, 500, 502, 503, 504}  # worth another try


class Speaker(Protocol):
    """Anything with a name that replies to conversations."""

    @property
    def name(self) -> str: ...

    def reply(self, conversations: Sequence[Conversation]) -> list[str]: ...


@dataclass(frozen=True)
class ChatModel:
    """A Hugging Face chat model, loaded when it is first asked; greedy.

    Attributes:
        source: a folder, or a name on the hub.
        max_new_tokens: tokens per reply.
        batch_size: conversations per forward pass.
        opened: whether the chat template is asked to open the reply (`add_generation_prompt`).
        device: "auto" takes the accelerator if there is one.
        dtype: of the weights; "auto" keeps the checkpoint's.
        revision: branch, tag or commit on the hub.
    """

    source: str
    max_new_tokens: int = 512
    batch_size: int = 8
    opened: bool = True
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None

    @property
    def name(self) -> str:
        return os.fspath(self.source)

    def reply(self, conversations: Sequence[Conversation]) -> list[str]:
        """One greedy reply for each conversation.

        Raises:
            MechguardError: the model cannot be read, or has no chat template.
        """
        steps = range(0, len(conversations), self.batch_size)
        return [
            text for start in steps for text in self._answer(conversations[start : start + self.batch_size])
        ]

    def render(self, conversations: Sequence[Conversation]) -> list[str]:
        """The exact strings that the model reads."""
        tokenizer = self._parts[1]
        return [
            tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=self.opened)
            for one in conversations
        ]

    def _answer(self, conversations: Sequence[Conversation]) -> list[str]:
        import torch

        model, tokenizer = self._parts
        # The template has written the special tokens.
        encoded = tokenizer(
            self.render(conversations), return_tensors="pt", padding=True, add_special_tokens=False
        )
        encoded = {key: encoded[key].to(model.device) for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            written = model.generate(**encoded, do_sample=False, max_new_tokens=self.max_new_tokens)
        replies = written[:, encoded["input_ids"].shape[1] :]
        return list(tokenizer.batch_decode(replies, skip_special_tokens=True))

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        from mechguard.checkpoints import read_model
        from mechguard.processors import read_processor

        model = read_model(
            self.source, text_only=True, device=self.device, dtype=self.dtype, revision=self.revision
        )
        tokenizer = read_processor(self.source, model.config, self.revision, pictures=False)
        if not tokenizer.chat_template:
            raise MechguardError(
                f"{self.source} has no chat template, which a judge is asked through; take a chat model"
            )
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return model, tokenizer


@dataclass(frozen=True)
class Endpoint:
    """A chat model behind an OpenAI-compatible endpoint: POST URL/chat/completions.

    The key is read from the environment for each call, and is neither kept, printed nor stored.

    Attributes:
        url: the base, such as "https://api.openai.com/v1" or "http://localhost:8000/v1".
        model: the model's name there.
        key_variable: the environment variable that holds the key; none is sent where it is not set.
        max_tokens: tokens per reply.
        attempts: how often one call is tried in all, where the fault may pass.
        patience: seconds before a call counts as failed.
        wait: seconds before the second attempt; doubled for each further one, at most 30.
        parallel: calls under way at once.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    max_tokens: int = 512
    attempts: int = 4
    patience: float = 60.0
    wait: float = 1.0
    parallel: int = 4

    @property
    def name(self) -> str:
        return f"{self.model} at {urlsplit(self.url).hostname}"

    def reply(self, conversations: Sequence[Conversation]) -> list[str]:
        """One reply for each conversation, at temperature 0.

        Raises:
            MechguardError: the endpoint refuses, is out of reach after all attempts, or answers in another
                form; or a key would go over plain http to another machine.
        """
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(self._ask, conversations))

    def _ask(self, messages: Conversation) -> str:
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        for attempt in range(1, self.attempts + 1):
            try:
                with urllib.request.urlopen(self._request(body), timeout=self.patience) as answer:
                    return self._text(answer.read())
            except urllib.error.HTTPError as error:
                pause = error.headers.get("Retry-After", "") if error.headers else ""
                fault = f"status {error.code}: {self._without_key(_start_of(error))}"
                if error.code not in PASSING:
                    raise MechguardError(f"{self.name} refused the call ({fault})") from None
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                pause, fault = "", self._without_key(first_line(error))
            if attempt < self.attempts:
                time.sleep(_seconds(pause, self.wait * 2 ** (attempt - 1)))
        raise MechguardError(f"{self.name} did not answer in {self.attempts} attempts; last: {fault}")

    def _request(self, body: dict[str, Any]) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https"):
            raise MechguardError(f"{self.url!r} is not an http address; write https://HOST/v1")
        if key := os.environ.get(self.key_variable):
            if parts.scheme == "http" and parts.hostname not in LOCAL_HOSTS:
                raise MechguardError(
                    f"the key in {self.key_variable} would go unencrypted to {parts.hostname}; use https, or "
                    "unset it"
                )
            headers["Authorization"] = f"Bearer {key}"
        return urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", data=json.dumps(body).encode(), headers=headers
        )

    def _text(self, content: bytes) -> str:
        try:
            return str(json.loads(content)["choices"][0]["message"]["content"] or "")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise MechguardError(
                f"{self.name} answered in another form than OpenAI's chat completions ({error!r})"
            ) from None

    def _without_key(self, text: str) -> str:
        key = os.environ.get(self.key_variable)
        return text.replace(key, "...") if key else text


def _start_of(error: urllib.error.HTTPError) -> str:
    return (error.read(300).decode(errors="replace").strip() or str(error.reason)).splitlines()[0]


def _seconds(asked: str, otherwise: float) -> float:
    """How long to wait: what the endpoint asked for if it did, never more than 30 seconds."""
    return min(float(asked) if asked.replace(".", "", 1).isdigit() else otherwise, 30.0)
