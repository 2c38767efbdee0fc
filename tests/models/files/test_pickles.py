"""Hostile torch files: what a pickle can do is done to us, and nothing of it happens."""

import collections
import os
import pathlib
import pickle
import pickletools
import zipfile

import numpy as np
import pytest

from ddpo_jax.errors import InputError
from ddpo_jax.models import weights

SHARED = os.environ.get("DDPO_JAX_WEIGHTS", pathlib.Path(__file__).resolve().parents[4] / "shared" / "weights")
AESTHETIC = pathlib.Path(SHARED) / "sac+logos+ava1-l14-linearMSE.pth"


def torch_file(path, program, storages=(), **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", program)
        for number, storage in enumerate(storages):
            archive.writestr(f"archive/data/{number}", storage)
    return path


def refused(path, message="refused"):
    with pytest.raises(InputError, match=message) as error:
        weights.read_pickle_tensors(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value), error.value
    assert len(str(error.value)) < 600
    return str(error.value)


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def payloads(mark):
    """Programs that each run ``touch mark`` when ``pickle`` reads them, by the opcode that does it."""
    command = f"touch {mark}"
    argument = text(command)
    os_name = os.system.__module__.encode()  # posix
    popen = b"csubprocess\nPopen\n"
    arguments = b"(lp0\n" + text("touch") + b"a" + text(str(mark)) + b"a"  # a list: ["touch", mark]
    return {
        "GLOBAL, REDUCE": b"c" + os_name + b"\nsystem\n(" + argument + b"tR.",
        "STACK_GLOBAL, REDUCE": b"\x80\x04" + text(os_name.decode()) + text("system") + b"\x93(" + argument + b"tR.",
        "INST": b"(" + argument + b"i" + os_name + b"\nsystem\n.",
        "OBJ": b"(" + popen + arguments + b"o.",
        "REDUCE of builtins": b"cbuiltins\neval\n(" + text(f"__import__('os').system({command!r})") + b"tR.",
        "in a dictionary": b"\x80\x02}" + text("x") + b"c" + os_name + b"\nsystem\n(" + argument + b"tRs.",
    }


@pytest.mark.parametrize("opcode", ["GLOBAL, REDUCE", "STACK_GLOBAL, REDUCE", "INST", "OBJ", "REDUCE of builtins",
                                    "in a dictionary"])  # fmt: skip
def test_a_program_that_runs_a_command_does_not_run_it(tmp_path, opcode):
    mark = tmp_path / "executed"
    program = payloads(mark)[opcode]
    result = pickle.loads(program)  # the attack is real
    if hasattr(result, "wait"):
        result.wait()
    assert mark.exists()
    mark.unlink()
    refused(torch_file(tmp_path / "x.pt", program))
    assert not mark.exists()


class Made:
    """Counts how often it is made, however that is done."""

    made = 0

    def __new__(cls, *args, **kwargs):
        Made.made += 1
        return super().__new__(cls)

    def __setstate__(self, state):
        Made.made += 1


@pytest.mark.parametrize("protocol", range(6))
def test_objects_are_not_made(tmp_path, protocol):
    """NEWOBJ (protocol 2 and up), or REDUCE of copyreg._reconstructor, and BUILD."""
    instance = object.__new__(Made)
    instance.__dict__["x"] = 1
    program = pickle.dumps({"x": instance}, protocol)
    before = Made.made
    pickle.loads(program)
    assert Made.made > before
    before = Made.made
    refused(torch_file(tmp_path / "x.pt", program))
    assert Made.made == before


HOSTILE = {
    "numpy scalar": b"cnumpy._core.multiarray\nscalar\n.",
    "numpy reconstruct": pickle.dumps({"x": np.zeros(3)}, 2),
    "numpy dtype": pickle.dumps({"x": np.dtype("f4")}, 2),
    "numpy 5": pickle.dumps({"x": np.zeros(3)}, 5),
    "class": pickle.dumps({"x": collections.Counter(a=1)}, 2),
    "partial": b"cfunctools\npartial\n.",
    "getattr": b"cbuiltins\ngetattr\n.",
    "dotted": b"\x80\x04" + text("collections") + text("OrderedDict.__init__.__globals__") + b"\x93.",
    "dotted torch": b"\x80\x04" + text("torch") + text("FloatStorage.__class__") + b"\x93.",
    "private torch": b"ctorch\n_utils\n.",
    "NEWOBJ of a known name": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "NEWOBJ_EX": b"\x80\x04ccollections\nOrderedDict\n)}\x92.",
    "INST of a known name": b"(icollections\nOrderedDict\n.",
    "OBJ of a known name": b"(ccollections\nOrderedDict\no.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "PERSID": b"Pstorage\n.",
    "BUILD of a name": b"ctorch._utils\n_rebuild_tensor_v2\n}" + text("__defaults__") + b")sb.",
    "BUILD of a name's slots": b"ctorch._utils\n_rebuild_tensor_v2\n(N}" + text("_call") + b"Nstb.",
    "BUILD of a storage name": b"ctorch\nFloatStorage\n}" + text("x") + b"Nsb.",
    "BUILD of a number": b"K\x01}" + text("x") + b"Nsb.",
    "REDUCE of a text": b"ctorch\nFloatStorage\n)R.",
    "REDUCE of a number": b"K\x01)R.",
    "a tensor of no storage": b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00)))tR.",
    "a tensor of too few arguments": b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "a storage of a text": b"\x80\x02" + text("storage") + b"Q.",
    "a storage of another kind": b"\x80\x02(" + text("module") + b"ctorch\nFloatStorage\n" + text("0") + b"NK\x00tQ.",
    "a storage of no numbers": b"\x80\x02("
    + text("storage")
    + b"ccollections\nOrderedDict\n"
    + text("0")
    + b"NK\x00tQ.",
    "a storage with a path": b"\x80\x02("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + text("../../x")
    + b"NK\x00tQ.",
    "an append to a name": b"ctorch._utils\n_rebuild_tensor_v2\nNa.",
    "an item of a name": b"ctorch._utils\n_rebuild_tensor_v2\nNNs.",
    "a full memory": b"Nr\xff\xff\xff\xff.",
    "a full memory by text": b"Np99999999999\n.",
    "a giant text": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.",
    "a giant frame": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7fN.",
    "a giant number": b"L" + b"9" * 10_000 + b"L\n.",
    "nothing": b"",
    "no end": b"}",
    "an empty stack": b".",
    "unknown opcode": b"\xff.",
    "a mark": b"(.",
    "no pickle": b"hello world",
    "a dictionary in itself": b"}q\x00" + text("x") + b"h\x00s.",
    "lists that share": b"]q\x00" + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(60)) + b".",
    "dictionaries that share": b"}q\x00"
    + b"".join(b"}q%c(K\x01h%cK\x02h%cu" % (i + 1, i, i) for i in range(60))
    + b".",
    "too deep": b"}" + text("a") + (b"}" + text("a")) * 5000 + b"N" + b"s" * 5001 + b".",
    "a deep tuple": b"N" + b"\x85" * 200_000 + b".",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_other_programs_are_refused(tmp_path, name):
    message = "holds no named tensors" if name in ("lists that share", "a deep tuple") else "refused"
    refused(torch_file(tmp_path / "x.pt", HOSTILE[name]), message)


