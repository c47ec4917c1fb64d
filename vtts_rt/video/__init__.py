"""Video in: sources of frames, the store of decoded ones, and a writer for clips."""

from vtts_rt.video.open import VideoInput, open_video
from vtts_rt.video.source import FrameSource, Video
from vtts_rt.video.store import FrameCounts, FrameStore, StoreProvider

__all__ = [
    "FrameCounts",
    "FrameSource",
    "FrameStore",
    "StoreProvider",
    "Video",
    "VideoInput",
    "open_video",
]
