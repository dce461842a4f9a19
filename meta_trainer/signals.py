"""An item of a data set -> its episode, whatever its kind."""

from __future__ import annotations

from mclnf_edge.errors import ConfigError
from meta_trainer.data import Item
from meta_trainer.episodes import CUTTERS, Cut, Episode
from meta_trainer.views import view_episode


def cut_item(item: Item, tasks: int, cut: Cut) -> Episode:
    """Read a signal and cut it into `tasks`; CaptureError when it cannot be used."""
    if item.kind != "views":
        return CUTTERS[item.kind](item.name, item.load(), tasks, cut)
    if cut != "strips":
        raise ConfigError(f"cut: views are cut into cells (strips), received {cut}")
    return view_episode(item.path, item.shape.side, item.shape.rays, item.shape.held, tasks)