def test_no_other_opcode_is_read(tmp_path):
    """Each opcode of pickle alone: those that make objects are named in the refusal."""
    makers = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"}
    arguments = {"INST": b"a\nb\n", "EXT1": b"\x01", "EXT2": b"\x01\x00", "EXT4": b"\x01\x00\x00\x00", "PERSID": b"a\n"}
    named = set()
    for opcode in pickletools.opcodes:
        if opcode.name in makers:
            program = opcode.code.encode("latin-1") + arguments.get(opcode.name, b"") + b"."
            found = refused(torch_file(tmp_path / "x.pt", program))
            named |= {name for name in makers if f"the opcode {name};" in found}
    assert named == makers


def test_archives_that_are_damaged(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.arange(1000.0)}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    path = tmp_path / "x.pt"
    for length in (0, 1, 4, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        refused(path)
    path.write_bytes(b"\0" * 5000)
    refused(path, "not a zip-format torch file")
    path.unlink()
    path.mkdir()
    refused(path, "it cannot be read")
    path.rmdir()
    path.symlink_to(path)
    refused(path, "it cannot be read")
    path.unlink()
    refused(path, "no such file")
    torch_file(path, pickle.dumps({"x": 1}, 2), compression=zipfile.ZIP_DEFLATED)
    refused(path, "compressed")


def tensor(size, stride, count):
    """A program with one float tensor ``x`` of that size and stride on a storage of ``count`` numbers."""

    def numbers(values):
        return b"(" + b"".join(b"\x8a\x09" + value.to_bytes(9, "little", signed=True) for value in values) + b"t"

    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + numbers([count])[1:-1] + b"tQ"
    )
    geometry = storage + b"K\x00" + numbers(size) + numbers(stride) + b"\x89N"
    return b"\x80\x02}" + text("x") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + geometry + b"tRs."


