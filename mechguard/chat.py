"""Chat: the exact string that is sent for a prompt, with the picture where the model wants it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mechguard.errors import MechguardError, first_line
from mechguard.prompts import Prompt


@dataclass(frozen=True)
class Chat:
    """How prompts become strings.

    Attributes:
        template: "chat" (the one that came with the processor or tokenizer), a Jinja template, or None for
            the bare text behind a placeholder for each picture.
        system: what stands in the system's place before every prompt.
    """

    template: str | None = "chat"
    system: str | None = None

    def render(self, prompt: Prompt, processor: Any, *, plain: str = "{image}\n{text}") -> str:
        """The string for one prompt.

        Args:
            prompt: its text, and as many placeholders as it has pictures.
            processor: a processor, or the tokenizer of a text-only model.
            plain: where text and pictures stand without a template.

        Raises:
            MechguardError: the template does not take these messages.
        """
        from jinja2.exceptions import TemplateError

        tokenizer = getattr(processor, "tokenizer", processor)
        if self.template is None or not _template_of(processor):
            body = _plain(prompt, processor, plain)
            return body if self.system is None else f"{self.system}\n\n{body}"
        # A processor's own template takes text and pictures as parts, a tokenizer's takes a string.
        parts = processor is not tokenizer and bool(getattr(processor, "chat_template", None))
        messages = _messages(prompt, self.system, parts, processor, plain)
        speaker = processor if parts else tokenizer
        options = {} if self.template == "chat" else {"chat_template": self.template}
        try:
            return str(
                speaker.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise MechguardError(
                f"the chat template cannot render prompt {prompt.id!r} ({first_line(error)}); use "
                "template=None, or a template of your own"
            ) from None


class KnownStrings:
    """The strings of the last prompts that were rendered.

    Prompts are sorted by the length of their strings before they are sent: what is rendered once is wanted
    twice.
    """

    def __init__(self, limit: int = 4096) -> None:
        self._limit = limit
        self._known: dict[tuple[Any, ...], str] = {}

    def render(self, chat: Chat, prompt: Prompt, processor: Any, *, plain: str) -> str:
        """What `chat.render` gives, also after the processor's template was changed."""
        token = str(getattr(processor, "image_token", None))
        key = (chat, prompt.text, len(prompt.images), str(_template_of(processor)), token, plain)
        if key not in self._known:
            if len(self._known) >= self._limit:
                self._known.pop(next(iter(self._known)))
            self._known[key] = chat.render(prompt, processor, plain=plain)
        return self._known[key]


def _template_of(processor: Any) -> Any:
    tokenizer = getattr(processor, "tokenizer", processor)
    return getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)


def _plain(prompt: Prompt, processor: Any, plain: str) -> str:
    token = str(getattr(processor, "image_token", "<image>"))
    if not prompt.images:
        return prompt.text
    return plain.replace("{image}", token * len(prompt.images)).replace("{text}", prompt.text)


def _messages(
    prompt: Prompt, system: str | None, parts: bool, processor: Any, plain: str
) -> list[dict[str, Any]]:
    def content(text: str, pictures: int) -> Any:
        if not parts:
            return _plain(prompt, processor, plain) if pictures else text
        return [{"type": "image"}] * pictures + [{"type": "text", "text": text}]

    user = {"role": "user", "content": content(prompt.text, len(prompt.images))}
    return [user] if system is None else [{"role": "system", "content": content(system, 0)}, user]
