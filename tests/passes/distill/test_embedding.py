"""The losses of embeddings on numbers small enough to follow, the map before them, and two processes against one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor

from slim.passes.distill.embedding import EmbeddingTarget, cosine_distance, info_nce
from slim.passes.distill.method import Outputs

pytestmark = pytest.mark.usefixtures("one_thread")

LOSSES = {"cosine": cosine_distance, "infonce": info_nce}


def embeddings(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cosine_distance_by_hand() -> None:
    student = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [-1.0, 0.0]])
    teacher = torch.tensor([[5.0, 0.0], [1.0, 0.0], [1.0, 0.0], [4.0, 0.0]])
    # Same, at right angles, at 45 degrees, opposite.
    assert float(cosine_distance(student, teacher)) == pytest.approx((0 + 1 + (1 - 0.5**0.5) + 2) / 4)
    assert abs(float(cosine_distance(embeddings(6, 100), 3 * embeddings(6, 100)))) < 1e-6


def test_info_nce_by_hand() -> None:
    student = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    teacher = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    # Cosines: (1, 0) for the first, both 1/sqrt(2) for the second. At temperature 1/2 the first are 2 and 0.
    first, second = math.log(1 + math.exp(-2)), math.log(2)
    assert float(info_nce(student, teacher, temperature=0.5)) == pytest.approx((first + second) / 2)


def test_info_nce_is_one_sided() -> None:
    student, teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.eye(2)
    # Each teacher embedding is equally near both students; each student is at its place or away from it.
    forward = (math.log(1 + math.exp(-5)) + math.log(1 + math.exp(5))) / 2
    assert float(info_nce(student, teacher)) == pytest.approx(forward)
    assert float(info_nce(teacher, student)) == pytest.approx(math.log(2))


@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_reach_the_student_alone(kind: str) -> None:
    student, teacher = embeddings(4, 8, seed=1).requires_grad_(), embeddings(4, 8, seed=2).requires_grad_()
    LOSSES[kind](student, teacher).backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("kind", LOSSES)
def test_a_zero_embedding_stays_finite(kind: str) -> None:
    for student, teacher in ((torch.zeros(3, 4), embeddings(3, 4)), (embeddings(3, 4), torch.zeros(3, 4))):
        student.requires_grad_()
        loss = LOSSES[kind](student, teacher)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("kind", LOSSES)
def test_bf16_and_autocast_lose_nothing_but_the_rounding_of_the_inputs(kind: Literal["cosine", "infonce"]) -> None:
    student, teacher = embeddings(4, 8, seed=1).bfloat16(), embeddings(4, 8, seed=2).bfloat16()
    target = EmbeddingTarget(8, 8, kind)
    # The identity would hide a product in low precision.
    torch.nn.init.orthogonal_(target.projector.weight, generator=torch.Generator().manual_seed(0))
    expected = LOSSES[kind](student.float(), teacher.float())
    through = loss_of(target, student.float(), teacher.float())
    assert expected.dtype == through.dtype == torch.float32
    assert torch.equal(LOSSES[kind](student, teacher), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(LOSSES[kind](student, teacher), expected)
        assert torch.equal(LOSSES[kind](student.float(), teacher.float()), expected)
        assert torch.equal(loss_of(target, student, teacher), through)


def loss_of(method: EmbeddingTarget, student: Tensor, teacher: Tensor) -> Tensor:
    """Its one loss, with something no loss can read in place of labels."""
    losses = method(Outputs(embedding=student), Outputs(embedding=teacher), cast(Any, object()))
    assert list(losses) == ["embedding"]
    return cast(Tensor, losses["embedding"])


def test_it_asks_for_embeddings_and_reads_no_label() -> None:
    assert EmbeddingTarget.needs == {"embedding"}
    assert loss_of(EmbeddingTarget(6, 8), embeddings(4, 6), embeddings(4, 8)).shape == ()


def test_equal_widths_start_with_the_loss_of_the_embeddings_themselves() -> None:
    student, teacher = embeddings(4, 8, seed=1), embeddings(4, 8, seed=2)
    assert torch.equal(loss_of(EmbeddingTarget(8, 8), student, teacher), cosine_distance(student, teacher))
    assert abs(loss_of(EmbeddingTarget(8, 8), teacher, teacher).item()) < 1e-6
    found = loss_of(EmbeddingTarget(8, 8, "infonce", 0.5), student, teacher)
    assert torch.equal(found, info_nce(student, teacher, temperature=0.5))
    assert not torch.equal(found, info_nce(student, teacher))


@pytest.mark.parametrize("kind", LOSSES)
def test_training_the_map_alone_finds_the_teachers_axes(kind: Literal["cosine", "infonce"]) -> None:
    # The student knows all the teacher knows, in axes of its own.
    teacher = embeddings(64, 8)
    turn = torch.linalg.qr(embeddings(8, 8, seed=3))[0]
    method = EmbeddingTarget(8, 8, kind)
    assert {name for name, value in method.named_parameters() if value.requires_grad} == {
        "projector.weight",
        "projector.bias",
    }
    optimizer = torch.optim.Adam(method.parameters(), lr=0.05)
    best = float(LOSSES[kind](teacher, teacher))
    gaps = []
    for _ in range(150):
        loss = loss_of(method, teacher @ turn, teacher)
        gaps.append(loss.item() - best)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert gaps[-1] < 0.02 * gaps[0]


SCRIPT = """\
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from slim.passes.distill.embedding import info_nce

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
student, teacher = torch.load(folder / "batch.pt")
said = {}
for cut in (4, 3, 2):  # shares of 4 and 2, 3 and 3, 2 and 4 images
    own = slice(0, cut) if rank == 0 else slice(cut, 6)
    mine, theirs = student[own].clone().requires_grad_(), teacher[own].clone().requires_grad_()
    loss = info_nce(mine, theirs)
    loss.backward()
    assert theirs.grad is None
    said[cut] = {"loss": loss.item(), "images": len(mine), "gradient": mine.grad.tolist()}
(folder / f"{rank}.json").write_text(json.dumps(said))
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_have_the_loss_and_the_gradient_of_one(tmp_path: Path) -> None:
    student, teacher = embeddings(6, 4, seed=1), embeddings(6, 4, seed=2)
    torch.save((student, teacher), tmp_path / "batch.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors

    student.requires_grad_()
    alone = info_nce(student, teacher)
    slope = torch.autograd.grad(alone, student)[0]
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for cut in ("4", "3", "2"):
        first = int(cut)
        assert [part[cut]["images"] for part in said] == [first, 6 - first]
        shares = [first / 6, 1 - first / 6]
        mean = sum(share * part[cut]["loss"] for share, part in zip(shares, said, strict=True))
        assert mean == pytest.approx(alone.item(), rel=1e-6)
        parts = [share * torch.tensor(part[cut]["gradient"]) for share, part in zip(shares, said, strict=True)]
        torch.testing.assert_close(torch.cat(parts), slope)
        # The images of the other process count: among its own alone each would be easier to find.
        assert said[0][cut]["loss"] > info_nce(student[:first], teacher[:first]).item() + 0.1
