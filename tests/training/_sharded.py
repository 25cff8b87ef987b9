"""One of several processes of ``test_sharded.py``: holds its share of a transcoder against the whole one.

Run by ``runpy`` in a forked process, with ``JOB`` in its globals. Fails by exception, so by its exit code.
"""

import os

JOB: dict = globals().get("JOB", {})


def check(activation: str, n_features: int, k: int | None, skip: bool, relu: bool, ties: bool) -> None:
    import pytest
    import torch

    from fasttc.nn import Transcoder
    from fasttc.training.sharded import SHARED_OUT, ShardedTranscoder

    torch.manual_seed(0)
    whole = Transcoder(
        6, n_features, 5, activation, k=k, skip=skip, relu=relu, bandwidth=0.5, dtype=torch.float64
    )
    with torch.no_grad():
        whole.b_enc.normal_()
        whole.b_dec.normal_()
        if skip:
            whole.W_skip.normal_()
        if ties:
            for parameter in whole.parameters():
                parameter.copy_(parameter.sign())
    sharded = ShardedTranscoder.of(whole)
    assert sharded.config == whole.config
    assert sharded.n_features == n_features
    own = sharded.group.share(n_features)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    x = (x.sign() if ties else x).requires_grad_()
    ours, theirs = sharded.encode(x).to_dense(), whole.encode(x).to_dense()[..., own]
    assert torch.equal(ours != 0, theirs != 0), "the same features win"
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    results = []
    for module in (sharded, whole):
        y = module(x)
        weight = torch.arange(y.numel(), dtype=torch.float64).reshape(y.shape).cos()
        x.grad = None
        (y * weight).square().sum().backward()
        results.append((y.detach(), x.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))
    for name, parameter in whole.named_parameters():
        rows = own if name in SHARED_OUT else slice(None)
        expected, got = parameter.grad[rows], sharded.get_parameter(name).grad
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12 * float(parameter.grad.abs().max()))
    again = sharded.whole()
    assert again.config == whole.config
    assert all(torch.equal(t, whole.state_dict()[name]) for name, t in again.state_dict().items())
    if skip:
        with pytest.raises(ValueError, match="x: expected the encoder's input"):
            sharded.decode(sharded.encode(x))


def check_auxk() -> None:
    """The strongest dead features of all processes, of which one has none and another fewer than k."""
    import torch

    from fasttc.training import losses
    from fasttc.training.distributed import processes

    group = processes()
    torch.manual_seed(1)
    shapes = ((8, 4), (8, 5), (6, 4), (6,), (6, 5))
    x, residual, *weights = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    own = [slice(0, 5), slice(5, 6), slice(6, 6)][group.rank]
    for k in (1, 3, 9):
        results = []
        for rows, who in ((slice(None), None), (own, group)):
            parts = [w[rows].clone().requires_grad_() for w in weights]
            loss = losses.auxk(x, residual, *parts, k, who)
            found = [torch.zeros_like(p) for p in parts]
            if loss.requires_grad:  # not where all dead features are others'
                found = torch.autograd.grad(loss, parts)
            results.append((loss.detach(), found))
        (whole, grads), (shared, own_grads) = results
        torch.testing.assert_close(shared, whole, rtol=1e-12, atol=0)
        for got, expected in zip(own_grads, grads, strict=True):
            torch.testing.assert_close(got, expected[own], rtol=1e-11, atol=1e-13)


def run() -> None:
    os.environ.update(JOB["environment"])
    with open(JOB["log"], "w") as log:
        os.dup2(log.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    for case in JOB["cases"]:
        check(*case)
    check_auxk()


if JOB:
    run()
