"""The conversation in a page, served by gradio: a column for each model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from pyprune.chat.speaker import Answer, Conversation, Message, Sampling
from pyprune.chat.terminal import timing
from pyprune.errors import PyPruneError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_installed() -> None:
    """Raises PyPruneError without gradio."""
    if find_spec("gradio") is None:
        raise PyPruneError("web", None, "needs the package gradio", "Install it: pip install 'pyprune[web]'.")


def serve(
    talk: Conversation, host: str = "127.0.0.1", port: int = 7860, say: Callable[[str], None] = print,
    wait: bool = True,
) -> Any:  # fmt: skip
    """Serve the page until the process ends.

    Args:
        talk: who is asked; its histories are left alone, since every browser has its own.
        say: told where the page is.
        wait: False returns at once; the caller closes what is returned.

    Returns:
        The gradio app.

    Raises:
        PyPruneError: gradio is missing, or the address cannot be used.
    """
    check_installed()
    page = build(talk)
    try:
        _, url, _ = page.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, show_error=True
        )
    except OSError as error:
        problem = f"cannot be used: {str(error).splitlines()[0]}"
        raise PyPruneError("port", port, problem, "Give another port, or a host that this machine has.") from None
    say(f"{url} (Ctrl-C ends)")
    if host not in LOOPBACK:
        say("Whoever reaches this machine can use the page: there is no password.")
    if wait:
        try:
            _forever()
        except KeyboardInterrupt:  # the way to end it, so no mistake
            say("ended")
        finally:
            page.close(verbose=False)
    return page


def build(talk: Conversation) -> Any:
    """The page, not yet served."""
    import gradio as gr

    speakers = talk.speakers

    def answer(
        prompt: str, histories: list[list[Message]], max_new_tokens: float, temperature: float, seed: float
    ) -> Iterator[list[Any]]:
        """Yields chats and timings of the models, the histories, and what stands in the input."""
        sampling = Sampling(int(max_new_tokens), float(temperature), int(seed))
        own = Conversation(speakers, sampling)
        own.histories = [list(h) for h in histories]
        before = [list(h) for h in histories]
        answers: list[Answer] = []
        if not prompt.strip():
            yield [*before, *[""] * len(speakers), before, ""]
            return
        try:
            for answers in own.ask(prompt):
                chats = [[*h, {"role": "user", "content": prompt}] for h in before]
                for chat, found in zip(chats, answers, strict=False):
                    chat.append({"role": "assistant", "content": found.text})
                times = [timing(found) for found in answers]
                yield [*chats, *times, *[""] * (len(speakers) - len(times)), histories, ""]
        except PyPruneError as error:
            raise gr.Error(str(error)) from None
        yield [*own.histories, *[timing(found) for found in answers], own.histories, ""]

    def reset() -> list[Any]:
        return [*[[] for _ in speakers], *[""] * len(speakers), [[] for _ in speakers]]

    with gr.Blocks(title="pyprune chat", analytics_enabled=False) as page:
        histories = gr.State([[] for _ in speakers])
        chats, times = [], []
        with gr.Row():
            for speaker in speakers:
                with gr.Column():
                    chats.append(gr.Chatbot(label=speaker.name, height=480, render_markdown=False))
                    times.append(gr.Textbox(label="speed", interactive=False, show_label=False))
        box = gr.Textbox(label="Prompt", autofocus=True)
        with gr.Row():
            send, clear = gr.Button("Send", variant="primary"), gr.Button("Reset")
        with gr.Accordion("Sampling", open=False), gr.Row():
            length = gr.Slider(1, 2048, talk.sampling.max_new_tokens, step=1, label="max_new_tokens")
            heat = gr.Slider(0, 2, talk.sampling.temperature, step=0.05, label="temperature (0: most likely token)")
            seed = gr.Number(talk.sampling.seed, precision=0, minimum=0, label="seed")
        inputs, outputs = [box, histories, length, heat, seed], [*chats, *times, histories, box]
        box.submit(answer, inputs, outputs, api_name="answer")
        send.click(answer, inputs, outputs, api_name=False)
        clear.click(reset, None, [*chats, *times, histories], api_name="reset")
    page.queue(default_concurrency_limit=1)  # one answer at a time, whoever asks
    return page


def _forever() -> None:
    threading.Event().wait()
