"""Published weights: the catalogue, finding, downloading from a hub of our own, verifying, the command."""

import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
import tomllib

import numpy as np
import pytest

from ddpo_jax.commands import _cli as cli
from ddpo_jax.commands import weights as command
from ddpo_jax.errors import InputError
from ddpo_jax.models import weights
from ddpo_jax.models.weights import catalogue

ROOT = pathlib.Path(__file__).resolve().parents[3]
COMMIT = "0123456789abcdef" * 2 + "01234567"


def table(name, content=b"", **fields):
    """An entry of a catalogue; with content it is pinned."""
    values = {
        "used_by": "a test", "host": "hub", "repo": "owner/repository", "revision": COMMIT, "file": f"part/{name}.txt",
        "sha256": hashlib.sha256(content).hexdigest() if content else "", "bytes": len(content), "format": "text",
        "licence": "MIT", "terms": "",
    } | fields  # fmt: skip
    return f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A machine without any weights: its home and the hub's cache are new. Returns a folder for weights."""
    from huggingface_hub import constants

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("DDPO_WEIGHTS", raising=False)
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


@pytest.fixture
def known(tmp_path, monkeypatch):
    """``known(table, ...)`` is the catalogue from then on."""

    def use(*tables):
        (tmp_path / "catalogue.toml").write_text("\n".join(tables))
        monkeypatch.setattr(catalogue, "CATALOGUE", tmp_path / "catalogue.toml")
        catalogue.entries.cache_clear()

    yield use
    monkeypatch.undo()
    catalogue.entries.cache_clear()


def place(folder, file, content):
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(content)
    return folder / file


# --- the catalogue ---


def test_the_catalogue_is_complete_and_its_copy_the_same():
    text = catalogue.CATALOGUE.read_text()
    assert text == (ROOT / "third_party/weights.toml").read_text(), (
        "cp ddpo_jax/models/weights/catalogue.toml third_party/weights.toml"
    )
    entries = weights.entries()
    assert set(tomllib.loads(text)) == set(entries) >= {
        "aesthetic_head", "clip_l14", "clip_b32", "hps_v2", "hps_v2_1", "pickscore", "image_reward", "blip_vqa",
        *(f"{model}_{part}" for model in ("sd15", "sd21") for part in ("unet", "vae", "text_encoder")),
    }  # fmt: skip
    for entry in entries.values():
        assert entry.repo.count("/") == 1 and entry.file and entry.licence and entry.used_by, entry
        assert entry.host in ("hub", "code") and entry.format in ("safetensors", "torch-zip", "text")
        # A checksum belongs to a file at a commit; without a checksum there is no size either.
        assert (entry.sha256 == "") == (entry.bytes == 0) == (not entry.pinned)
        assert not entry.pinned or (len(bytes.fromhex(entry.sha256)) == 32 and len(bytes.fromhex(entry.revision)) == 20)
    provenance = (ROOT / "third_party/PROVENANCE.md").read_text()
    for name in entries:  # sd15_* stands for its three
        assert name in provenance or f"{name[:5]}*" in provenance, name


def test_the_catalogue_is_installed():
    data = (ROOT / "setup.py").read_text()
    assert "models/weights/*.toml" in data
    assert catalogue.CATALOGUE.parent == pathlib.Path(catalogue.__file__).parent


def test_the_revisions_are_those_that_models_are_read_at():
    from ddpo_jax.config.model import PINNED

    for entry in weights.entries().values():
        if entry.repo in PINNED:
            assert entry.revision == PINNED[entry.repo]


def test_unknown_names(known):
    with pytest.raises(InputError, match="received 'hps_v3'; did you mean hps_v2. it must be one of aesthetic_head"):
        weights.entry("hps_v3")


# --- verifying ---


