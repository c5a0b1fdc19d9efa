"""Evaluations of subnets that several processes share: an optuna study in a database, or in memory for one process.

What a subnet is worth does not depend on what it is wanted for, so searches with other aims share a study: each knows
what all have found, and counts what was evaluated for all of its own aims.

A process first takes a number, then says which subnet it will evaluate, then looks whether another says the same, and
takes its next choice if so. Hence, as long as no process is killed:
- all processes of a search together evaluate as many subnets as asked for, not one more;
- no subnet is evaluated twice. Where two choose the same at the same moment, both turn to another; what all of them
  need is evaluated by the one that took its number first, and the others wait, but no longer than `PATIENCE_S`.
An evaluation that raises, or whose process was killed on this machine, is given up and its number taken again; one
killed on another machine keeps its number, and there is one evaluation less, or one that others wait for first.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slim.errors import PassError, StoreError
from slim.passes.elastic.space import Space, Subnet
from slim.passes.elastic.subnets import as_json, from_json

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

WAIT_S = 60
"""How long to wait for an SQLite file that another process writes to, in seconds."""
ATTEMPTS = 50
"""To open an empty database that other processes open too."""
POLL_S = 0.05
"""Between two looks at what another process evaluates, in seconds."""
PATIENCE_S = 300
"""How long another process may evaluate what this one needs, in seconds; then both do."""
SUBNET, OWNER, SPACE, AIMS = "subnet", "owner", "space", "aims"


@dataclass(frozen=True, eq=False)
class Turn:
    """A subnet that this process alone evaluates now."""

    subnet: Subnet
    trial: Trial


class Trials:
    """The evaluations of one search."""

    def __init__(self, name: str, storage: str | None, space: Space, aims: Sequence[str] = ()) -> None:
        """Begin a search, or join it.

        Args:
            name: of the study; searches with one name and storage share what they find.
            storage: URL of a database, such as `sqlite:///search.db`; none keeps it in memory.
            space: of the subnets.
            aims: what subnets are looked for; an evaluation counts for a search when it was made for all its aims.

        Raises:
            StoreError: the storage cannot be opened.
            PassError: a search of this name goes through another space.
        """
        self.study, self.aims = _opened(name, storage), tuple(aims)
        self._met: dict[int, float] = {}  # numbers under way elsewhere -> when this process first waited for them
        digest = digest_of(space)
        begun = self.study.user_attrs.get(SPACE)
        if begun is None:
            self.study.set_user_attr(SPACE, digest)
        elif begun != digest:
            raise PassError(
                f"subnet: the stored search {name!r} was begun with another space ({begun}, now {digest}); "
                "give another storage, or the supernet it was begun with"
            )
        self._release()

    def finished(self) -> dict[Subnet, float]:
        """Subnet -> accuracy in percent, whatever it was evaluated for, in the order in which they were begun."""
        return {_subnet(trial): trial.values[0] for trial in self._begun() if trial.state.name == "COMPLETE"}

    @property
    def done(self) -> int:
        """Evaluations that are finished and count for this search."""
        return sum(trial.state.name == "COMPLETE" for trial in self._counted())

    def next(self, evaluations: int, propose: Callable[[int], Iterable[Subnet]]) -> Turn | None:
        """The next subnet to evaluate; none when all `evaluations` are done or under way, or nothing was proposed.

        Args:
            evaluations: of all processes together.
            propose: number of the evaluation, from 0 -> subnets, the best first.
        """
        if len(self._counted()) >= evaluations:
            return None
        trial = self._take(self.aims)
        number = sum(other.number < trial.number for other in self._counted())
        with self.giving_up(trial):
            if number < evaluations:
                for subnet in propose(number):
                    trial.set_user_attr(SUBNET, as_json(subnet))
                    others = [other for other in self._begun() if other.number != trial.number]
                    if all(_subnet(other) != subnet for other in others if SUBNET in other.user_attrs):
                        return Turn(subnet, trial)
        self._give_up(trial.number)
        return None

    def tell(self, turn: Turn, accuracy: float) -> None:
        """The subnet was evaluated: accuracy in percent."""
        self.study.tell(turn.trial, accuracy)

    def once(self, subnet: Subnet, accuracy: Callable[[Subnet], float]) -> float | None:
        """Accuracy in percent of a subnet that is needed whatever the aims: found before, or evaluated now.

        None, after a moment, while another process evaluates it.
        """
        found = self.finished().get(subnet)
        if found is not None:
            return found
        self._release()
        if self._is_free(subnet):
            trial = self._take((), {SUBNET: as_json(subnet)})
            with self.giving_up(trial):
                if self._is_free(subnet, before=trial.number):
                    found = accuracy(subnet)
                    self.study.tell(trial, found)
                    return found
            self._give_up(trial.number)
        time.sleep(POLL_S)
        return None

    @contextmanager
    def giving_up(self, trial: Trial) -> Iterator[None]:
        """Give the number back when what is done within raises, or is interrupted."""
        try:
            yield
        except BaseException:
            self._give_up(trial.number)
            raise

    def _begun(self) -> list[FrozenTrial]:
        """All that were not given up, of all searches and processes, by number."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.name != "FAIL"]

    def _counted(self) -> list[FrozenTrial]:
        """Those that were made for all aims of this search."""
        return [trial for trial in self._begun() if {*self.aims} <= {*trial.user_attrs[AIMS]}]

    def _take(self, aims: Sequence[str], said: Mapping[str, Any] | None = None) -> Trial:
        """A number for this process, with its aims from the first moment on: without, others would miscount."""
        from optuna.trial import Trial, TrialState, create_trial

        known = {OWNER: _owner(), AIMS: [*aims], **(said or {})}
        self.study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs=known))
        taken = [one for one in self._begun() if one.state.name == "RUNNING" and one.user_attrs[OWNER] == _owner()]
        return Trial(self.study, taken[-1]._trial_id)

    def _is_free(self, subnet: Subnet, before: float = math.inf) -> bool:
        """Whether no number below `before` is for this subnet, or has been for too long."""
        now = time.monotonic()
        others = [one for one in self._begun() if one.number < before and SUBNET in one.user_attrs]
        return all(
            one.state.name == "RUNNING" and now - self._met.setdefault(one.number, now) >= PATIENCE_S
            for one in others
            if _subnet(one) == subnet
        )

    def _give_up(self, number: int) -> None:
        from optuna.trial import TrialState

        self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def _release(self) -> None:
        """Give up what processes of this machine had begun that are no more."""
        node = _owner().rpartition(":")[0]
        for trial in self._begun():
            there, _, process = str(trial.user_attrs.get(OWNER, "")).rpartition(":")
            # This process evaluates nothing yet: the number was that of another before it.
            gone = process == str(os.getpid()) or not Path("/proc", process).exists()
            if trial.state.name == "RUNNING" and there == node and gone and Path("/proc/self").exists():
                self._give_up(trial.number)


