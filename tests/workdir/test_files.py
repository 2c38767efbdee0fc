"""Places to write that are none."""

import pytest

from ddpo_jax.workdir import files


@pytest.mark.parametrize("check", [files.folder_to_write, files.file_to_write])
def test_an_address_is_no_folder(check, tmp_path, monkeypatch):
    """``gs://bucket/run`` would become a folder ``gs:`` here, and the run would seem to be saved in a bucket."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--workdir: received 'gs://bucket/run'; it is an address") as raised:
        check("gs://bucket/run", "--workdir")
    assert "\n" not in str(raised.value) and not [*tmp_path.iterdir()]
