"""Options with which every source can be made, and the small files and the data set that they name."""

import pytest

ROWS = 30  # of the data set


@pytest.fixture(scope="session")
def tfds_folder(tmp_path_factory):
    """A data set in array_record format; its third split holds prompts that none can be."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="the extra 'data' is not installed")
    import io

    import numpy as np
    import PIL.Image

    def png(level):
        buffer = io.BytesIO()
        PIL.Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(buffer, "PNG")
        buffer.seek(0)
        return buffer

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "prompt": tfds.features.Text(),
                "count": np.int32,
                "objects": tfds.features.Sequence(tfds.features.Text()),
                "image": tfds.features.Image(shape=(4, 4, 3)),
            }
            return tfds.core.DatasetInfo(
                builder=self, description="30 prompts", features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {
                "train": self._generate_examples([f"prompt {i} é" for i in range(ROWS)]),
                "wrong": self._generate_examples([""]),
            }

        def _generate_examples(self, prompts):
            for i, prompt in enumerate(prompts):
                yield i, {"prompt": prompt, "count": i, "objects": ["cat", f"dog {i}"], "image": png(i)}

    builder = Tiny(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


@pytest.fixture
def options(request, tmp_path):
    """``options(name)``: what a source needs besides its defaults; nothing for a source this file does not know."""

    def of(name):
        (tmp_path / "lines.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
        (tmp_path / "color_train.txt").write_bytes(b"a red cat\r\na blue dog\r\na red cat\r\na green cup\r\n")
        if name == "tfds":
            return {"path": str(request.getfixturevalue("tfds_folder")), "metadata": "count,objects"}
        return {
            "file": {"path": str(tmp_path / "lines.txt")},
            "classes": {"path": str(tmp_path / "lines.txt")},
            "compbench": {"path": str(tmp_path)},
        }.get(name, {})

    return of
