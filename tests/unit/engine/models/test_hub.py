"""A repository id: what says whether the model runs is fetched first, of one commit, and only what is needed. A server
of the hub's layout runs in this process."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentspeed import Engine, errors
from agentspeed.cli.app import app
from agentspeed.cli.engine_flags import at_revision
from agentspeed.cli.statuses import EXIT_REFUSED
from agentspeed.transport.hub import resolve
from tests.support.paged import CONFIG
from tests.support.random_checkpoint import make_checkpoint

REPO = "somebody/small-model"


class Hub:
    """Revisions by name, each a commit with its files; keeps what was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, str] = {}
        self.fetched: list[str] = []
        self.revisions: list[str] = []
        self.broken: set[str] = set()
        self.closed = ""

    def publish(self, revision: str, files: dict[str, bytes]) -> str:
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.files[commit], self.commits[revision], self.commits[commit] = files, commit, commit
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """(Status, headers, body) of a GET."""
        path = path.split("?")[0]
        if self.closed:
            return 401, {"X-Error-Code": self.closed} if self.closed != "401" else {}, b"{}"
        if path.startswith(f"/api/models/{REPO}"):
            *_, kind, revision = (
                path.removeprefix(f"/api/models/{REPO}").split("/") if path.count("/") > 4 else ("", "revision", "main")
            )
            self.revisions.append(revision)
            commit = self.commits.get(revision)
            if commit is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            names = sorted(self.files[commit])
            if kind == "tree":
                listed: Any = [
                    {"type": "file", "path": name, "size": len(self.files[commit][name]), "oid": "0" * 40}
                    for name in names
                ]
            else:
                listed = {"id": REPO, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
            return 200, {"Content-Type": "application/json"}, json.dumps(listed).encode()
        if path.startswith(f"/{REPO}/resolve/"):
            revision, name = path.removeprefix(f"/{REPO}/resolve/").split("/", 1)
            commit = self.commits.get(revision)
            held = self.files.get(commit or "", {}).get(name)
            if held is None:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            if name in self.broken:
                return 403, {}, b""
            etag = f'"{hashlib.sha1(held).hexdigest()}"'
            return 200, {"ETag": etag, "X-Repo-Commit": commit or ""}, held
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._respond(body=True)

        def do_HEAD(self) -> None:
            self._respond(body=False)

        def _respond(self, *, body: bool) -> None:
            status, headers, held = served.answer(self.path)
            if body and status == 200 and "/resolve/" in self.path:
                served.fetched.append(self.path.split("?")[0].split("/resolve/")[1].split("/", 1)[1])
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(held)))
            self.end_headers()
            if body:
                self.wfile.write(held)

        def log_message(self, *arguments: object) -> None:
            del arguments

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    from huggingface_hub import constants, snapshot_download  # noqa: F401 - so that its constants are there to be set

    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = make_checkpoint(CONFIG, tmp_path_factory.mktemp("model"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


NOT_NEEDED = {
    "README.md": b"words",
    "pytorch_model.bin": b"old",
    "model.onnx": b"other",
    "modeling.py": b"raise",
    "consolidated.safetensors": b"the same again",
    "original/params.json": b"{}",
    "logo.json": b"{}",
}


def test_a_model_is_fetched_configuration_first_and_nothing_that_is_not_needed(
    hub: Hub, model: dict[str, bytes]
) -> None:
    commit = hub.publish("main", model | NOT_NEEDED)
    folder = resolve(REPO)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == model
    assert hub.fetched[0] == "config.json" and hub.fetched[-1] == "model.safetensors"
    assert sorted(hub.fetched) == sorted(model)
    assert folder.name == commit and folder.is_absolute()
    hub.fetched.clear()
    assert resolve(REPO) == folder
    assert hub.fetched == [], "what is there is not fetched again"


UNFIT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model_type": "qwen2_moe"}, errors.ModelUnsupported, "The nearest family that runs is qwen3_moe"),
    (CONFIG | {"quantization_config": {"quant_method": "awq"}}, errors.ModelUnsupported, "'awq'"),
    (CONFIG | {"hidden_size": 0}, errors.ModelBroken, "hidden_size is 0"),
]


@pytest.mark.parametrize(("config", "kind", "words"), UNFIT, ids=[case[2] for case in UNFIT])
def test_what_does_not_run_is_refused_with_nothing_but_its_configuration_fetched(
    hub: Hub, model: dict[str, bytes], config: dict[str, Any], kind: type[Exception], words: str
) -> None:
    hub.publish("main", model | {"config.json": json.dumps(config).encode()})
    with pytest.raises(kind, match=words):
        resolve(REPO)
    assert hub.fetched == ["config.json"]


def test_a_quantisation_declared_beside_the_configuration_is_refused_as_early(
    hub: Hub, model: dict[str, bytes]
) -> None:
    hub.publish("main", model | {"hf_quant_config.json": b"{}"})
    with pytest.raises(errors.ModelUnsupported, match="hf_quant_config"):
        resolve(REPO)
    assert sorted(hub.fetched) == ["config.json", "hf_quant_config.json"]


def test_only_the_shards_that_the_index_names_are_fetched(hub: Hub, model: dict[str, bytes]) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}
    files = {name: held for name, held in model.items() if name != "model.safetensors"}
    files |= {"model.safetensors.index.json": json.dumps(index).encode(), **{name: name.encode() for name in shards}}
    hub.publish("main", files | {"model-00003-of-00003.safetensors": b"of an older export"})
    resolve(REPO)
    assert sorted(hub.fetched) == sorted(files)
    assert set(hub.fetched[-2:]) == set(shards)


