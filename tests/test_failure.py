"""A rank that raises, dies, hangs or is stopped: every process ends in time, with the reason in one line."""

from __future__ import annotations

import inspect
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
from broken import Ended, Processes, Troubled, crash, die, free_port, hang, no_environment, say, slow, stop, terminate
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from packaging.version import Version
from trainer_tools import Regressor, regression, trainer

from lightning_dopt import Delay, Every, Plan, ReplicaStrategy, Ring, Sync, SyncError, plans
from lightning_dopt.comm.process_group import no_answer
from lightning_dopt.strategies import _private, stop_signal, watch
from lightning_dopt.strategies.watch import Watch
from lightning_dopt.topology import FromAdjacency

SOON = 20.0  # processes share two busy cores; the timeouts that these tests must not wait for are 60 s


def fit(
    module: Regressor, plan: Plan, n: int, timeout: float = 60.0, val: bool = False, **options: Any
) -> Callable[[int], None]:
    """A job for every rank: 16 steps, validation after 8 and 16 if asked for."""

    def job(rank: int) -> None:
        strategy = ReplicaStrategy(plan=plan, timeout=timedelta(seconds=timeout))
        fitter = trainer(strategy, n, **({"max_epochs": 2} | options))
        fitter.fit(module, regression(32 * n), regression(8 * n) if val else None)

    return job


def run(job: Callable[[int], None], n: int, within: float = SOON) -> dict[int, Ended]:
    with Processes(job, n) as processes:
        return processes.join(within)


def only_line(ended: Ended, pattern: str) -> None:
    """The rank failed with one error, which reads as the pattern says and fits in one line."""
    assert ended.code == 1, ended.text
    assert len(ended.errors) == 1, ended.text
    line = ended.errors[0].removeprefix("lightning_dopt.comm.world.SyncError: ")
    assert re.fullmatch(pattern, line), line
    assert ended.text.rstrip().splitlines()[-1].endswith(line) or "two lines" in ended.text


# ---------------------------------------------------------------------- a rank that fails


@pytest.mark.trainer
@pytest.mark.parametrize(("kind", "plan"), [("all-reduce", plans.local_sgd(2)), ("exchange", plans.gossip(Ring()))])
def test_a_rank_raises(kind: str, plan: Plan) -> None:
    ended = run(fit(Troubled(crash, rank=1, step=5), plan, 3), 3)
    only_line(ended[1], "ZeroDivisionError: the data is bad")
    for rank in (0, 2):
        only_line(
            ended[rank],
            rf"rank {rank}, step 6, sync 'parameters': no answer after \d+\.\d s from rank 1, which failed at step 6 with "
            r"ZeroDivisionError: the data is bad \(.*(closed|reset) by peer.*\)",
        )


@pytest.mark.trainer
def test_a_rank_is_killed() -> None:
    ended = run(fit(Troubled(die, rank=1, step=5), plans.local_sgd(2), 3), 3)
    assert ended[1].code == -signal.SIGKILL
    for rank in (0, 2):
        only_line(
            ended[rank],
            rf"rank {rank}, step 6, sync 'parameters': no answer after .* s from rank\(s\) 1 \(killed, hanging or out of step\).*",
        )


@pytest.mark.trainer
def test_rank_0_is_killed() -> None:
    """It kept the store that the others read who failed from."""
    ended = run(fit(Troubled(die, rank=0, step=5), plans.local_sgd(2), 3), 3)
    assert ended[0].code == -signal.SIGKILL
    for rank in (1, 2):
        only_line(
            ended[rank], rf"rank {rank}, step 6, sync 'parameters': no answer after .* from rank 0, which is gone.*"
        )


