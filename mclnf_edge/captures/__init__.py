"""Readers of posed captures: folders of pictures, videos with a pose file, single poses.

Everything arrives as `mclnf_edge.types.Frame` (or `View`): camera-to-world, opengl camera axes,
world z up in metres where the source is metric. Nothing here needs torch, except the files of
Mega-NeRF when such a capture is opened.
"""

from __future__ import annotations

from mclnf_edge.captures.capture import Capture, Frames, SplitFilter
from mclnf_edge.captures.detect import open_capture
from mclnf_edge.captures.intrinsics import load_camera
from mclnf_edge.captures.poses import PoseFile
from mclnf_edge.captures.signals import SignalFile, open_signal
from mclnf_edge.captures.video import VideoSource, open_video
from mclnf_edge.captures.views import parse_views, view_of

__all__ = [
    "Capture",
    "Frames",
    "PoseFile",
    "SignalFile",
    "SplitFilter",
    "VideoSource",
    "load_camera",
    "open_capture",
    "open_signal",
    "open_video",
    "parse_views",
    "view_of",
]
