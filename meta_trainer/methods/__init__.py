"""The methods the paper compares, behind one signature (`base.Method`)."""

from __future__ import annotations

from meta_trainer.methods.base import Learning, Method, predict
from meta_trainer.methods.modular import Modular
from meta_trainer.methods.offline import Offline
from meta_trainer.methods.replay import Replay
from meta_trainer.methods.sequential import Ewc, Sequential

METHODS: dict[str, Method] = {
    "OL": Offline("OL", "random"),
    "CL": Sequential("CL", "random"),
    "ER": Replay("ER"),
    "EWC": Ewc(),
    "MER": Replay("MER", reptile=True, within=0.03),
    "MOL": Offline("MOL", "mol"),
    "MAML+CL": Sequential("MAML+CL", "maml-cl"),
    "OML": Sequential("OML", "oml", top=2),
    "Ours (mod)": Modular("Ours (mod)", "mod"),
    "Ours (MIM)": Modular("Ours (MIM)", "mim"),
}
"""By the name the paper's tables use."""

VARIANTS: dict[str, tuple[str, Method]] = {
    "MOL (one task's batch)": ("MOL", Offline("MOL (one task's batch)", "mol", batches=1)),
    "ER (buffer 1/20)": ("ER", Replay("ER (buffer 1/20)", share=0.05)),
    "MER (buffer 1/20)": (
        "MER",
        Replay("MER (buffer 1/20)", reptile=True, within=0.03, share=0.05),
    ),
    "MER (across 0.1)": ("MER", Replay("MER (across 0.1)", reptile=True, within=0.03, across=0.1)),
}
"""Other readings of a method, each with the name of that method: tried as causes where our order of
two methods is not the paper's."""

STARTS: dict[str, str] = {m.start: name for name, m in METHODS.items() if m.start != "random"}
"""Which method each kind of learned start is trained for."""

__all__ = ["METHODS", "STARTS", "VARIANTS", "Learning", "Method", "predict"]