@pytest.mark.trainer
@pytest.mark.slow
def test_a_rank_hangs_or_is_stopped() -> None:
    """The others give up after ``timeout``; who hangs outside communication is then ended by the watch.

    SIGSTOP keeps connections open and answers nothing, which is also what a network that swallows packets looks like.
    All four runs at once, since they mostly wait.
    """
    timeout = 8.0
    cases = [(what, bad) for what in (hang, stop) for bad in (0, 1)]
    with ExitStack() as stack:
        runs = [
            stack.enter_context(Processes(fit(Troubled(what, bad, step=4), plans.local_sgd(4), 3, timeout), 3))
            for what, bad in cases
        ]
        for (what, bad), processes in zip(cases, runs, strict=True):
            others = [r for r in range(3) if r != bad]
            ended = processes.join(timeout + SOON, others)
            who = rf"rank\(s\) {bad} \(killed, hanging or out of step\)"
            if (what, bad) == (stop, 0):
                who = r"rank 0 \(stopped, or cut off from this rank\)"
            for rank in others:
                assert ended[rank].seconds > timeout / 2
                where = "(sync 'parameters'|broadcast before the step)"
                only_line(ended[rank], rf"rank {rank}, step 8, {where}: no answer after .* s from {who} \(.*")
        for (what, bad), processes in zip(cases, runs, strict=True):
            if what is stop:
                os.kill(processes.pid(bad), signal.SIGCONT)
            last = processes.join(timeout + 2 * SOON, [bad])[bad]
            assert last.code == 1
            if what is hang:
                assert re.search(rf"\[rank {bad}\] ended: rank \d failed 4 s ago \(.*\) and this rank", last.text)
                assert "in hang\n" in last.text  # where it was


@pytest.mark.trainer
def test_a_rank_fails_elsewhere() -> None:
    """In ``setup``, in validation and while saving the others wait in communication of Lightning's own."""
    every = ModelCheckpoint(every_n_train_steps=4)
    bad = r"with ZeroDivisionError: the data is bad \(.*\)"
    cases = {
        "setup": (0, r"step 0, barrier 'post_setup': .* rank 1, which failed before the first step " + bad),
        "validation_step": (8, r"step 9, reduction of a metric: .* rank 1, which failed at step 9 " + bad),
        "on_save_checkpoint": (4, r"step 5, .*: no answer after .* rank 1, which failed at step 5 " + bad),
    }
    for where, (step, pattern) in cases.items():
        module = Troubled(crash, 1, step, where)
        ended = run(fit(module, plans.local_sgd(4), 2, val=True, callbacks=[every] if "save" in where else []), 2)
        only_line(ended[1], "ZeroDivisionError: the data is bad")
        only_line(ended[0], "rank 0, " + pattern)


@pytest.mark.trainer
@pytest.mark.parametrize("kind", ["OnExceptionCheckpoint", "ModelCheckpoint"])
def test_a_checkpoint_on_exception_does_not_wait(tmp_path: Path, kind: str) -> None:
    """The replica of the failing rank is saved and its error shows at once; DDP waits for the timeout here."""
    if kind == "ModelCheckpoint":
        if "save_on_exception" not in inspect.signature(ModelCheckpoint).parameters:
            pytest.skip("since Lightning 2.5.3")
        callback: Any = ModelCheckpoint(tmp_path, save_on_exception=True)
    else:
        callback = OnExceptionCheckpoint(str(tmp_path))
    ended = run(fit(Troubled(crash, 1, 5), plans.local_sgd(4), 2, callbacks=[callback], max_epochs=1), 2)
    only_line(ended[1], "ZeroDivisionError: the data is bad")
    only_line(
        ended[0], "rank 0, step 8, .* from rank 1, which failed at step 6 with ZeroDivisionError: the data is bad.*"
    )
    saved = {p.name: torch.load(p, weights_only=False)["global_step"] for p in tmp_path.rglob("*") if p.is_file()}
    assert sorted(saved.values())[:2] == [5, 7] or sorted(saved.values())[:2] == [5, 8], saved