def test_who_asks_what_a_model_is_fetches_no_weights(hub: Hub, model: dict[str, bytes]) -> None:
    _ = hub.publish("main", model)
    folder = resolve(REPO, weights=False)
    assert (folder / "tokenizer.json").is_file() and not [name for name in hub.fetched if "safetensors" in name]


def test_an_index_that_leaves_the_folder_fetches_nothing_more(hub: Hub, model: dict[str, bytes]) -> None:
    files = {name: held for name, held in model.items() if name != "model.safetensors"}
    index = {"weight_map": {"a": "../../secrets.safetensors"}}
    hub.publish("main", files | {"model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(errors.ModelBroken, match="inside the model folder"):
        resolve(REPO)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_repository_without_a_file_that_is_needed_is_told_so(hub: Hub, model: dict[str, bytes], missing: str) -> None:
    hub.publish("main", {name: held for name, held in model.items() if name != missing} | {"pytorch_model.bin": b"x"})
    with pytest.raises(errors.ModelBroken, match=missing) as caught:
        resolve(REPO)
    assert caught.value.remedy
    assert missing == "model.safetensors" or "model.safetensors" not in hub.fetched


def test_a_tiktoken_vocabulary_is_fetched_where_it_is_the_tokenizer(hub: Hub, model: dict[str, bytes]) -> None:
    files = {name: held for name, held in model.items() if name != "tokenizer.json"} | {"tiktoken.model": b"IQ== 0\n"}
    hub.publish("main", files)
    assert (resolve(REPO) / "tiktoken.model").read_bytes() == b"IQ== 0\n"
    hub.publish("main", model | {"tiktoken.model": b"IQ== 0\n"})
    hub.fetched.clear()
    assert not (resolve(REPO) / "tiktoken.model").exists()


def test_a_revision_is_what_is_fetched_and_all_of_one_commit(hub: Hub, model: dict[str, bytes]) -> None:
    hub.publish("main", model)
    old = hub.publish("v1", model | {"tokenizer_config.json": b'{"chat_template": "old"}'})
    for revision in ("v1", old):
        folder = resolve(REPO, revision)
        assert folder.name == old
        assert (folder / "tokenizer_config.json").read_bytes() == b'{"chat_template": "old"}'
    assert "main" not in hub.revisions
    with pytest.raises(errors.ModelBroken, match="could not be fetched"):
        resolve(REPO, "v9")


def test_a_branch_that_moves_meanwhile_does_not_mix_two_commits(hub: Hub, model: dict[str, bytes]) -> None:
    first = hub.publish("main", model)
    answer = hub.answer

    def moving(path: str) -> tuple[int, dict[str, str], bytes]:
        found = answer(path)
        if path.endswith("/config.json"):
            hub.publish("main", model | {"tokenizer_config.json": b"{}"})
        return found

    hub.answer = moving  # type: ignore[method-assign]
    folder = resolve(REPO)
    assert folder.name == first
    assert (folder / "tokenizer_config.json").read_bytes() == model["tokenizer_config.json"]


def test_what_was_fetched_is_found_without_a_network(
    hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.publish("main", model)
    folder = resolve(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve(REPO) == folder


@pytest.mark.parametrize("name", ["somebody/unknown", "not a name/x y", "a--b/.."])
def test_a_repository_that_is_not_there_is_told_so(hub: Hub, name: str) -> None:
    with pytest.raises(errors.ModelBroken, match="could not be fetched") as caught:
        resolve(name)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("closed", "words"),
    [
        ("GatedRepo", "agreed to the terms"),
        ("RepoNotFound", "none that you may read"),
        ("401", "none that you may read"),
    ],
)
def test_a_repository_that_needs_a_token_is_told_so(hub: Hub, model: dict[str, bytes], closed: str, words: str) -> None:
    hub.publish("main", model)
    hub.closed = closed
    with pytest.raises(errors.ModelBroken, match=words) as caught:
        resolve(REPO)
    assert caught.value.remedy is not None and "HF_TOKEN" in caught.value.remedy


def test_a_revision_that_is_not_there_is_told_by_its_name(hub: Hub, model: dict[str, bytes]) -> None:
    hub.publish("main", model)
    with pytest.raises(errors.ModelBroken, match="it has no revision 'v9'"):
        resolve(REPO, "v9")


def test_a_server_that_fails_is_told_by_our_own_error(hub: Hub, model: dict[str, bytes]) -> None:
    hub.publish("main", model)
    hub.broken.add("tokenizer.json")
    with pytest.raises(errors.ModelBroken, match="could not be fetched"):
        resolve(REPO)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"])
async def test_an_engine_fetches_the_revision_it_is_given(
    hub: Hub, model: dict[str, bytes], anyio_backend: object
) -> None:
    hub.publish("main", model)
    with pytest.raises(errors.ModelBroken, match="could not be fetched"):
        await Engine(REPO, revision="v9").start()
    assert set(hub.revisions) == {"v9"}
    with pytest.raises(errors.InvalidRequest, match="revision is 9"):
        Engine(REPO, revision=9)


def test_commands_fetch_the_revision_they_are_given_and_weights_for_an_engine_alone(
    hub: Hub, model: dict[str, bytes]
) -> None:
    hub.publish("v1", model)
    runner = CliRunner()
    for command in (["kernels", REPO], ["models", REPO]):
        done = runner.invoke(app, [*command, "--revision", "v1"])
        assert done.exit_code == 0, done.output
    assert "model.safetensors" not in hub.fetched
    for command in (["chat", REPO, "-p", "Hello!"], ["engine", REPO], ["serve", REPO], ["kernels", REPO]):
        done = runner.invoke(app, [*command, "--revision", "v9"])
        assert done.exit_code == EXIT_REFUSED and "it has no revision 'v9'" in done.output
    assert "main" not in hub.revisions
    assert at_revision(REPO, "v1") == resolve(REPO, "v1")
    assert "model.safetensors" in hub.fetched


def test_a_folder_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidRequest, match="has no revisions"):
        resolve(tmp_path, "main")


def test_a_folder_is_resolved_to_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "model")
    monkeypatch.chdir(tmp_path / "a")
    assert resolve("./model") == resolve("../link") == (tmp_path / "a" / "model").resolve()
