"""`lmm serve`: a page on this machine that asks one LLaVA model about images, or two side by side.

It listens on 127.0.0.1 alone. Nothing is fetched from elsewhere and nothing is reported: fonts and scripts come from this
machine, and a Content-Security-Policy keeps the browser from asking any other. Uploads are decoded whole before they are
shown or answered, and an answer is shown as the text it is, whatever markup it holds.
"""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from lift.common.errors import UserError
from lift.common.images import ImageFault, decode_image
from lmm.dialogue import Dialogue, printable
from lmm.inference import Decoding, Llava
from lmm.settings import ServeSettings

SHOWN_PIXELS = 512
"""Longer side of an image in the conversation."""

HOSTS = ["127.0.0.1", "localhost"]
"""Names under which the page answers: a site elsewhere that points its own name here is refused."""

UPLOADS_KEPT_SECONDS = 3600
SESSIONS_KEPT = 32
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
# Gradio's own buttons to share an image with a site elsewhere and to empty one column alone would mislead here.
STYLE = """
#columns .message-content { white-space: pre-wrap; overflow-wrap: anywhere }
footer, #columns .message-buttons-right, #columns button[aria-label="Share"],
#columns button[aria-label="Clear"] { display: none !important }
@media (max-width: 700px) { #answers0, #answers1 { height: 38vh !important } }
"""


def serve(settings: ServeSettings) -> None:
    """Command `lmm serve`: until Ctrl-C. Raises UserError for unusable folders, a taken port, or when gradio is missing."""
    folders = [settings.model] if settings.against is None else [settings.model, settings.against]
    gradio()
    models = [Llava(folder, settings.dtype, settings.device) for folder in folders]
    page = Page(models, Decoding(settings.max_new_tokens, settings.temperature, settings.seed))
    url = launch(page, settings.port, settings.max_upload_mb)
    print(f"{url} answers on this machine alone; Ctrl-C ends it.")
    page.blocks.block_thread()


def gradio() -> Any:
    """The library, told to report nothing before it is imported. Raises UserError when it is not installed."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    try:
        import gradio
    except ImportError as error:
        raise UserError('lmm serve needs gradio: pip install "lift-toolkit[serve]" (with constraints.txt).') from error
    return gradio


def launch(page: Page, port: int, max_upload_mb: int) -> str:
    """Starts the server in the background and returns its address. Raises UserError when the port is taken."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    gr = gradio()
    try:
        _, url, _ = page.blocks.launch(
            server_name="127.0.0.1",
            server_port=port or _free_port(),
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            max_file_size=f"{max_upload_mb}mb",
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            state_session_capacity=SESSIONS_KEPT,
            theme=gr.themes.Base(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
            css=STYLE,
            app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS), Middleware(_SecurityHeaders)]},
        )
    except OSError as error:
        raise UserError(f"--port {port}: cannot be opened: {error}. Choose another, or 0 for a free one.") from error
    return url