@pytest.mark.trainer
def test_a_failed_save_leaves_the_one_before(tmp_path: Path) -> None:
    class Full(Troubled):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            if self.global_rank == 0 and self.trainer.global_step == 8:
                raise OSError("No space left on device")

    callback = ModelCheckpoint(tmp_path, "last", every_n_train_steps=4, enable_version_counter=False)
    ended = run(fit(Full(crash, 9, 0), plans.local_sgd(4), 2, callbacks=[callback]), 2)
    only_line(ended[0], "OSError: No space left on device")
    only_line(ended[1], r"rank 1, step 9, .* (with OSError: No space left on device|is gone).*")
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] == 4
    replicas = [p for p in (tmp_path / "last.ckpt.replicas").rglob("*") if p.is_file()]
    assert {torch.load(p, weights_only=False)["global_step"] for p in replicas} == {4}
    assert len(replicas) == 2


# ---------------------------------------------------------------------- SIGTERM


@pytest.mark.skipif(
    Version(lightning.__version__) < Version("2.5.2"),
    reason="Lightning broadcasts SIGTERM since 2.5.2; before, ranks stop alone",
)
@pytest.mark.trainer
@pytest.mark.parametrize("late", [False, True])
def test_sigterm_stops_all_at_the_same_step(tmp_path: Path, late: bool) -> None:
    """Also if it finds rank 0 waiting for rank 1, where Lightning's own handler waits for ever."""
    callback = OnExceptionCheckpoint(str(tmp_path))
    plan = Plan([Sync(when=Every(4), apply=Delay(1))]) if late else plans.local_sgd(4)
    job = fit(Troubled(slow, 1, 7), plan, 2, callbacks=[callback])
    with Processes(job, 2) as processes:
        processes.wait_for(1, "slow")
        time.sleep(0.5)
        for process in processes.processes.values():
            process.terminate()
        ended = processes.join(SOON)
    assert [e.code for e in ended.values()] == [0, 0]
    steps = {torch.load(p, weights_only=False)["global_step"] for p in tmp_path.rglob("*") if p.is_file()}
    assert steps == {11} if not late else steps in ({8}, {11}, {12})  # one meeting later than rank 0 got the signal


@pytest.mark.skipif(
    Version(lightning.__version__) < Version("2.5.2"),
    reason="Lightning broadcasts SIGTERM since 2.5.2; before, ranks stop alone",
)
@pytest.mark.trainer
def test_sigterm_to_rank_0_alone_stops_all() -> None:
    ended = run(fit(Troubled(terminate, 0, 5), plans.local_sgd(4), 3), 3)
    assert [e.code for e in ended.values()] == [0, 0, 0]
    assert not any(e.errors for e in ended.values())


@pytest.mark.trainer
def test_sigterm_to_the_only_rank(tmp_path: Path) -> None:
    ended = run(fit(Troubled(terminate, 0, 5), Plan(), 1, callbacks=[OnExceptionCheckpoint(str(tmp_path))]), 1)
    assert ended[0].code == 0
    assert [torch.load(p, weights_only=False)["global_step"] for p in tmp_path.glob("*.ckpt")] == [6]


@pytest.mark.trainer
def test_sigterm_does_not_wait_long_for_the_next_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_signal, "PATIENCE", 0.0)
    ended = run(fit(Troubled(terminate, 1, 5), plans.local_sgd(1000), 2), 2)
    assert ended[1].code == 0
    only_line(ended[0], r"rank 0, .* from rank 1, which failed at step \d+ with SIGTERMException .*")


# ---------------------------------------------------------------------- start-up


@pytest.mark.trainer
def test_a_rank_never_starts() -> None:
    job = fit(Regressor(), plans.local_sgd(4), 2, timeout=3.0)
    with Processes(job, 2, [0]) as first, Processes(job, 2, [1]) as second:
        for rank, processes in enumerate((first, second)):
            ended = processes.join(SOON)[rank]
            only_line(ended, rf"rank {rank} of 2 could not meet the others at 127.0.0.1:\d+ within 3 s: start all .*")