def test_verification_is_byte_exact_and_remembered(home, known):
    content = b"some weights"
    known(table("mine", content), table("free"))
    path = place(home, "f", content)
    assert not catalogue.is_verified(path, "mine")
    assert weights.verify(path, "mine") == path and catalogue.is_verified(path, "mine")
    assert weights.verify(path, "free") == path and not catalogue.is_verified(path, "free")  # nothing to compare with
    status = path.stat()
    path.write_bytes(b"same length!")
    with pytest.raises(InputError, match="its sha256 is .*delete it and get part/mine.txt of owner/repository at rev"):
        weights.verify(path, "mine")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights.verify(path, "mine") == path  # same size and time: not computed again, which is what is remembered
    with pytest.raises(InputError, match="its sha256 is"):
        weights.verify(path, "mine", again=True)
    path.write_bytes(b"cut")
    with pytest.raises(InputError, match="it has 3 bytes; mine has 12"):
        weights.verify(path, "mine")
    for gone in (home / "gone", home):
        with pytest.raises(InputError, match="cannot be read|bytes"):
            weights.verify(gone, "mine")


@pytest.mark.parametrize("memory", [b"", b"[]", b"{", b"\xff", b'{"a": 1}', b"[" * 100_000])
def test_a_damaged_memory_is_made_again(home, known, tmp_path, memory):
    known(table("mine", b"some weights"))
    path = place(home, "f", b"some weights")
    place(tmp_path, "home/.cache/ddpo_jax/verified.json", memory)
    assert weights.verify(path, "mine") == path and catalogue.is_verified(path, "mine")


def test_a_home_that_cannot_be_written_costs_time_only(home, known, tmp_path):
    known(table("mine", b"some weights"))
    (tmp_path / "home").write_text("a file in its place")
    path = place(home, "f", b"some weights")
    assert weights.verify(path, "mine") == path and not catalogue.is_verified(path, "mine")


# --- finding ---


def test_folders_are_searched_in_order(home, known, tmp_path, monkeypatch):
    known(table("one", b"1"), table("two", b"2", file="two.txt"), table("three", b"3", file="other/two.txt"))
    cached = tmp_path / "home/.cache/ddpo_jax/weights"
    variable, option = tmp_path / "variable", home
    variable.mkdir()
    monkeypatch.setenv("DDPO_WEIGHTS", str(variable))
    expected = []
    for folder in (cached, variable, option):
        expected.append(place(folder, "owner/repository/part/one.txt", b"1"))
        assert weights.find_weights("one", str(option)) == expected[-1]
    assert weights.find_weights("one") == expected[1]
    flat = place(option, "one.txt", b"1")
    expected[-1].unlink()
    assert weights.find_weights("one", str(option)) == flat
    place(option, "two.txt", b"2")  # two entries have a file of this name: it may be either's
    with pytest.raises(InputError, match="weights two: two.txt of the hub repository owner/repository"):
        weights.find_weights("two", str(option))


def test_the_hubs_cache_is_searched(home, known, tmp_path):
    known(table("one", b"1"))
    cached = tmp_path / "hub/models--owner--repository/snapshots" / COMMIT / "part/one.txt"
    place(cached.parent, "one.txt", b"1")
    assert weights.find_weights("one") == cached


def test_a_file_that_is_not_the_published_one_is_refused(home, known):
    known(table("one", b"1"), table("two", file="two.pt", format="torch-zip"))
    place(home, "one.txt", b"2")
    with pytest.raises(InputError, match="its sha256 is"):
        weights.find_weights("one", str(home))
    place(home, "two.pt", b"2")  # not pinned: its content says that it is no file of tensors
    with pytest.raises(InputError, match="two.pt: refused: not a zip-format torch file"):
        weights.find_weights("two", str(home))


def test_pickles_come_back_as_safetensors(home, known):
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.ones(2)}, home / "head.pt")
    known(table("head", (home / "head.pt").read_bytes(), file="head.pt", format="torch-zip", host="code"))
    path = weights.find_weights("head", str(home))
    assert path.suffix == ".safetensors"
    np.testing.assert_array_equal(weights.read_safetensors(path)["x"], [1, 1])
    (home / "head.pt").write_bytes((home / "head.pt").read_bytes().replace(b"x", b"y"))
    with pytest.raises(InputError, match="its sha256 is"):  # what was converted before does not hide it
        weights.find_weights("head", str(home))


