"""Every registered pass, in legal chains, over the zoo: what is saved is what was made, and loads again bit-exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from slim import costs, store
from slim.artifact import Artifact, state_digest
from slim.bench.measure import TargetMeter
from slim.contract import Context, Loading, Pass, Plan
from slim.data import Data, open_data
from slim.errors import OrderError, StoreError
from slim.export.target import Target
from slim.passes import PASSES, resolve
from slim.passes.distill import Distill
from slim.passes.elastic import BestSubnet, Elastic
from slim.passes.finetune import Finetune
from slim.passes.low_rank import LowRank
from slim.passes.mask import Mask
from slim.passes.merge import Merge
from slim.passes.prune import Prune
from slim.passes.qat import Qat
from slim.passes.quantize import Quantize
from slim.passes.sparsify import Sparsify
from slim.pipeline import Pipeline
from tests.contract.zoo import BLIND, CLASSES, SIZE, WIDE, ZOO, artifact

GOLDEN = Path(__file__).with_name("golden")


def small(name: str, network: str) -> Pass:
    """A pass by its name, set so that it finds work in the zoo's networks."""
    known: dict[str, Pass] = {
        "elastic": Elastic(epochs=1, widths=(0.5,), align=2, floor=2, held_out=8, flip=0.0, precision="fp32"),
        "finetune": Finetune(epochs=1, lr=1e-3, mixup=0.2, precision="fp32"),
        "distill": Distill(epochs=1, lr=1e-3, precision="fp32"),
        "low-rank": LowRank(ratio=0.5, align=2, min_width=WIDE),
        "low-rank of some": LowRank(ratio=0.5, align=2, min_width=WIDE, skip=(ZOO[network][2],), **BLIND),
        "mask": Mask(epochs=1, lr=1e-3, flip=0.0, precision="fp32"),
        "merge": Merge(),
        "prune": Prune(ratio=0.5, align=2, floor=2),
        "prune of targets": Prune(to="sparsified"),
        "qat": Qat(epochs=1, lr=1e-3, flip=0.0, precision="fp32"),
        "quantize": Quantize(methods=("minmax",), agreement=0.0),
        "subnet": BestSubnet(to="0.9x-macs", evaluations=2, proposals=20),
        "sparsify": Sparsify(to="0.7x-macs", align=2, floor=2, epochs=1, lr=1e-3, flip=0.0, precision="fp32"),
    }
    return known[name]


CHAINS = [
    ("finetune", "low-rank", "finetune"),
    ("low-rank of some", "low-rank"),
    ("low-rank", "distill"),
    ("merge", "low-rank"),
    ("elastic", "subnet", "finetune"),
    ("prune", "mask", "finetune"),
    ("qat", "quantize"),
    ("sparsify", "prune of targets", "low-rank"),
]
MERGED = ("resnet", "mobilenet", "convnext")
"""Networks with batch norms or layer scales behind their layers; in the others there is nothing to merge."""
LEGAL = [(chain, network) for chain in CHAINS for network in ZOO if "merge" not in chain or network in MERGED]


@pytest.fixture(scope="module")
def data() -> Data:
    return open_data("digits", limit_train=32, limit_val=8)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """(4, 3, 32, 32), the same on every machine and with every version of torch."""
    return torch.linspace(-2, 2, 4 * 3 * 32 * 32).reshape(4, *SIZE)


