"""One trained network pruned once, to every ratio asked for, with no retraining: what each costs in accuracy.

Pruning always starts from the trained weights, so no row depends on another. Batch-norm statistics are re-estimated on
training images without augmentation; accuracies without and with that stand side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from prunectl.data import Dataset
from prunectl.errors import Unsatisfiable, VerificationFailed
from prunectl.pruning import allocate, cost, oneshot
from prunectl.pruning.budget import CostModel
from prunectl.pruning.channels import describe
from prunectl.pruning.copying import copied
from prunectl.pruning.recalibrate import recalibrate_
from prunectl.pruning.reconstruct import reconstruct_
from prunectl.pruning.surgery import Graph, analyse, compact
from prunectl.pruning.ticket import AUTO_ROUNDS
from prunectl.recipe import Sfw
from prunectl.workflows.session import Session

CALIBRATION_BATCH = 100
REPAIR_IMAGES, REPAIR_BATCH = 512, 64
NEAR = 0.02  # of the channels: widths are rounded as coarsely as this allows


def require_share(model: nn.Module, share: float, settings: Sfw) -> None:
    """Raises Unsatisfiable if pruning to `share` would remove none of the ranked weights, or all."""
    sizes = [w.numel() for w in oneshot.prunable(model, settings.scope).values()]
    removed = sum(round(n * share) for n in ([sum(sizes)] if settings.pooling == "global" else sizes))
    if removed == 0:
        raise Unsatisfiable(f"--sparsity {share} would remove none of the {sum(sizes):,} weights: ask for a larger share")
    if removed == sum(sizes):
        raise Unsatisfiable(f"--sparsity {share} would leave none of the {sum(sizes):,} weights: ask for a smaller share")


def pruned(model: nn.Module, share: float, settings: Sfw) -> nn.Module:
    """A copy of `model` with exactly the share `share` of its ranked entries at zero. Raises Unsatisfiable."""
    require_share(model, share, settings)
    twin = copied(model)
    prune_ = oneshot.prune_global_ if settings.pooling == "global" else oneshot.prune_layerwise_
    prune_(twin, share, scope=settings.scope)
    return twin


def pruned_nm(model: nn.Module, n: int, m: int) -> nn.Module:
    """A copy of `model` with at most n of every m consecutive input channels not zero, wherever that fits."""
    twin = copied(model)
    oneshot.prune_nm_(twin, n, m)
    return twin


def calibration_images(images: Dataset, batches: int) -> Iterator[Tensor]:
    """The same training images, without augmentation, whoever asks."""
    limit = batches * CALIBRATION_BATCH
    return (x for x, _ in images.eval_batches("train", batch_size=CALIBRATION_BATCH, limit=limit)) if batches else iter(())


def sweep(session: Session, model: nn.Module, settings: Sfw) -> list[dict[str, Any]]:
    """One row a ratio. nonzero and total count the ranked tensors."""
    rows: list[dict[str, Any]] = []
    label = f"one-shot sweep on {session.recipe.data.final} images"
    for share in session.ui.track(settings.sparsity, total=len(settings.sparsity), label=label):
        twin = pruned(model, share, settings)
        ranked = oneshot.prunable(twin, settings.scope).values()
        total = sum(w.numel() for w in ranked)
        counts = {"sparsity": share, "nonzero": total - oneshot.count_zeros(ranked), "total": total}
        removed = [share * w.numel() for w in ranked] if settings.pooling == "layerwise" else [share * total]
        if not rows and counts["nonzero"] < total - sum(map(round, removed)):
            session.ui.warn(f"training itself left more weights at zero than a share of {share:g}: only {counts['nonzero']:,} are not")
        rows.append({**counts, **_measured(session, twin, settings)})
    return rows


def pattern(session: Session, model: nn.Module, settings: Sfw) -> dict[str, Any]:
    """The accuracy at N:M."""
    n, m = settings.n_of_m
    return {"n": n, "m": m, **_measured(session, pruned_nm(model, n, m), settings)}


def channel_tickets(session: Session, model: nn.Module, settings: Sfw) -> list[dict[str, Any]]:
    """The network with its relatively smallest filters gone for good, each ratio saved as a network of its own.

    Filters are ranked by their norm over the largest of their layer, all layers together. accuracy_reconstructed is with
    readers fitted to stand in for what they lost, on unlabelled images, and batch norm re-estimated: this one is saved."""
    graph, free = _removable(session, model)
    filters = {name: c.weights for name, c in describe(model, graph).items() if name in free}
    scores = oneshot.relative_filter_norms(filters)
    rows = []
    for share in session.ui.track(settings.channels, total=len(settings.channels), label="channels removed"):
        dropped = smallest_channels(scores, share)
        small = compact(model, dropped, session.example()).module
        repaired = copied(model)
        few = session.data.eval_batches("train", batch_size=REPAIR_BATCH, limit=REPAIR_IMAGES)
        with session.place.autocast():
            reconstruct_(repaired, graph, dropped, (session.place.images(x) for x, _ in few))
        repaired = compact(repaired, dropped, session.example()).module
        small_cost = cost.count(repaired, session.input_shape)
        if small_cost != CostModel.of(model, graph, session.input_shape).predict({name: len(c) for name, c in dropped.items()}):
            raise VerificationFailed(f"the network without {100 * share:g} % of its channels is not what was planned: {small_cost}")
        measured = _measured(session, small, settings)
        _recalibrate_(session, repaired, settings)
        name = f"channels-{share:g}"
        session.write_model(name, repaired, further_steps=[{"dropped": dropped, "criterion": "relative filter norm"}])
        rows.append(
            {
                "channels": share,
                "removed": sum(map(len, dropped.values())) / sum(free.values()),
                "params": small_cost.params,
                "macs": small_cost.macs,
                **measured,
                "accuracy_reconstructed": _accuracy(session, repaired),
                "saved": name,
            }
        )
    return rows


def require_removable(session: Session, shares: Sequence[float]) -> None:
    """Raises Unsatisfiable when no channel of the network can be removed, or none at one of the shares; warns where fewer would be."""
    _, free = _removable(session, session.state.model)
    total = sum(free.values())
    most = sum(n - allocate.floor_of(n) for n in free.values()) / total
    for share in shares:
        if round(share * total) == 0:
            raise Unsatisfiable(f"sfw.channels {share:g}: that is none of the {total} channels that may go")
        if share > most + NEAR:
            session.ui.warn(f"sfw.channels {share:g}: a share of {most:.3f} can go at most, and that is what is removed")


def _removable(session: Session, model: nn.Module) -> tuple[Graph, dict[str, int]]:
    """The channel groups of a network, and how many channels each of those that may shrink has."""
    graph = analyse(model, session.example())
    return graph, allocate.prunable(graph)


def smallest_channels(scores: Mapping[str, Tensor], share: float) -> dict[str, list[int]]:
    """About the share `share` of all channels, lowest scores first; widths are multiples of 8 where that is near enough."""
    total = sum(map(len, scores.values()))
    for multiple in AUTO_ROUNDS:
        dropped = allocate.globally(scores, sparsity=share, round_to=multiple)
        if abs(sum(map(len, dropped.values())) / total - share) <= NEAR:
            break
    return {name: channels for name, channels in dropped.items() if channels}


def _measured(session: Session, model: nn.Module, settings: Sfw) -> dict[str, float | None]:
    """The model's batch-norm statistics are new afterwards."""
    raw = _accuracy(session, model)
    seen = _recalibrate_(session, model, settings)
    return {"accuracy_raw": raw, "accuracy_bn_recalibrated": _accuracy(session, model) if seen else None}


def _accuracy(session: Session, model: nn.Module) -> float:
    return session.accuracy(session.recipe.data.final, model).top1


def _recalibrate_(session: Session, model: nn.Module, settings: Sfw) -> int:
    with session.place.autocast():
        return recalibrate_(model, map(session.place.images, calibration_images(session.data, settings.bn_recal)))
