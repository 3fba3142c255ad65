"""An ordinary file with the average model, replicas beside it, and what happens when something is missing."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from test_trainer_resume import noisy_net, run, same_from
from torch import Tensor
from trainer_tools import Regressor, Trace, adam, flat, mlp, on_ranks, regression, trainer

from lightning_dopt import AtEnd, Every, Int8, Plan, ReplicaStrategy, Sync, plans

pytestmark = pytest.mark.trainer

PLAN = plans.diloco(3, codec=Int8())


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def folders(path: Path) -> list[Path]:
    return sorted(Path(f"{path}.replicas").iterdir())


def averaged(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {k: torch.stack([s[k] for s in states]).float().mean(0) for k in states[0]}


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k].float(), b[k].float(), rtol=1e-6, atol=1e-6)


def test_main_file_is_the_mean_of_the_replicas_and_loads_everywhere(tmp_path: Path) -> None:
    """Saved in the middle of a round, where replicas differ; nothing in the files needs this package."""

    def job(rank: int) -> dict[str, Any]:
        saver = ModelCheckpoint(tmp_path / "a", "{step}", every_n_train_steps=2, save_top_k=-1)
        keeper = ModelCheckpoint(tmp_path / "best", "best", monitor="val_loss", save_on_train_epoch_end=False)
        fitter = trainer(ReplicaStrategy(plan=PLAN), max_epochs=1, callbacks=[saver, keeper])
        fitter.fit(Regressor(optimizer=adam), regression(), regression(8, seed=5))
        logged = float(fitter.callback_metrics["val_loss"])
        again = trainer(ReplicaStrategy(plan=PLAN)).validate(
            Regressor(seed=9), regression(8, seed=5), tmp_path / "best/best.ckpt", verbose=False
        )
        ddp = trainer("ddp").validate(
            Regressor(seed=8), regression(8, seed=5), tmp_path / "best/best.ckpt", verbose=False
        )
        return {"val": logged, "again": again[0]["val_loss"], "ddp": ddp[0]["val_loss"]}

    a, b = on_ranks(job)
    assert a == b
    assert a["val"] == a["again"] == a["ddp"]
    (tag,) = folders(tmp_path / "a/step=2.ckpt")
    assert files(tag) == ["00000-of-00002.ckpt", "00001-of-00002.ckpt"]
    main = torch.load(tmp_path / "a/step=2.ckpt", weights_only=True)
    states = [torch.load(tag / f, weights_only=True)["state_dict"] for f in files(tag)]
    assert not torch.equal(states[0]["net.0.weight"], states[1]["net.0.weight"])
    close(main["state_dict"], averaged(states))
    best = torch.load(tmp_path / "best/best.ckpt", weights_only=True)["state_dict"]
    (tag,) = folders(tmp_path / "best/best.ckpt")  # saved while validation had the mean swapped in
    states = [torch.load(tag / f, weights_only=True)["state_dict"] for f in files(tag)]
    assert not torch.equal(states[0]["net.0.weight"], states[1]["net.0.weight"])
    close(best, averaged(states))

    def elsewhere(rank: int) -> dict[str, Tensor]:
        for name in [m for m in sys.modules if m.split(".")[0] == "lightning_dopt"]:
            del sys.modules[name]
        sys.modules["lightning_dopt"] = None  # type: ignore[assignment]
        module = Regressor.load_from_checkpoint(tmp_path / "best/best.ckpt")
        fitter = trainer("auto", 1, max_epochs=2)
        fitter.fit(Regressor(optimizer=adam), regression(), ckpt_path=tmp_path / "best/best.ckpt")
        assert fitter.global_step > 4
        return module.state_dict()

    (loaded,) = on_ranks(elsewhere, 1)
    close(loaded, best)


def test_buffers_of_the_main_file(tmp_path: Path) -> None:
    """BatchNorm's mean is averaged, its variance by the law of total variance, whatever the policy during training."""

    def job(rank: int) -> None:
        for policy in ("average", "local"):
            fitter = trainer(ReplicaStrategy(plan=plans.local_sgd(10), buffers=policy), max_steps=3)
            fitter.fit(Regressor(noisy_net, adam), regression())
            fitter.save_checkpoint(tmp_path / f"{policy}.ckpt")

    on_ranks(job)
    for policy in ("average", "local"):
        main = torch.load(tmp_path / f"{policy}.ckpt", weights_only=True)["state_dict"]
        (tag,) = folders(tmp_path / f"{policy}.ckpt")
        states = [torch.load(tag / f, weights_only=True)["state_dict"] for f in files(tag)]
        means = torch.stack([s["net.1.running_mean"] for s in states])
        variances = torch.stack([s["net.1.running_var"] for s in states])
        assert (means[0] - means[1]).abs().max() > 1e-3
        torch.testing.assert_close(main["net.1.running_mean"], means.mean(0))
        torch.testing.assert_close(main["net.1.running_var"], variances.mean(0) + means.var(0, unbiased=False))


