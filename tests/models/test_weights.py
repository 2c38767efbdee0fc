"""Tensor files: safetensors against its library, torch files against torch, hostile files, strict merging."""

import collections
import json
import os
import pathlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from ddpo_jax.errors import InputError
from ddpo_jax.models import weights

SHARED = os.environ.get("DDPO_JAX_WEIGHTS", pathlib.Path(__file__).resolve().parents[3] / "shared" / "weights")
AESTHETIC = pathlib.Path(SHARED) / "sac+logos+ava1-l14-linearMSE.pth"


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a.weight": rng.normal(size=(3, 4)).astype(np.float32),
        "b": np.asarray(2.5, np.float32),
        "half": rng.normal(size=(5,)).astype(np.float16),
        "brain": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
        "ids": np.arange(7, dtype=np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }


def same(got, want):
    assert set(got) == set(want)
    for name, value in want.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
        np.testing.assert_array_equal(np.asarray(got[name]).view(np.uint8), np.ascontiguousarray(value).view(np.uint8))


# --- safetensors ---


def test_reads_what_safetensors_writes_and_the_other_way_round(tmp_path):
    from safetensors.numpy import load_file, save_file

    save_file(tensors(), tmp_path / "theirs.safetensors")
    got = weights.read_safetensors(tmp_path / "theirs.safetensors")
    for name, value in tensors().items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape
        np.testing.assert_array_equal(got[name].astype(np.float64), value.astype(np.float64))
    weights.write_safetensors(tmp_path / "deep" / "ours.safetensors", tensors())
    back = load_file(tmp_path / "deep" / "ours.safetensors")
    for name, value in tensors().items():
        assert back[name].shape == value.shape
        np.testing.assert_array_equal(back[name].astype(np.float64), value.astype(np.float64))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["ours.safetensors"]


def test_reading_maps_memory_and_is_read_only(tmp_path):
    weights.write_safetensors(tmp_path / "x.safetensors", tensors())
    got = weights.read_safetensors(tmp_path / "x.safetensors")
    assert isinstance(got["a.weight"], np.memmap)
    with pytest.raises(ValueError):
        got["a.weight"][0] = 1


@pytest.mark.parametrize(
    "names",
    [
        ["diffusion_pytorch_model.safetensors"],
        ["model.safetensors"],
        ["diffusion_pytorch_model.fp16.safetensors"],
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
        ["m.fp16-1.safetensors", "m.fp16-2.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"],
        ["m.fp16-1.safetensors", "m.fp16-2.safetensors", "model.fp16.safetensors.index.json"],
    ],
)
def test_finds_the_weights_of_a_folder(tmp_path, names):
    everything = {"x": np.float32([1, 2]), "y": np.float32([3])}
    if len(names) == 1:
        weights.write_safetensors(tmp_path / names[0], everything)
    else:
        for file, (name, value) in zip(names, everything.items(), strict=False):
            weights.write_safetensors(tmp_path / file, {name: value})
        index = {"metadata": {}, "weight_map": dict(zip(everything, names, strict=False))}
        (tmp_path / names[2]).write_text(json.dumps(index))
    same(weights.read_safetensors(tmp_path), everything)
    same(weights.read_folder(tmp_path), everything)


def test_full_precision_is_preferred(tmp_path):
    weights.write_safetensors(tmp_path / "model.fp16.safetensors", {"x": np.float16([1])})
    weights.write_safetensors(tmp_path / "model.safetensors", {"x": np.float32([2])})
    weights.write_safetensors(tmp_path / "model.non_ema.safetensors", {"x": np.float32([3])})
    assert weights.read_folder(tmp_path)["x"] == 2