@pytest.mark.parametrize("folder", ["nowhere", "~nouser/x", "x" * 5000, "a\0b", "file"])
def test_folders_that_are_none(home, known, monkeypatch, folder):
    known(table("one", b"1"))
    monkeypatch.chdir(home)
    (home / "file").write_text("")
    with pytest.raises(
        InputError, match="weights_dir: received .*; it must be a folder that you can read; make it first"
    ):
        weights.find_weights("one", folder)
    if "\0" not in folder:
        monkeypatch.setenv("DDPO_WEIGHTS", folder)
        with pytest.raises(InputError, match="DDPO_WEIGHTS: received "):
            weights.find_weights("one")


def test_where_to_get_what_no_hub_has(home, tmp_path):
    with pytest.raises(InputError) as error:
        weights.find_weights("aesthetic_head", str(home))
    message = str(error.value)
    assert "get it from the repository christophschuhmann/improved-aesthetic-predictor of its code host" in message
    assert message.endswith(f"put it at {home}/christophschuhmann/improved-aesthetic-predictor/"
                            "sac+logos+ava1-l14-linearMSE.pth") and "\n" not in message  # fmt: skip


def test_without_a_network(home):
    with pytest.raises(InputError) as error:  # the suite runs with HF_HUB_OFFLINE=1
        weights.find_weights("pickscore")
    message = str(error.value)
    assert "weights pickscore: model.safetensors of the hub repository yuvalkirstain/PickScore_v1" in message
    assert "the hub gave nothing" in message and "HF_HUB_OFFLINE" in message and "\n" not in message


def test_a_snapshot_of_a_model_is_verified_at_its_commit_alone(home, known, tmp_path):
    known(table("one", b"1"))
    snapshot = tmp_path / COMMIT
    path = place(snapshot, "part/one.txt", b"2")
    with pytest.raises(InputError, match="its sha256 is"):
        weights.verify_snapshot(snapshot, "owner/repository")
    weights.verify_snapshot(snapshot, "owner/other")
    snapshot.rename(tmp_path / "another commit")
    weights.verify_snapshot(tmp_path / "another commit", "owner/repository")
    (tmp_path / "another commit").rename(snapshot)
    path.write_bytes(b"1")
    weights.verify_snapshot(snapshot, "owner/repository")
    assert catalogue.is_verified(path, "one")


# --- downloading ---