def test_tensors_that_repeat_their_numbers(tmp_path):
    """A stride of 0 costs nothing in the file and everything in memory."""
    path = torch_file(tmp_path / "x.pt", tensor([3, 2], [0, 1], 2), [np.float32([1, 2]).tobytes()])
    assert weights.read_pickle_tensors(path)["x"].tolist() == [[1, 2]] * 3
    path = torch_file(tmp_path / "x.pt", tensor([2**40, 2], [0, 1], 2), [np.float32([1, 2]).tobytes()])
    refused(path, "repeats")
    path = torch_file(tmp_path / "x.pt", tensor([2**62, 2**62, 0], [1, 1, 1], 2), [np.float32([1, 2]).tobytes()])
    refused(path)
    path = torch_file(tmp_path / "x.pt", tensor([0, 3], [1, 1], 2), [np.float32([1, 2]).tobytes()])
    assert weights.read_pickle_tensors(path)["x"].shape == (0, 3)


# --- read by content, and converted ---


def same(got, want):
    assert set(got) == set(want)
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A torch file; the cache folder is a new one."""
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "weights").mkdir()
    state = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor([1, 2]), "c": torch.ones(2).bfloat16()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "weights/model.pt")
    return tmp_path / "weights/model.pt"


def test_a_file_is_known_by_its_content(saved, tmp_path):
    want = weights.read_pickle_tensors(saved)
    assert set(want) == {"state_dict.a", "state_dict.b", "state_dict.c"}
    saved.rename(tmp_path / "called.safetensors")
    same(weights.read_file(tmp_path / "called.safetensors"), want)
    weights.write_safetensors(tmp_path / "called.pt", want)
    same(weights.read_file(tmp_path / "called.pt"), want)
    for path in (tmp_path / "gone", tmp_path):
        with pytest.raises(InputError, match="it cannot be read"):
            weights.read_file(path)


def test_a_pickle_is_converted_once(saved, monkeypatch):
    target = weights.as_safetensors(saved)
    assert target == saved.with_name("model.pt.safetensors")
    same(weights.read_safetensors(target), weights.read_pickle_tensors(saved))
    before = target.stat().st_mtime_ns, target.stat().st_ino
    assert weights.as_safetensors(saved) == target
    assert before == (target.stat().st_mtime_ns, target.stat().st_ino)
    os.utime(saved, ns=(1, 1))  # another file now
    assert weights.as_safetensors(saved) == target
    assert before != (target.stat().st_mtime_ns, target.stat().st_ino)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["model.pt", "model.pt.safetensors"]


def test_a_converted_file_goes_to_the_cache_where_its_place_is_taken(saved, tmp_path):
    place = saved.with_name("model.pt.safetensors")
    weights.write_safetensors(place, {"mine": np.float32([1])})  # someone else's
    target = weights.as_safetensors(saved)
    assert tmp_path / "home/.cache/ddpo_jax/converted" in target.parents
    same(weights.read_safetensors(target), weights.read_pickle_tensors(saved))
    assert set(weights.read_safetensors(place)) == {"mine"}
    assert weights.as_safetensors(saved) == target


def test_where_nothing_can_be_written_the_pickle_is_read_each_time(saved, tmp_path):
    saved.with_name("model.pt.safetensors").mkdir()
    (tmp_path / "home").write_text("a file in the place of the home")
    assert weights.as_safetensors(saved) == saved
    same(weights.read_file(saved), weights.read_pickle_tensors(saved))


def test_a_hostile_pickle_is_not_converted(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = torch_file(tmp_path / "x.pt", payloads(tmp_path / "mark")["GLOBAL, REDUCE"])
    with pytest.raises(InputError, match="the file asks for posix.system; only tensors are read"):
        weights.as_safetensors(path)
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.skipif(not AESTHETIC.is_file(), reason="the published aesthetic head is not beside this checkout")
def test_the_published_head_is_converted_without_change(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    same(weights.read_safetensors(weights.as_safetensors(AESTHETIC)), weights.read_pickle_tensors(AESTHETIC))
