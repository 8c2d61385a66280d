"""The page, asked over HTTP as a browser asks it."""

from __future__ import annotations

import socket
import urllib.request

import pytest

pytest.importorskip("gradio")
client = pytest.importorskip("gradio_client")


@pytest.fixture
def served(speaker):
    """(talk, url, what was said) of a page with two models."""
    from pyprune.chat.page import serve
    from pyprune.chat.speaker import Conversation, Sampling

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    talk = Conversation([speaker("dense"), speaker("other")], Sampling(8))
    said: list[str] = []
    page = serve(talk, "127.0.0.1", port, say=said.append, wait=False)
    yield talk, f"http://127.0.0.1:{port}/", said
    page.close(verbose=False)


def text_of(message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def test_the_page_answers_like_the_terminal_and_each_browser_has_its_history(served) -> None:
    from pyprune.chat.speaker import Conversation
    from pyprune.chat.terminal import last

    talk, url, said = served
    assert said == [f"{url} (Ctrl-C ends)"]
    with urllib.request.urlopen(url) as page:
        assert page.status == 200 and b"pyprune chat" in page.read()
    one, other = (client.Client(url, verbose=False) for _ in range(2))
    own = Conversation(talk.speakers, talk.sampling)
    for prompt in ("Hello", "And you?"):
        found = one.predict(prompt, 8, 0.0, 0, api_name="/answer")
        wanted = [a.text for a in last(own, prompt)]
        assert [text_of(chat[-1]).strip() for chat in found[:2]] == [w.strip() for w in wanted]
        assert all("tokens/s" in timing for timing in found[2:4])
    assert len(found[0]) == 4
    assert len(other.predict("Hello", 8, 0.0, 0, api_name="/answer")[0]) == 2
    one.predict(api_name="/reset")
    assert len(one.predict("Hello", 8, 0.0, 0, api_name="/answer")[0]) == 2
    assert talk.histories == [[], []]


def test_answers_stream_to_the_browser(served) -> None:
    _, url, _ = served
    job = client.Client(url, verbose=False).submit("Hello", 8, 0.0, 0, api_name="/answer")
    job.result()
    assert len(job.outputs()) >= 9


def test_control_c_ends_the_page_without_a_mistake(monkeypatch) -> None:
    from pyprune.chat import page

    said: list[str] = []

    class Quiet:
        """A page that needs no server."""

        def launch(self, **options):
            said.append(options["server_name"])
            return None, "http://there/", None

        def close(self, verbose: bool) -> None:
            said.append("closed")

    def pressed() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(page, "build", lambda talk: Quiet())
    monkeypatch.setattr(page, "_forever", pressed)
    page.serve(None, "0.0.0.0", say=said.append)
    password = "Whoever reaches this machine can use the page: there is no password."
    assert said == ["0.0.0.0", "http://there/ (Ctrl-C ends)", password, "ended", "closed"]


def test_a_port_in_use_is_refused(served) -> None:
    from pyprune.chat.page import serve
    from pyprune.errors import PyPruneError

    talk, url, _ = served
    port = int(url.rstrip("/").rpartition(":")[2])
    with pytest.raises(PyPruneError, match=f"port {port}: cannot be used"):
        serve(talk, "127.0.0.1", port, wait=False)
