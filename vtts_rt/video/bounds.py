"""What a file's header would make a demuxer expand, summed up before a demuxer sees the file."""

from __future__ import annotations

from vtts_rt.video.container import Media
from vtts_rt.video.limits import Opening


def check_header(media: Media, opening: Opening) -> None:
    return None
