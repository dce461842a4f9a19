"""One network through the tasks in order: CL, MAML+CL, OML, EWC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mclnf_edge.maths import fisher as fi
from mclnf_edge.maths.adaptation import Penalty, adapt
from mclnf_edge.maths.fields import Params, Tap
from meta_trainer.episodes import Episode
from meta_trainer.methods.base import AfterTask, Learning, batches, flag_last, pick


@dataclass(frozen=True)
class Sequential:
    """Plain fine-tuning task after task (CL; from a learned start: MAML+CL).

    `top` > 0 updates only that many last layers (OML, Javed and White 2019: the lower layers are
    the representation, fixed in the inner loop and learned in the outer one).
    """

    name: str
    start: str
    top: int = 0
    modules: int = 0

    def learn(
        self,
        start: Params,
        episode: Episode,
        marks: Sequence[int],
        how: Learning,
        generator: torch.Generator,
        create_graph: bool = False,
        after_task: AfterTask | None = None,
    ) -> list[Params]:
        """See `Method`."""
        if self.top:
            how = replace(how, rule=replace(how.rule, trainable=top_layers(start, self.top)))
        return [
            self._run(start, episode, k, how, generator, create_graph, after_task if last else None)
            for k, last in flag_last(marks)
        ]

    @staticmethod
    def _run(
        params: Params,
        episode: Episode,
        steps: int,
        how: Learning,
        generator: torch.Generator,
        create_graph: bool,
        after_task: AfterTask | None,
    ) -> Params:
        for task, (x, s) in enumerate(zip(episode.coords, episode.values, strict=True)):
            params, _, _ = adapt(
                how.field,
                params,
                batches(x, s, how.batch, steps, generator),
                how.rates,
                how.rule,
                rows=how.rows,
                create_graph=create_graph,
                generator=generator,
            )
            if after_task is not None:
                after_task(task, params)
        return params


@dataclass(frozen=True)
class Ewc:
    """Elastic weight consolidation (Kirkpatrick et al. 2017), a penalty per finished task.

    loss + strength/2 sum_i sum_p F_ip (theta_p - theta*_ip)^2 with F_i the diagonal of the model's
    own Fisher information at theta*_i: labels are drawn from its Gaussian, so that F does not
    vanish where the fit is good. `samples` of the task estimate it (0: all).
    """

    name: str = "EWC"
    start: str = "random"
    modules: int = 0
    strength: float = 3.0
    samples: int = 1024

    def learn(
        self,
        start: Params,
        episode: Episode,
        marks: Sequence[int],
        how: Learning,
        generator: torch.Generator,
        create_graph: bool = False,
        after_task: AfterTask | None = None,
    ) -> list[Params]:
        """See `Method`."""
        return [
            self._run(start, episode, k, how, generator, create_graph, after_task if last else None)
            for k, last in flag_last(marks)
        ]

    def _run(
        self,
        params: Params,
        episode: Episode,
        steps: int,
        how: Learning,
        generator: torch.Generator,
        create_graph: bool,
        after_task: AfterTask | None,
    ) -> Params:
        anchors: list[tuple[Params, fi.Fisher]] = []
        for task, (x, s) in enumerate(zip(episode.coords, episode.values, strict=True)):
            params, _, _ = adapt(
                how.field,
                params,
                batches(x, s, how.batch, steps, generator),
                how.rates,
                how.rule,
                rows=how.rows,
                create_graph=create_graph,
                penalty=self.penalty(anchors) if anchors else None,
                generator=generator,
            )
            coords, _ = pick(x, s, self.samples, generator)
            anchors.append((params, model_fisher(how, params, coords, generator)))
            if after_task is not None:
                after_task(task, params)
        return params

    def penalty(self, anchors: Sequence[tuple[Params, fi.Fisher]]) -> Penalty:
        """theta -> strength/2 sum over anchors and parameters of F (theta - theta*)^2."""

        def value(params: Params) -> Tensor:
            terms = [
                (f[name] * (params[name] - anchor[name]).square()).sum()
                for anchor, f in anchors
                for name in f
            ]
            return 0.5 * self.strength * torch.stack(terms).sum()

        return value


def model_fisher(
    how: Learning, params: Params, coords: Tensor, generator: torch.Generator
) -> fi.Fisher:
    """Diagonal of E_x E_{s ~ N(f(x), I)} [g g^T], one drawn label per sample."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    taps: list[Tap] = []
    values = how.field(leaves, coords, taps)
    noise = torch.randn(values.shape, generator=generator, dtype=values.dtype).to(values.device)
    loss = fi.half_squared_error(values, values.detach() + noise).sum()
    d = torch.autograd.grad(loss, [t.outputs for t in taps])
    with torch.no_grad():
        return fi.diagonal_moment(taps, d, how.rows)


def top_layers(params: Params, count: int) -> frozenset[str]:
    """Names of the last `count` layers."""
    layers = list(dict.fromkeys(name.split(".")[0] for name in params))
    return frozenset(layers[-count:])