def logits(saved: Artifact, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        output: torch.Tensor = saved.model()(images)
    return output


@pytest.mark.parametrize(("chain", "network"), LEGAL, ids=lambda part: part if part in ZOO else " > ".join(part))
def test_a_chain_loads_again_bit_exact(
    chain: tuple[str, ...], network: str, data: Data, images: torch.Tensor, tmp_path: Path
) -> None:
    start = after = artifact(network)
    digest, macs = start.digest, costs.count(start.model(), SIZE)["macs"]
    steps = [small(name, network) for name in chain]
    meter = TargetMeter(Target.parse("ort:cpu"), data, tmp_path)
    for step in steps:
        measured = meter if step.measures else None
        after = step(after, Context(data=data, meter=measured, loading=Loading(batch_size=16), seed=7, reference=start))

    loaded = store.load(store.save(after, tmp_path / "saved"), trust=True)
    assert loaded.digest == after.digest
    assert loaded.history == after.history
    assert loaded.backbone == after.backbone
    assert torch.equal(logits(loaded, images), logits(after, images))

    assert [step.name for step in after.history] == [step.name for step in steps]
    outputs = [entry.digests["output"] for entry in after.history]
    assert [entry.digests["input"] for entry in after.history] == [digest, *outputs[:-1]]
    assert outputs[-1] == after.digest
    factored = any(step.name == "low-rank" for step in steps)
    traits = ({"dense"} if not factored else set()) | ({"float"} if chain[-1] != "quantize" else set())
    assert store.traits(loaded) == traits
    smaller = factored or any(step.name in ("prune", "subnet") for step in steps)
    assert (costs.count(after.model(), SIZE)["macs"] < macs) == smaller
    assert logits(after, images).shape == (4, CLASSES)
    assert not torch.equal(logits(after, images), logits(start, images))
    assert state_digest(start.state) == state_digest(artifact(network).state)


def test_every_registered_pass_is_in_a_chain() -> None:
    assert {step.split(" of ")[0] for chain in CHAINS for step in chain} == set(PASSES)


def test_a_chain_is_the_same_twice_and_another_with_another_seed(data: Data) -> None:
    def trained(seed: int) -> str:
        return small("finetune", "vit")(artifact("vit"), Context(data=data, loading=Loading(16), seed=seed)).weights

    assert trained(7) == trained(7)
    assert trained(7) != trained(8)


def test_a_second_low_rank_leaves_what_the_first_factored() -> None:
    first = small("low-rank of some", "vit")(artifact("vit"))
    second = LowRank(ratio=0.5, align=2, min_width=WIDE, **BLIND)(first)
    one, two = (step.plan for step in second.history)
    assert set(one["layers"]).isdisjoint(two["layers"])  # type: ignore[arg-type]
    dense: Any = two["dense"]
    assert {dense[f"{name}.{half}"] for name in one["layers"] for half in (0, 1)} == {"factored by a step before"}  # type: ignore[union-attr]


def test_an_order_that_cannot_work_names_both_steps() -> None:
    class NeedsDense(LowRank):
        name: ClassVar[str] = "prune"
        needs: ClassVar[frozenset[str]] = frozenset({"dense"})

    with pytest.raises(OrderError, match="step 2 'prune' needs a 'dense' network, and step 1 'low-rank' ends that"):
        Pipeline((LowRank(**BLIND), NeedsDense(**BLIND))).check(artifact("vit"), Context())


@pytest.mark.parametrize("name", ["convnext", "vit"])
def test_a_golden_artifact_still_loads_and_computes_the_same(name: str, images: torch.Tensor) -> None:
    """Saved by version 0.1.0, finetune > low-rank; never made again, or they would prove nothing."""
    saved = store.load(GOLDEN / name)
    recorded = json.loads((GOLDEN / "logits.json").read_text())[name]
    # Read by today's passes: the plan is in another form, the values and what they compute are not.
    assert [step.version for step in saved.history] == [resolve(step.name).version for step in saved.history]
    expected = torch.tensor(recorded["logits"])
    # Other processors add in another order: 3e-6 of the largest logit at most (see REPLAY_TOLERANCE).
    assert (logits(saved, images) - expected).abs().max() <= 1e-4 * expected.abs().max()


class Raised(LowRank):
    """Low-rank of tomorrow: version 3 calls the ranks something else, and has forgotten how to read version 1."""

    version: ClassVar[int] = 3

    def rewrite(self, model: torch.nn.Module, plan: Plan) -> torch.nn.Module:
        return super().rewrite(model, {"layers": plan["factors"]})

    @classmethod
    def migrate(cls, version: int, config: dict[str, Any], plan: Plan) -> tuple[dict[str, Any], Plan] | None:
        return None


class Migrating(Raised):
    @classmethod
    def migrate(cls, version: int, config: dict[str, Any], plan: Plan) -> tuple[dict[str, Any], Plan] | None:
        assert version == 1
        config, plan = LowRank.migrate(version, config, plan)  # type: ignore[misc]
        return config, {"factors": plan["layers"]}


def test_a_raised_version_without_migrate_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slim.passes.low_rank.LowRank", Raised)
    says = r"slim\.json: step 'low-rank' has version 1, this slim reads version 3; use the slim that wrote it"
    with pytest.raises(StoreError, match=says):
        store.load(GOLDEN / "vit")


def test_a_raised_version_with_migrate_loads(monkeypatch: pytest.MonkeyPatch, images: torch.Tensor) -> None:
    expected = logits(store.load(GOLDEN / "vit"), images)
    monkeypatch.setattr("slim.passes.low_rank.LowRank", Migrating)
    after = store.load(GOLDEN / "vit")
    assert after.history[-1].version == 3
    assert torch.equal(logits(after, images), expected)


def test_an_older_slim_does_not_read_a_newer_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as tomorrow:
        tomorrow.setattr("slim.passes.low_rank.LowRank", Migrating)
        store.save(store.load(GOLDEN / "vit"), tmp_path / "newer")
    with pytest.raises(StoreError, match="step 'low-rank' has version 3, this slim reads version 2"):
        store.load(tmp_path / "newer")
