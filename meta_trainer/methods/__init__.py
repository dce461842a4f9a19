"""The methods the paper compares, behind one signature (`base.Method`)."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from meta_trainer.methods.base import Learning, Method, predict
from meta_trainer.methods.modular import Modular
from meta_trainer.methods.offline import Offline
from meta_trainer.methods.replay import Replay
from meta_trainer.methods.sequential import Ewc, Sequential

_mer = partial(Replay, reptile=True, within=0.03)
METHODS: dict[str, Method] = {
    "OL": Offline("OL", "random"),
    "CL": Sequential("CL", "random"),
    "ER": Replay("ER"),
    "EWC": Ewc(),
    "MER": _mer("MER"),
    "MOL": Offline("MOL", "mol"),
    "MAML+CL": Sequential("MAML+CL", "maml-cl"),
    "OML": Sequential("OML", "oml", top=2),
    "Ours (mod)": Modular("Ours (mod)", "mod"),
    "Ours (MIM)": Modular("Ours (MIM)", "mim"),
}
"""By the name the paper's tables use."""

AT_ONCE = frozenset(n for n, m in METHODS.items() if isinstance(m, Offline | Modular))
"""Methods whose k steps per task are k steps of a network; the others meet T tasks in turn, and
take T k steps of their one network."""


class Variant(NamedTuple):
    """Another reading of the method called `own`, for data sets of these kinds.

    It is tried for these tables ("table1" stands for table 2 as well, whose runs are the same).
    `lam` is the strength of its sample weights where that is not the usual one.
    """

    own: str
    kinds: tuple[str, ...]
    method: Method
    tables: tuple[str, ...] = ("table1",)
    lam: float | None = None


_PICTURES = ("image", "video")
_SIGNALS = (*_PICTURES, "audio")
_BOTH = ("table1", "table3")
VARIANTS: dict[str, Variant] = {
    v.method.name: v
    for v in (
        Variant(
            "MOL", (*_SIGNALS, "views"), Offline("MOL (one task's batch)", "mol", batches=1), _BOTH
        ),
        Variant("ER", (*_SIGNALS, "views"), Replay("ER (buffer 1/20)", share=0.05), _BOTH),
        Variant("MER", _SIGNALS, _mer("MER (buffer 1/20)", share=0.05), _BOTH),
        Variant("MER", _PICTURES, _mer("MER (across 0.1)", across=0.1)),
        Variant("MER", _PICTURES, _mer("MER (buffer 1/20, across 0.1)", share=0.05, across=0.1)),
        Variant("EWC", ("video", "views"), Ewc("EWC (strength 30)", strength=30.0)),
        Variant("EWC", ("views",), Ewc("EWC (MAML+CL's start)", start="maml-cl")),
        Variant("OML", _PICTURES, Sequential("OML (top layer)", "oml", top=1), _BOTH),
        Variant("OML", _SIGNALS, Sequential("OML (top 3 layers)", "oml", top=3)),
        Variant("OML", ("views",), Sequential("OML (top 6 layers)", "oml", top=6)),
        Variant("OML", ("views",), Sequential("OML (top 9 layers)", "oml", top=9)),
        *(
            Variant(
                own, ("audio",),
                Modular(f"{own} (whole coordinates)", start, own_coordinates=frozenset()),
            )
            for own, start in (("Ours (mod)", "mod"), ("Ours (MIM)", "mim"))
        ),
        Variant(
            "Ours (MIM)", ("views",), Modular("Ours (MIM) (lambda 0.01)", "mim"),
            ("table1", "table4", "table5"), lam=0.01,
        ),
        *(
            Variant(
                own, ("views",), Modular(f"{own} (four tasks' rays)", start, batches=4), ("table5",)
            )
            for own, start in (("Ours (mod)", "mod"), ("Ours (MIM)", "mim"))
        ),
    )
}  # fmt: skip
"""Tried as causes where our order of two methods is not the paper's."""

STARTS: dict[str, str] = {m.start: name for name, m in METHODS.items() if m.start != "random"}
"""Which method each kind of learned start is trained for."""

__all__ = [
    "AT_ONCE", "METHODS", "STARTS", "VARIANTS",
    "Learning", "Method", "Modular", "Variant", "predict",
]  # fmt: skip
