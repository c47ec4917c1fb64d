"""A file is whole or not there, whatever ends its writing."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtts_rt.files import replacing, write_whole


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_file_stays_whole_until_the_new_one_is(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_whole(path, "first")
    with pytest.raises(type(error)), replacing(path) as partial:
        assert partial.parent == tmp_path and partial.suffix == ".mp4"  # writers choose by it
        partial.write_text("half")
        assert path.read_text() == "first"
        raise error
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]
    with replacing(path) as one, replacing(path) as other:  # two at once
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and len(list(tmp_path.iterdir())) == 1
    write_whole(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