class Page:
    """The page of one or two models; `blocks` is what gradio serves."""

    def __init__(self, models: list[Llava], decoding: Decoding) -> None:
        self.models, self.decoding = models, decoding
        self.shown_images = tempfile.TemporaryDirectory(prefix="lmm_serve_")  # removed with the page
        gr = self.gr = gradio()
        with gr.Blocks(
            title="Ask a LLaVA model", analytics_enabled=False, delete_cache=(UPLOADS_KEPT_SECONDS, UPLOADS_KEPT_SECONDS)
        ) as self.blocks:
            dialogues = [gr.State(Dialogue(), time_to_live=UPLOADS_KEPT_SECONDS) for _ in models]
            with gr.Row(elem_id="columns"):
                chats = [self._chatbot(number) for number in range(len(models))]
            box = gr.MultimodalTextbox(
                elem_id="ask",
                show_label=False,
                placeholder="Ask about an image: drop it here or choose it with the button",
                file_types=["image"],
                file_count="multiple",
                sources=["upload"],
                max_plain_text_length=20_000,
            )
            again = gr.Button("New conversation", elem_id="again", size="sm")
            private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
            asked = box.submit(self.ask, [box, *dialogues, *chats], [box, *dialogues, *chats], **private)
            answering = [
                asked.success(
                    partial(self.answer, number),
                    [dialogues[number], chats[number]],
                    [dialogues[number], chats[number]],
                    concurrency_limit=1,
                    concurrency_id=f"model {number}",
                    **private,
                )
                for number in range(len(models))
            ]
            again.click(self.reset, None, [box, *dialogues, *chats], cancels=answering, **private)
        self.blocks.queue(max_size=SESSIONS_KEPT)

    def _chatbot(self, number: int) -> Any:
        return self.gr.Chatbot(
            label=_title(self.models[number].folder),
            elem_id=f"answers{number}",
            height="65vh",
            min_width=300,
            render_markdown=False,
            sanitize_html=True,
            allow_tags=False,
            allow_file_downloads=False,
            group_consecutive_messages=False,
            reasoning_tags=[],
            latex_delimiters=[],
            buttons=[],
            feedback_options=None,
        )

    def ask(self, box: dict[str, Any], *state: Any) -> list[Any]:
        """Takes a question into every conversation; a fault is told beside the page and changes nothing."""
        dialogues, chats = list(state[: len(self.models)]), list(state[len(self.models) :])
        if any(dialogue.waits_for_answer for dialogue in dialogues):
            return self._refused("the last question is still being answered. Wait, or start a new conversation.", state)
        try:
            images = [_decode(Path(file)) for file in box.get("files") or []]
            dialogues = [dialogue.with_question(box.get("text") or "", images) for dialogue in dialogues]
            for model, dialogue in zip(self.models, dialogues, strict=True):
                dialogue.prompt(model, self.decoding.max_new_tokens)
        except UserError as error:
            return self._refused(str(error), state)
        entries: list[dict[str, Any]] = [
            {"role": "user", "content": {"path": str(self._shown(image)), "alt_text": "uploaded image"}} for image in images
        ]
        entries.append({"role": "user", "content": _as_text(box["text"].strip())})
        return [{"text": "", "files": []}, *dialogues, *([*chat, *entries] for chat in chats)]

    def answer(self, number: int, dialogue: Dialogue, chat: list[dict[str, Any]]) -> Iterator[tuple[Any, Any]]:
        """One model's answer as it grows."""
        if not dialogue.waits_for_answer:  # the question was refused, or answered meanwhile
            yield self.gr.skip(), self.gr.skip()
            return
        model, text = self.models[number], ""
        prompt = dialogue.prompt(model, self.decoding.max_new_tokens)
        for piece in model.stream(prompt, self.decoding):
            text += piece
            yield self.gr.skip(), [*chat, {"role": "assistant", "content": _as_text(text)}]
        shown = _as_text(text) if text.strip() else "(no answer)"
        yield dialogue.with_answer(text), [*chat, {"role": "assistant", "content": shown}]

    def reset(self) -> list[Any]:
        return [{"text": "", "files": []}, *(Dialogue() for _ in self.models), *([] for _ in self.models)]

    def _shown(self, image: Image.Image) -> Path:
        """A small copy of the pixels alone: what else an upload holds is never sent back."""
        small = image.copy()
        small.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
        handle, name = tempfile.mkstemp(suffix=".png", dir=self.shown_images.name)
        with os.fdopen(handle, "wb") as file:
            small.save(file, "PNG")
        return Path(name)

    def _refused(self, message: str, state: tuple[Any, ...]) -> list[Any]:
        """Tells it beside the page and leaves all as it is. An error of gradio's would be laid over the conversations."""
        self.gr.Warning(_as_text(message), title="Not asked")
        return [self.gr.skip() for _ in range(1 + len(state))]


def _decode(path: Path) -> Image.Image:
    try:
        return decode_image(path)
    except (OSError, ImageFault) as error:
        raise UserError(f"{path.name}: not an image that can be decoded: {error}") from error


def _as_text(text: str) -> str:
    """HTML that shows `text` as it is: what Chatbot and Warning take is HTML, which gradio cleans of scripts but interprets."""
    return html.escape(printable(text))


def _title(folder: Path) -> str:
    """Folder and its parent, for `runs/lift/stage2` beside `runs/clip/stage2`."""
    return printable("/".join(folder.resolve().parts[-2:]))


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class _SecurityHeaders:
    """ASGI middleware that adds the policy to every response."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        async def send_with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)