class Hub(http.server.BaseHTTPRequestHandler):
    """What the model hub answers for files, in as many words as its client needs."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, (_, repo, _, commit, *file) = self.server, [*self.path.strip("/").split("/"), *[""] * 4]
        content = server.files.get("/".join(file).rstrip("/"))
        code = 403 if repo == "gated" else 404 if content is None else 200
        wanted = self.headers.get("Range")
        start = int(wanted.split("=")[1].split("-")[0]) if wanted else 0
        if self.command == "GET":
            server.ranges.append(start)
        self.send_response(206 if wanted and code == 200 else code)
        if code != 200:
            self.send_header("X-Error-Code", "GatedRepo" if code == 403 else "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            end = server.cuts.pop() if server.cuts else len(content)
            self.wfile.write(content[start:end])
            self.close_connection = end < len(content)

    do_HEAD = do_GET


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.ranges, server.cuts = {}, [], []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def run(hub, tmp_path, *argv):
    """``ddpo_jax weights`` as a process that knows our hub and our catalogue; (exit code, output, errors)."""
    program = (
        "import sys, pathlib; from ddpo_jax.models.weights import catalogue;"
        "catalogue.CATALOGUE = pathlib.Path(sys.argv.pop(1)); from ddpo_jax.__main__ import main; sys.exit(main())"
    )
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
        "HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1", "HF_TOKEN": "", "HF_HUB_DISABLE_TELEMETRY": "1",
        "TQDM_POSITION": "-1",  # the hub's client shows its progress bar on a terminal, or where this is set
    }  # fmt: skip
    environment.pop("DDPO_WEIGHTS", None)
    call = [sys.executable, "-c", program, str(tmp_path / "catalogue.toml"), "weights", *argv]
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def test_download_resumes_verifies_and_is_found_again(hub, known, tmp_path):
    content = np.random.default_rng(0).bytes(24 << 20)
    known(table("big", content))
    hub.files["part/big.txt"] = content
    hub.cuts = [21 << 20]  # the first answer ends in the middle
    code, out, errors = run(hub, tmp_path, "big")
    path = pathlib.Path(out.strip())
    assert code == 0 and path.read_bytes() == content and tmp_path / "hf" in path.parents
    assert "%" in errors and "big.txt" in errors  # a progress bar
    assert len(hub.ranges) >= 2 and hub.ranges[-1] > 0, hub.ranges  # the rest alone was asked for
    hub.ranges.clear()
    code, out, errors = run(hub, tmp_path, "--verify")
    assert code == 0 and f"verified: {path}" in out and hub.ranges == []


def test_a_download_that_is_not_the_published_file_is_refused(hub, known, tmp_path):
    known(table("big", b"the published file"), table("closed", b"1", repo="owner/gated"), table("gone", b"1"))
    hub.files["part/big.txt"] = b"another one, really"
    into = tmp_path / "into"
    code, out, errors = run(hub, tmp_path, "big", f"--weights-dir={into}")
    assert code == 2 and out == ""
    assert "error: " in errors.splitlines()[-1] and "it has 19 bytes; big has 18" in errors.splitlines()[-1]
    (into / "owner/repository/part/big.txt").write_bytes(b"the published file")
    code, out, _ = run(hub, tmp_path, "big", f"--weights-dir={into}")
    assert code == 0 and out.strip() == str(into / "owner/repository/part/big.txt")
    code, out, errors = run(hub, tmp_path, "closed")  # no token
    assert code == 2 and out == ""
    assert "accept it on the page of owner/gated, then log in: set HF_TOKEN" in errors.splitlines()[-1]
    code, _, errors = run(hub, tmp_path, "gone")
    assert code == 2 and "EntryNotFound" in errors.splitlines()[-1]


# --- the command ---


def test_the_list(home, known, capsys):
    known(table("one", b"1" * 2_500_000), table("two", b"2"), table("free"), table("hand", b"3", host="code"),
          table("none", b"4"))  # fmt: skip
    place(home, "one.txt", b"1" * 2_500_000)
    place(home, "two.txt", b"wrong")
    place(home, "free.txt", b"anything")
    assert cli.run(command.main, [f"--weights-dir={home}"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "for", "size", "licence", "state"]
    states = {row.split()[0]: row for row in rows if row and not row.startswith("looked")}
    assert "2.5 MB" in states["one"] and f"not verified yet: {home}/one.txt" in states["one"]
    assert states["free"].endswith(f"not pinned: {home}/free.txt")
    assert states["hand"].endswith("not here; get it by hand from owner/repository")
    assert states["none"].endswith("not here") and "a test" in states["none"]
    assert rows[-1].startswith(f"looked for in: {home}, ") and rows[-1].endswith("the hub's cache")
    assert cli.run(command.main, [f"--weights-dir={home}", "--verify"]) == 2
    printed = capsys.readouterr()
    assert f"verified: {home}/one.txt" in printed.out and f"NOT the published file: {home}/two.txt" in printed.out
    assert printed.err.splitlines() == [
        f"error: {home}/two.txt: it has 5 bytes; two has 1; delete it and get part/two.txt of owner/repository at "
        f"revision {COMMIT} again"
    ]
    assert cli.run(command.main, [f"--weights-dir={home}"]) == 0  # and remembers it
    assert f" verified: {home}/one.txt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "weights: received 'nothing'"),
        (["one", "--verify"], "--verify: received with NAME"),
        (["--weights-dir=nowhere"], "weights_dir: received 'nowhere'"),
        (["--quick"], "unrecognized arguments: --quick"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(home, known, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(home)
    known(table("one", b"1"))
    assert cli.run(command.main, argv) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and message in printed.err and printed.out == "", printed.err