def digest_of(space: Space) -> str:
    """Twelve hex digits that are equal for equal spaces."""
    plan: dict[str, Any] = {name: value for name, value in space.as_plan().items() if name != "left"}
    # As pairs: their order is what the figures of a subnet refer to.
    plan |= {name: [*plan[name].items()] for name in ("dims", "blocks", "ranks")}
    return hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:12]


def _owner() -> str:
    return f"{platform.node()}:{os.getpid()}"


def _subnet(trial: FrozenTrial) -> Subnet:
    return from_json(trial.user_attrs[SUBNET])


def _opened(name: str, storage: str | None) -> Study:
    """The study, with no word on the console."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        # Nothing is ever sampled: the default sampler would read all trials for nothing.
        return optuna.create_study(
            study_name=name,
            storage=None if storage is None else _tables(storage),
            sampler=optuna.samplers.RandomSampler(seed=0),
            direction="maximize",
            load_if_exists=True,
        )
    except (SQLAlchemyError, ImportError, optuna.exceptions.OptunaError) as error:
        reason = str(error).splitlines()[0]
        raise StoreError(
            f"subnet: the storage of the search cannot be opened ({reason}); give a URL such as sqlite:///search.db"
        ) from error
    finally:
        optuna.logging.set_verbosity(before)


def _tables(storage: str) -> RDBStorage:
    """The database, with optuna's tables in it."""
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import SQLAlchemyError

    options = {"connect_args": {"timeout": WAIT_S}} if storage.startswith("sqlite") else {}
    attempts = 0
    while True:
        try:
            return RDBStorage(storage, engine_kwargs=options)
        except SQLAlchemyError as error:
            attempts += 1
            # Each time another process was quicker to make one of some ten tables, or its first row.
            raced = any(word in str(error) for word in ("already exists", "UNIQUE", "unique"))
            if not raced or attempts == ATTEMPTS:
                raise
