"""One of several processes of ``test_sharded.py``: holds its share of a transcoder against the whole one.

Run by ``runpy`` in a forked process, with ``JOB`` in its globals. Fails by exception, so by its exit code.
"""

import os

JOB: dict = globals().get("JOB", {})


def check(n_features: int, k: int, skip: bool, relu: bool, ties: bool) -> None:
    import pytest
    import torch

    from fasttc.nn import Transcoder
    from fasttc.training.sharded import ShardedTranscoder

    torch.manual_seed(0)
    whole = Transcoder(6, n_features, 5, k=k, skip=skip, relu=relu, dtype=torch.float64)
    with torch.no_grad():
        whole.b_enc.normal_()
        whole.b_dec.normal_()
        if skip:
            whole.W_skip.normal_()
        if ties:
            for parameter in whole.parameters():
                parameter.copy_(parameter.sign())
    sharded = ShardedTranscoder.of(whole)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    x = (x.sign() if ties else x).requires_grad_()
    ours, theirs = sharded.encode(x), whole.encode(x.reshape(-1, 6))
    assert torch.equal(ours.indices, theirs.indices), "the same features win"
    torch.testing.assert_close(ours.values, theirs.values, rtol=1e-12, atol=1e-12)
    results = []
    for module in (sharded, whole):
        y = module(x)
        weight = torch.arange(y.numel(), dtype=torch.float64).reshape(y.shape).cos()
        x.grad = None
        (y * weight).square().sum().backward()
        results.append((y.detach(), x.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))
    own = sharded.group.share(n_features)
    for name, parameter in whole.named_parameters():
        rows = own if name in ("W_enc", "b_enc", "W_dec") else slice(None)
        expected, got = parameter.grad[rows], sharded.local.get_parameter(name).grad
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12 * float(parameter.grad.abs().max()))
    again = sharded.whole()
    assert again.config == whole.config
    assert all(torch.equal(t, whole.state_dict()[name]) for name, t in again.state_dict().items())
    if skip:
        with pytest.raises(ValueError, match="x: expected the encoder's input"):
            sharded.decode(ours)


def run() -> None:
    os.environ.update(JOB["environment"])
    with open(JOB["log"], "w") as log:
        os.dup2(log.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    for case in JOB["cases"]:
        check(*case)


if JOB:
    run()
