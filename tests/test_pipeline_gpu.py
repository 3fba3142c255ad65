"""Stages on GPUs: messages go through the memory of the host, or over NCCL where torch's engine sends them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_pipeline import data, loss, net, train
from test_trainer_pipeline import Classifier, plain, staged, whole
from trainer_tools import on_ranks

from lightning_dopt.compress import Int4
from lightning_dopt.pipeline import Clapping, Link, Pipeline, SimulatedPipeline, cut, make_pipeline, one_f_one_b

GPUS = torch.cuda.device_count()  # does not begin CUDA, after which no process could be forked
one_gpu = pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs: NCCL refuses two ranks on one")


def on_one_gpu(rank: int) -> Any:
    """The pipeline and its simulation, both on the same device: equal in every bit."""
    torch.cuda.set_device(0)
    link: Link | None
    answers = []
    for link in (None, Clapping("FU", 0.5, Int4(block=8))):
        made = []
        for kind in (Pipeline, SimulatedPipeline):
            stages = cut(net(dtype=torch.float32).cuda(), 2)
            pipeline = kind(stages, one_f_one_b(2, 3), loss, activation_link=link, gradient_link=link)
            made.append((train(pipeline, 4, torch.float32, "cuda"), pipeline.forward(data(3)[0].float().cuda()).cpu()))
        answers.append(made)
    stages = cut(net().cuda(), 2)
    assert type(make_pipeline(stages, one_f_one_b(2, 2), loss)) is Pipeline, "torch would need NCCL"
    with pytest.raises(ValueError, match=r"^make_pipeline\(engine='torch'\): sends tensors from cuda"):
        make_pipeline(stages, one_f_one_b(2, 2), loss, engine="torch")
    return answers


@one_gpu
def test_two_ranks_on_one_gpu() -> None:
    for answers in on_ranks(on_one_gpu, 2, timeout=180.0):
        for (losses, output), (expected, whole_output) in answers:
            assert losses == expected
            assert output.equal(whole_output)


@two_gpus
@pytest.mark.trainer
@pytest.mark.parametrize("link", [None, Clapping("FU", 1.0, Int4(block=8))])
def test_a_trainer_with_two_gpus(link: Link | None, tmp_path: Any) -> None:
    """Without a link as in one process; with one a run goes on from its checkpoint as if it had not ended."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_dopt import PipelineStrategy

    def job(rank: int) -> Any:
        dist.destroy_process_group()  # the one over gloo; Lightning takes what is there
        dist.init_process_group("nccl", store=dist.FileStore(f"{tmp_path}/store", 2), rank=rank, world_size=2)
        results = []
        for path in (None, tmp_path / "epoch=0.ckpt"):
            module = Classifier(0.2 if link else 0.0)
            save = [] if path else [ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)]
            strategy = PipelineStrategy(activation_link=link, gradient_link=link, num_microbatches=2)
            staged(module, strategy, path, accelerator="gpu", callbacks=save)
            results.append((module.losses, {name: t.cpu() for name, t in whole(module).items()}))
        return results

    expected = Classifier()
    if link is None:
        plain(expected)
    for (losses, weights), (again, ended) in on_ranks(job, 2, timeout=180.0):
        assert again == losses[-len(again) :]
        assert all(torch.equal(weights[name], ended[name]) for name in weights)
        if link is None:
            torch.testing.assert_close(losses, expected.losses, atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(weights, whole(expected), atol=1e-10, rtol=1e-10)
