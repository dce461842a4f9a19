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

STARTS: dict[str, str] = {m.start: name for name, m in METHODS.items() if m.start != "random"}
"""Which method each kind of learned start is trained for."""

__all__ = ["METHODS", "STARTS", "Learning", "Method", "predict"]
