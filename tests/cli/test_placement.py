"""Models spread over devices and transcoders somewhere else, by the verbs that train them: what a CPU can show."""

from pathlib import Path

import pytest
import torch

from fasttc.nn import TranscoderSet

OPTIONS = ("--context", "32", "--batch-size", "4", "--features", "16", "-k", "2", "--tokens", "256")


def test_a_spread_model_trains_the_same_transcoders(fasttc, home: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    arguments = ("train", home / "model", "--data", home / "text.jsonl", *OPTIONS)
    for out, more in (
        ("plain", ()),
        ("spread", ("--device-map", "sequential", "--transcoder-device", "cpu")),
    ):
        code, _, err = fasttc(*arguments, "--out", tmp_path / out, *more)
        assert code == 0, err
    sets = [TranscoderSet.from_pretrained(tmp_path / out) for out in ("plain", "spread")]
    for one, two in zip(*sets, strict=True):
        assert all(torch.equal(one.state_dict()[name], t) for name, t in two.state_dict().items())


@pytest.mark.parametrize("verb", ["train", "adapt"])
@pytest.mark.parametrize(("more", "words"), [
    (("--device-map", "auto", "--device", "cpu"), "--device-map: expected none beside --device cpu, got 'auto'"),
    (("--transcoder-device", "cuda:99"), "device: expected one of this machine, got 'cuda:99'"),
])  # fmt: skip
def test_bad_places(fasttc, home: Path, tmp_path: Path, verb: str, more: tuple[str, ...], words: str) -> None:
    more = ("--context", "32", *more, *(("--transcoders", str(home / "tcs")) if verb == "adapt" else ()))
    code, _, err = fasttc(verb, home / "model", "--data", home / "text.jsonl", "--out", tmp_path, *more)
    assert code == 2
    assert words in err.splitlines()[-1]