def test_replicas_follow_their_main_file(tmp_path: Path) -> None:
    """One set per file: replaced on overwriting, removed with it by top-k; none with ``save_weights_only``."""

    def job(rank: int) -> None:
        top = ModelCheckpoint(
            tmp_path / "top", "{step}", every_n_train_steps=1, save_top_k=2, monitor="step", mode="max"
        )
        same = ModelCheckpoint(
            tmp_path / "same", "x", every_n_train_steps=2, enable_version_counter=False, save_last="link"
        )
        light = ModelCheckpoint(tmp_path / "light", "x", every_n_train_steps=4, save_weights_only=True)
        fitter = trainer(ReplicaStrategy(plan=PLAN), max_steps=4, callbacks=[top, same, light])
        fitter.fit(Regressor(optimizer=adam), regression())

    on_ranks(job)
    assert sorted(os.listdir(tmp_path / "top")) == [
        "step=3.ckpt",
        "step=3.ckpt.replicas",
        "step=4.ckpt",
        "step=4.ckpt.replicas",
    ]
    assert sorted(os.listdir(tmp_path / "same")) == ["last.ckpt", "x.ckpt", "x.ckpt.replicas"]
    assert len(folders(tmp_path / "same/x.ckpt")) == 1
    assert files(tmp_path / "light") == ["x.ckpt"]

    def resume(rank: int) -> int:
        torch.manual_seed(rank)
        fitter = trainer(ReplicaStrategy(plan=PLAN), max_steps=5)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", module=r"lightning\.pytorch|torch")
            fitter.fit(Regressor(optimizer=adam), regression(), ckpt_path=tmp_path / "same/last.ckpt")
        assert fitter.strategy.engine.runners[0].rounds == 1
        return fitter.global_step

    assert on_ranks(resume) == [5, 5]  # through the link


class Killed(Exception):  # noqa: N818
    """Stands for the end of all processes."""