def test_folders_without_usable_weights(tmp_path):
    with pytest.raises(ValueError, match="no weights here"):
        weights.read_safetensors(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        weights.read_safetensors(tmp_path / "none.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    with pytest.raises(ValueError, match="gone.safetensors.* is missing"):
        weights.read_folder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="not a path"):
        weights.read_folder(tmp_path)
    weights.write_safetensors(tmp_path / "s.safetensors", {"y": np.float32([1])})
    index.write_text(json.dumps({"weight_map": {"x": "s.safetensors"}}))
    with pytest.raises(ValueError, match="in no shard: x"):
        weights.read_folder(tmp_path)


def header(entries, data=b"\0" * 8):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"PK\x03\x04 something else entirely", "not a safetensors file"),
        (struct.pack("<Q", 12) + b"not json at.", "not a safetensors file"),
        (header({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}), "'x' does not fit"),
        (header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}), r"'x' has shape \[2\] at \[-8, 0\]"),
        (header({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}), "'x' does not fit"),
        (header({"x": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}), "F8_E4M3"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        weights.read_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "entries",
    [
        [],
        3,
        None,
        "text",
        {"x": None},
        {"x": 3},
        {"x": []},
        {"x": {}},
        {"x": {"dtype": "F32", "shape": [2]}},
        {"x": {"dtype": 3, "shape": [2], "data_offsets": [0, 8]}},
        {"x": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [1] * 99 + [2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2**60, 2**60, 0], "data_offsets": [0, 0]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": 8}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [None, 8]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**70]}},
    ],
)
def test_headers_of_the_wrong_kind(tmp_path, entries):
    (tmp_path / "x.safetensors").write_bytes(header(entries))
    with pytest.raises(InputError, match="x.safetensors") as error:
        weights.read_safetensors(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value) and len(str(error.value)) < 900


# --- torch files ---


def test_reads_what_torch_saves(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    saved = collections.OrderedDict(
        plain=torch.randn(3, 4),
        view=base[1:, ::2],
        transposed=base.T,
        shared=base,
        half=torch.randn(5).half(),
        brain=torch.randn(2, 2).bfloat16(),
        ids=torch.arange(3),
        scalar=torch.tensor(3.5),
        empty=torch.zeros(0, 2),
        parameter=torch.nn.Parameter(torch.ones(2)),
    )
    torch.save(saved, tmp_path / "x.bin")
    got = weights.read_pickle_tensors(tmp_path / "x.bin")
    assert set(got) == set(saved)
    for name, value in saved.items():
        np.testing.assert_array_equal(got[name].astype(np.float64), value.detach().double().numpy(), err_msg=name)
    assert got["half"].dtype == np.float16 and got["brain"].dtype == ml_dtypes.bfloat16
    with pytest.raises(ValueError):
        got["plain"][0] = 1

    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    torch.save({"epoch": 3, "state_dict": module.state_dict()}, tmp_path / "y.pt")
    got = weights.read_pickle_tensors(tmp_path / "y.pt")
    assert set(got) == {f"state_dict.{name}" for name in module.state_dict()}
    np.testing.assert_array_equal(got["state_dict.0.weight"], module[0].weight.detach().numpy())


def test_folder_with_only_a_bin(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert weights.read_folder(tmp_path)["x"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="no weights here"):
        weights.read_safetensors(tmp_path)


def torch_file(path, payload):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
    return path


class Attack:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def touch(path):
    pathlib.Path(path).write_text("executed")


@pytest.mark.parametrize("kind", ["os.system", "builtins.eval", "own function", "getattr", "stack_global"])
def test_hostile_pickles_are_refused_and_never_run(tmp_path, kind):
    mark = tmp_path / "executed"
    attack = {
        "os.system": lambda: pickle.dumps({"x": Attack(os.system, f"touch {mark}")}),
        "builtins.eval": lambda: pickle.dumps({"x": Attack(eval, f"open({str(mark)!r}, 'w')")}, protocol=2),
        "own function": lambda: pickle.dumps(Attack(os.mkdir, str(mark))),
        "getattr": lambda: pickle.dumps([Attack(getattr, collections.OrderedDict, "clear")]),
        # OrderedDict is allowed; walking from it through a dotted name is not.
        "stack_global": lambda: b"\x80\x04\x8c\x0bcollections\x8c\x18OrderedDict.__init__.__globals__\x93.",
    }[kind]
    path = torch_file(tmp_path / "x.pt", attack())
    with pytest.raises(ValueError, match="refused"):
        weights.read_pickle_tensors(path)
    assert not mark.exists()


def rebuild(offset, size, stride, count=4, storage=b"\0" * 16):
    """A torch file with one float tensor of the given geometry, written by hand."""

    class Geometry:
        pass

    import io

    class Writer(pickle._Pickler):  # the Python one can be told to write arbitrary names
        def persistent_id(self, obj):
            return ("storage", Name("torch", "FloatStorage"), "0", "cpu", count) if isinstance(obj, Geometry) else None

        def save(self, obj, *args, **kwargs):
            if isinstance(obj, Name):
                self.write(f"c{obj.module}\n{obj.name}\n".encode())
            else:
                super().save(obj, *args, **kwargs)

    class Name:
        def __init__(self, module, name):
            self.module, self.name = module, name

    buffer = io.BytesIO()
    writer = Writer(buffer, protocol=2)
    buffer.write(b"\x80\x02}")
    writer.save("x")
    writer.save(Name("torch._utils", "_rebuild_tensor_v2"))
    writer.save((Geometry(), offset, size, stride, False, None))
    buffer.write(b"Rs.")
    return buffer.getvalue(), storage


@pytest.mark.parametrize(
    ("args", "ok"),
    [
        (dict(offset=0, size=(2, 2), stride=(2, 1)), True),
        (dict(offset=1, size=(2, 2), stride=(2, 1)), False),  # past the end
        (dict(offset=-1, size=(2,), stride=(1,)), False),
        (dict(offset=3, size=(2,), stride=(-1,)), False),
        (dict(offset=0, size=(2, 2), stride=(1 << 40, 1)), False),
        (dict(offset=0, size=(2,), stride=(1, 1)), False),
        (dict(offset=0, size=(9,), stride=(1,), count=9), False),  # the archive holds less than it claims
    ],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, args, ok):
    payload, storage = rebuild(**args)
    path = torch_file(tmp_path / "x.pt", payload)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", storage)
    if ok:
        assert weights.read_pickle_tensors(path)["x"].tolist() == [[0, 0], [0, 0]]
    else:
        with pytest.raises(ValueError):
            weights.read_pickle_tensors(path)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(ValueError, match="not a zip-format torch file"):
        weights.read_pickle_tensors(tmp_path / "old.pt")
    with pytest.raises(ValueError, match="no such file"):
        weights.read_pickle_tensors(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="no named tensors"):
        weights.read_pickle_tensors(torch_file(tmp_path / "empty.pt", pickle.dumps({"epoch": 3})))
    with pytest.raises(ValueError, match="refused"):
        weights.read_pickle_tensors(torch_file(tmp_path / "cut.pt", pickle.dumps({"epoch": "x" * 99})[:-20]))


@pytest.mark.skipif(not AESTHETIC.is_file(), reason="the published aesthetic head is not beside this checkout")
def test_published_aesthetic_head():
    """Five linear layers, no activation: the constant unit vector scores 4.883285, the first basis vector 4.545052."""
    layers = weights.read_pickle_tensors(weights.verify(AESTHETIC, "aesthetic_head"))
    shapes = {name: value.shape for name, value in layers.items() if name.endswith("weight")}
    assert list(shapes.values()) == [(1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16)]
    for x, want in ((np.full(768, 768**-0.5), 4.883285), (np.eye(768)[0], 4.545052)):
        for i in (0, 2, 4, 6, 7):
            x = layers[f"layers.{i}.weight"].astype(np.float64) @ x + layers[f"layers.{i}.bias"]
        np.testing.assert_allclose(x, want, atol=2e-6)


# --- merging ---


def keymap(name, shape):
    return ("up." + name, (1, 0)) if len(shape) == 2 else ("up." + name, tuple(range(len(shape))))


def test_merge_transposes_and_converts():
    got = weights.merge(
        {"w": (2, 3), "b": (3,)},
        {"up.w": np.arange(6, dtype=np.float16).reshape(3, 2), "up.b": np.arange(3, dtype=np.int64)},
        keymap,
        where="m",
    )
    assert {value.dtype for value in got.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(got["w"], [[0, 2, 4], [1, 3, 5]])


def test_merge_lists_every_fault_in_one_line():
    with pytest.raises(ValueError) as error:
        weights.merge(
            {"w": (2, 3), "b": (3,), "c": (1,)},
            {"up.w": np.zeros((2, 3)), "extra": np.zeros(1), "up.c": np.zeros(1)},
            keymap,
            where="unet",
        )
    text = str(error.value)
    assert text == (
        "unet: the tensors do not fit the model: 1 missing: up.b; 1 unexpected: extra; "
        "1 of wrong shape: up.w [2, 3] instead of [3, 2]"
    )
    with pytest.raises(ValueError, match=r"20 missing: up.0, .*up.7, and 12 more$"):
        weights.merge({str(i): (1,) for i in range(20)}, {}, keymap, where="m")
    with pytest.raises(ValueError, match="two parameters map to the tensor 'same'"):
        weights.merge({"a": (1,), "b": (1,)}, {"same": np.zeros(1)}, lambda name, shape: ("same", (0,)), where="m")