def test_a_wrong_option_is_refused_before_any_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    graph = FromAdjacency([[1, 2], [0], [0]])
    with pytest.raises(ValueError, match=r"^FromAdjacency\(n=2\): the graph was given for 3 workers[^\n]*$"):
        trainer(ReplicaStrategy(plan=plans.gossip(graph))).fit(Regressor(), regression())
    with pytest.raises(ValueError, match=r"^Trainer\(sync_batchnorm=True\)[^\n]*$"):
        trainer(ReplicaStrategy(plan=plans.local_sgd(4)), sync_batchnorm=True).fit(Regressor(), regression())
    with pytest.raises(ValueError, match=r"^ReplicaStrategy\(timeout=[^\n]*$"):
        ReplicaStrategy(timeout=timedelta(0))
    with pytest.raises(AssertionError, match="a process was started"):
        trainer(ReplicaStrategy(plan=plans.local_sgd(4))).fit(Regressor(), regression())


# ---------------------------------------------------------------------- launchers


class Pids(Troubled):
    """Writes the ids of all ranks' processes."""

    def on_fit_start(self) -> None:
        say(f"pid {os.getpid()}")


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 5.0
    while any(Path(f"/proc/{p}").exists() and "Z" not in _state(p) for p in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(Path(f"/proc/{p}").exists() and "Z" not in _state(p) for p in pids)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.mark.trainer
@pytest.mark.parametrize(("what", "bad"), [(crash, 1), (die, 0), (hang, 1)])
def test_with_forked_processes(what: Callable[[], None], bad: int) -> None:
    def job(rank: int) -> None:
        torch.cuda._is_in_bad_fork = bool  # type: ignore[assignment]  # this process is a fork of the test's already
        strategy = ReplicaStrategy(plan=plans.local_sgd(2), start_method="fork", timeout=timedelta(seconds=8))
        trainer(strategy, 2, max_epochs=1).fit(Pids(what, bad, 5), regression(64))

    with Processes(job, 1, environment=no_environment) as processes:
        ended = processes.join(8.0 + SOON)[0]
    pids = [int(p) for p in re.findall(r"pid (\d+)", ended.text)]
    assert ended.code == 1, ended.text
    assert len(pids) == 2
    assert gone(pids)
    last = ended.text.split("ProcessRaisedException" if what is not die else "ProcessExitedException")[-1]
    reasons = {
        crash: "ZeroDivisionError: the data is bad",
        die: "process 0 terminated with signal SIGKILL",
        hang: "rank 0, step 6, sync 'parameters': no answer after 8.0 s from rank(s) 1 (killed, hanging or out of step)",
    }
    assert reasons[what] in last, ended.text


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import broken
from trainer_tools import regression, trainer
from lightning_dopt import ReplicaStrategy, plans
trainer(ReplicaStrategy(plan=plans.local_sgd(2)), 2, max_epochs=1).fit(broken.Troubled(broken.crash, 1, 5), regression(64))
"""


@pytest.mark.trainer
@pytest.mark.slow
def test_with_the_script_started_again(tmp_path: Path) -> None:
    """``popen``, the default."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "MASTER_ADDR", "NODE_RANK")}
    with open(tmp_path / "err", "w") as error:
        run = subprocess.Popen(
            [sys.executable, str(script)],
            env=environment | {"MASTER_PORT": str(free_port())},
            stderr=error,
            stdout=error,
            start_new_session=True,
        )
    try:
        assert run.wait(4 * SOON) != 0
        assert gone(_session(run.pid))
    finally:
        for pid in _session(run.pid):
            os.kill(pid, signal.SIGKILL)
    text = (tmp_path / "err").read_text()
    assert "[rank1]: ZeroDivisionError: the data is bad" in text
    assert re.search("rank 0, step 6, sync 'parameters': .* from rank 1, which failed at step 6 with Zero", text), text


def _session(leader: int) -> list[int]:
    """The processes of a session that have not ended."""
    out = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            out.append(int(path.parent.name))
    return out


# ---------------------------------------------------------------------- notes


def test_notes_name_the_first_failure() -> None:
    store = dist.HashStore()
    watches = [Watch(store, rank, 4) for rank in range(4)]
    watches[2].failed(KeyError("x\ny"), 7)
    watches[3].failed(SyncError("rank 3, step 7: no answer"), 7)
    assert watches[0].diagnose("parameters", 7) == "rank 2, which failed at step 7 with KeyError: 'x\\ny'"
    watches[1].failed(RuntimeError("[/a/gloo/b.cc:1] Connection closed by peer"), 7)
    watches[2].start()  # a new fit
    watches[2].stop()
    assert watches[2].diagnose("parameters", 7) == ""  # all have given a sign of life; nobody is to blame


def test_notes_name_who_is_silent() -> None:
    store = dist.HashStore()
    one, two = Watch(store, 1, 4), Watch(store, 2, 4)
    two.failed(SyncError(""), 3)
    start = time.monotonic()
    assert one.diagnose("parameters", 3) == "rank(s) 0, 3 (killed, hanging or out of step)"
    assert time.monotonic() - start < 4
    assert Watch(None, 1, 4).diagnose("parameters", 3) == ""


def test_a_failure_before_the_first_step() -> None:
    store = dist.HashStore()
    Watch(store, 0, 2).failed(FileNotFoundError("train.csv"), 0)
    who = Watch(store, 1, 2).diagnose("barrier", 0)
    assert who == "rank 0, which failed before the first step with FileNotFoundError: train.csv"


def test_rank_0_stays_until_all_have_read_whose_fault_it_is() -> None:
    """The store ends with its process. Where nobody is to blame, or rank 0 is, there is nothing to wait for."""

    def seconds(error: Exception, *notes: tuple[int, Exception], late: float = 0.0, linger: float = 30.0) -> float:
        store = dist.HashStore()
        for rank, note in notes:
            Watch(store, rank, 3).failed(note, 4)
        if late:
            threading.Timer(late, lambda: Watch(store, 2, 3).failed(SyncError("rank 2"), 4)).start()
        start = time.monotonic()
        Watch(store, 0, 3, linger=linger).failed(error, 4)
        return time.monotonic() - start

    culprit = (1, KeyError("x"))
    assert 0.3 < seconds(SyncError("rank 0"), culprit, late=0.4) < 10.0
    assert 0.2 < seconds(SyncError("rank 0"), culprit, linger=0.3) < 10.0
    assert seconds(SyncError("rank 0"), (1, SyncError("rank 1"))) < 10.0, "rank 2 was killed"
    assert seconds(KeyError("x"), (1, SyncError("rank 1"))) < 10.0


class Stuck:
    """The store of a stopped process, or of one that is gone."""

    def __init__(self, gone: bool) -> None:
        self.gone = gone

    def check(self, keys: list[str]) -> bool:
        if self.gone:
            raise dist.DistNetworkError("Connection reset by peer")
        time.sleep(60)
        return False

    def set(self, key: str, value: str) -> None:
        self.check([key])

    def delete_key(self, key: str) -> None:
        if self.gone:
            raise dist.DistNetworkError("Connection reset by peer")


def test_a_store_that_does_not_answer() -> None:
    start = time.monotonic()
    assert Watch(Stuck(gone=True), 1, 2).diagnose("x", 1).startswith("rank 0, which is gone")
    assert Watch(Stuck(gone=False), 1, 2, patience=0.2).diagnose("x", 1).startswith("rank 0 (stopped, or cut off")
    Watch(Stuck(gone=False), 1, 2, patience=0.2).failed(KeyError("x"), 1)
    assert time.monotonic() - start < 3


def watched(monkeypatch: pytest.MonkeyPatch, store: Any, seconds: float, stop_after: float = 60.0) -> bool:
    """Whether the watch of rank 1 of 2 ends its process within ``seconds``."""
    ended: list[int] = []

    def end(code: int) -> None:
        ended.append(code)
        raise SystemExit  # only the thread

    monkeypatch.setattr(watch.os, "_exit", end)
    watch_ = Watch(store, 1, 2, grace=0.2, poll=0.05)
    watch_.start()
    deadline, stop_at = time.monotonic() + seconds, time.monotonic() + stop_after
    while not ended and time.monotonic() < deadline:
        time.sleep(0.02)
        if time.monotonic() > stop_at:
            watch_.stop()
    watch_.stop()
    assert watch_._thread is not None
    watch_._thread.join(5)
    return ended == [1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_watch_ends_the_process(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    failed = dist.HashStore()
    Watch(failed, 0, 2).failed(KeyError("x"), 3)
    assert watched(monkeypatch, failed, 5)
    error = capfd.readouterr().err
    assert error.startswith("[rank 1] ended: rank 0 failed 0 s ago (KeyError: 'x') and this rank has not noticed; ")
    assert "test_failure.py" in error
    assert watched(monkeypatch, Stuck(gone=True), 5)
    assert "its process has ended" in capfd.readouterr().err


def test_the_watch_leaves_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not watched(monkeypatch, dist.HashStore(), 0.6)
    own = dist.HashStore()
    Watch(own, 1, 2).failed(KeyError("x"), 3)  # a note of its own, from an earlier fit
    assert not watched(monkeypatch, own, 0.6)
    failed = dist.HashStore()
    Watch(failed, 0, 2).failed(KeyError("x"), 3)
    assert not watched(monkeypatch, failed, 0.8, stop_after=0.1)  # the rank ended in order within the time of grace


def test_what_the_backend_said_is_short() -> None:
    gloo = RuntimeError(
        "[/a/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:35980. This is typically caused by a "
        "remote worker crashing. Check the logs of the remote worker before reporting an error."
    )
    line = no_answer(0, 6, "sync 'parameters'", "rank 1", 0.12, gloo)
    said = "Connection closed by peer [127.0.0.1]:35980"
    assert line == f"rank 0, step 6, sync 'parameters': no answer after 0.1 s from rank 1 ({said})"


# ---------------------------------------------------------------------- private names


@pytest.mark.skipif(
    Version(lightning.__version__) < Version("2.5.2"),
    reason="Lightning broadcasts SIGTERM since 2.5.2; before, ranks stop alone",
)
def test_lightning_and_torch_still_have_the_private_names() -> None:
    from torch.distributed import distributed_c10d

    source = inspect.getsource(_TrainingEpochLoop.advance)
    assert hasattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor")
    assert "self._broadcast_sigterm_tensor()" in source
    assert "self._sigterm_notifier_fn" in inspect.getsource(_SignalConnector.register_signal_handlers)
    assert "received_sigterm" in inspect.getsource(_SignalConnector)
    assert "received_sigterm" in inspect.getsource(_TrainingEpochLoop.on_advance_end)
    assert hasattr(distributed_c10d, "_get_default_store")
    fitter = trainer("auto", 1)
    assert fitter._signal_connector.received_sigterm is False
    own = fitter.fit_loop.epoch_loop._broadcast_sigterm_tensor
    undo = _private.replace_sigterm(fitter, lambda signum, frame: None, lambda: None)
    assert fitter.fit_loop.epoch_loop._broadcast_sigterm_tensor != own
    undo()
    assert fitter.fit_loop.epoch_loop._broadcast_sigterm_tensor == own
    assert fitter._signal_connector._sigterm_notifier_fn.__func__ is _SignalConnector._sigterm_notifier_fn