class Fragile(TorchCheckpointIO):
    """Every process ends where the main file of ``step`` would be written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if checkpoint["global_step"] == self.step and "replicas" not in str(path):
            raise Killed
        super().save_checkpoint(checkpoint, path, storage_options)


class FragileStrategy(ReplicaStrategy):
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if checkpoint["global_step"] == self.checkpoint_io.step:
            raise Killed  # on the rank that does not write the main file


def test_a_kill_while_saving_leaves_the_previous_checkpoint_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"

    def job(rank: int) -> None:
        full, end, _ = run(PLAN)
        torch.manual_seed(3)
        saver = ModelCheckpoint(tmp_path, "x", every_n_train_steps=2, enable_version_counter=False)
        strategy = FragileStrategy(plan=PLAN, checkpoint_io=Fragile(6))
        fitter = trainer(strategy, max_steps=8, max_epochs=-1, gradient_clip_val=0.5, callbacks=[saver])
        with pytest.raises(Killed):
            fitter.fit(Regressor(noisy_net, adam, decay=0.9), regression(shuffle=True), regression(8, seed=5))
        torch.distributed.barrier()
        assert len(folders(path)) == 2  # those of step 4, which the main file names, and those of step 6
        torch.distributed.barrier()
        rest, again, fitter = run(PLAN, path)
        same_from(full, rest, 4)
        assert torch.equal(end, again)
        fitter.save_checkpoint(path)

    on_ranks(job)
    assert len(folders(path)) == 1
    assert torch.load(path, weights_only=True)["global_step"] == 8


def test_unreadable_checkpoints_give_one_line(tmp_path: Path) -> None:
    def job(rank: int) -> None:
        fitter = trainer(ReplicaStrategy(plan=PLAN), max_steps=2)
        fitter.fit(Regressor(), regression())
        fitter.save_checkpoint(tmp_path / "x.ckpt")
        torch.distributed.barrier()
        other = trainer(ReplicaStrategy(plan=plans.local_sgd(3)), max_steps=3)
        with pytest.raises(ValueError, match=r"^checkpoint was written by another plan: .*Every\(n=3\).*$") as error:
            other.fit(Regressor(), regression(), ckpt_path=tmp_path / "x.ckpt")
        assert "\n" not in str(error.value)
        replica = folders(tmp_path / "x.ckpt")[0] / f"0000{rank}-of-00002.ckpt"
        replica.write_bytes(replica.read_bytes()[:200])
        with pytest.raises(ValueError, match=r"^cannot read the checkpoint .*-of-00002.ckpt: .+") as error:
            trainer(ReplicaStrategy(plan=PLAN), max_steps=3).fit(
                Regressor(), regression(), ckpt_path=tmp_path / "x.ckpt"
            )
        assert "\n" not in str(error.value)
        torch.distributed.barrier()
        if rank == 0:
            (tmp_path / "x.ckpt").write_bytes(b"nonsense")
        torch.distributed.barrier()
        with pytest.raises(ValueError, match=r"^cannot read the checkpoint .*x.ckpt: .+") as error:
            trainer(ReplicaStrategy(plan=PLAN), max_steps=3).fit(
                Regressor(), regression(), ckpt_path=tmp_path / "x.ckpt"
            )
        assert "\n" not in str(error.value)
        with pytest.raises(FileNotFoundError):
            trainer(ReplicaStrategy(plan=PLAN)).fit(Regressor(), regression(), ckpt_path=tmp_path / "none.ckpt")

    on_ranks(job)


def start_of(path: Path, plan: Plan = PLAN) -> tuple[Tensor, list[str], int]:
    """Weights before the first step of a run resumed from ``path``, and the warnings it gave."""
    seen: list[Tensor] = []

    class Start(Trace):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(flat(pl_module))

    fitter = trainer(ReplicaStrategy(plan=plan), int(os.environ["WORLD"]), max_steps=4, callbacks=[Start()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitter.fit(Regressor(optimizer=adam), regression(), ckpt_path=path)
    return seen[0], [str(w.message) for w in caught if str(path) in str(w.message)], fitter.global_step


def test_other_world_size_and_missing_replicas_start_from_the_mean(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"

    def write(rank: int) -> None:
        saver = ModelCheckpoint(tmp_path, "x", every_n_train_steps=2, save_top_k=-1)
        trainer(ReplicaStrategy(plan=PLAN), max_steps=2, callbacks=[saver]).fit(Regressor(optimizer=adam), regression())

    on_ranks(write)
    state = torch.load(path, weights_only=True)["state_dict"]
    mean = torch.cat([t.double().reshape(-1) for t in state.values()])

    def resume(n: int) -> list[tuple[Tensor, list[str], int]]:
        def job(rank: int) -> Any:
            os.environ["WORLD"] = str(n)
            return start_of(path)

        return on_ranks(job, n)

    for n in (1, 3):
        answers = resume(n)
        for start, _, step in answers:
            assert torch.equal(start, mean)
            assert step == 4
        assert len(answers[0][1]) == 1
        assert f"was written by 2 workers, this run has {n}" in answers[0][1][0]
    for start, said, _ in resume(2):
        assert not torch.equal(start, mean)
        assert said == []
    (folders(path)[0] / "00001-of-00002.ckpt").unlink()
    answers = resume(2)
    assert all(torch.equal(start, mean) for start, _, _ in answers)
    assert "replicas of rank(s) 1 are missing" in answers[0][1][0]


def test_fitting_twice_and_resuming_in_the_same_trainer(tmp_path: Path) -> None:
    """The second fit starts from the consensus; with a checkpoint it continues exactly."""

    def job(rank: int) -> None:
        full, end, _ = run(PLAN)
        torch.manual_seed(3)
        trace = Trace()
        fitter = trainer(
            ReplicaStrategy(plan=PLAN), max_steps=4, max_epochs=-1, gradient_clip_val=0.5, callbacks=[trace]
        )
        module, data = Regressor(noisy_net, adam, decay=0.9), (regression(shuffle=True), regression(8, seed=5))
        fitter.fit(module, *data)
        fitter.save_checkpoint(tmp_path / "x.ckpt")
        mean = flat(module)
        fitter.fit_loop.epoch_loop.max_steps = 8
        trace.rows.clear()
        fitter.fit(module, *data)
        assert list(trace.rows) == [5, 6, 7, 8]
        assert not torch.equal(flat(module), mean)
        trace.rows.clear()
        fitter.fit(module, *data, ckpt_path=tmp_path / "x.ckpt")
        same_from(full, trace, 4)
        assert torch.equal(flat(module), end)

    on_ranks(job)


def test_saving_after_fit_and_after_a_validation_that_followed(tmp_path: Path) -> None:
    """The main file holds the mean, with ``evaluate="local"`` too; replicas are kept after ``validate``."""

    def job(rank: int) -> Tensor:
        for evaluate in ("consensus", "local"):
            fitter = trainer(ReplicaStrategy(Sync(when=Every(3)), evaluate=evaluate), max_steps=4)
            module = Regressor(optimizer=adam)
            fitter.fit(module, regression())
            fitter.save_checkpoint(tmp_path / f"{evaluate}.ckpt")
            fitter.validate(module, regression(8), verbose=False)
            fitter.save_checkpoint(tmp_path / f"{evaluate}2.ckpt")
        return flat(module)

    on_ranks(job)
    for name in ("consensus", "local", "consensus2", "local2"):
        (tag,) = folders(tmp_path / f"{name}.ckpt")
        states = [torch.load(tag / f, weights_only=True)["state_dict"] for f in files(tag)]
        assert not torch.equal(states[0]["net.0.weight"], states[1]["net.0.weight"])
        close(torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"], averaged(states))


def test_saving_after_fit_when_a_sync_of_the_optimizer_ended_it(tmp_path: Path) -> None:
    """It changes the optimizer's state, too; the replicas' files hold it as it was before."""
    ends = [Sync(when=AtEnd(), what=f"optimizer.{key}") for key in ("exp_avg", "exp_avg_sq")]
    plan = Plan([Sync(when=Every(3)), *ends])

    def job(rank: int) -> tuple[bool, Tensor]:
        full, end, _ = run(plan)
        _, _, fitter = run(plan, max_steps=4)
        fitter.save_checkpoint(tmp_path / "4.ckpt")
        ended_with = fitter.optimizers[0].state_dict()["state"][0]["exp_avg"].clone()
        rest, again, _ = run(plan, tmp_path / "4.ckpt")
        same_from(full, rest, 4)
        assert torch.equal(again, end)
        fitter.save_checkpoint(tmp_path / "4.ckpt")  # a second time, from the same fit
        rest, again, _ = run(plan, tmp_path / "4.ckpt")
        same_from(full, rest, 4)
        return torch.equal(again, end), ended_with

    (same, a), (also, b) = on_ranks(job)
    assert same
    assert also
    saved = [torch.load(p, weights_only=True) for p in sorted(folders(tmp_path / "4.ckpt")[0].iterdir())]
    own = [s["optimizer_states"][0]["state"][0]["exp_avg"] for s in saved]
    assert not torch.equal(own[0], own[1])
    assert not torch.equal(own[0], a)  # which the end of training changed
    torch.testing.assert_close(a, (own[0] + own[1]) / 2)
    assert torch.equal(a, b)


def test_another_policy_for_buffers_is_refused_on_resume(tmp_path: Path) -> None:
    """Where it matters: not without buffers, and another plan is named first."""

    def job(rank: int) -> None:
        def resume(policy: str, net: Any = noisy_net, plan: Plan = PLAN) -> Any:
            fitter = trainer(ReplicaStrategy(plan=plan, buffers=policy), max_steps=3)
            fitter.fit(Regressor(net), regression(), ckpt_path=tmp_path / f"{net.__name__}.ckpt")
            return fitter.global_step

        for net, policy, other in ((noisy_net, "average", "local"), (noisy_net, "local", "average")):
            fitter = trainer(ReplicaStrategy(plan=PLAN, buffers=policy), max_steps=2)
            fitter.fit(Regressor(net), regression())
            fitter.save_checkpoint(tmp_path / f"{net.__name__}.ckpt")
            words = (
                rf"^ReplicaStrategy\(buffers='{other}'\): the checkpoint was written with buffers='{policy}'; "
                rf"resume with buffers='{policy}'$"
            )
            with pytest.raises(ValueError, match=words):
                resume(other)
            with pytest.raises(
                ValueError, match=r"^checkpoint was written by another plan: .*, this run has .*\(n=4\).*$"
            ):
                resume(other, plan=plans.local_sgd(4))
            assert resume(policy) == 3
        fitter = trainer(ReplicaStrategy(plan=PLAN), max_steps=2)
        fitter.fit(Regressor(mlp), regression())
        fitter.save_checkpoint(tmp_path / "mlp.ckpt")
        assert resume("local", mlp) == 3

    on_ranks(job)
