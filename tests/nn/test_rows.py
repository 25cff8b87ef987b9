"""Files written row by row are what safetensors writes at once."""

import pytest
import torch
from safetensors.torch import load_file

from fasttc.nn import rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rows_in_any_order_make_the_whole_tensors(tmp_path, dtype):
    torch.manual_seed(0)
    whole = {
        "W": torch.randn(7, 3).to(dtype),
        "b": torch.randn(7).to(dtype),
        "t": torch.tensor(2.0).to(dtype),
    }
    file = tmp_path / "layer.safetensors"
    rows.reserve(file, {name: t.to("meta") for name, t in whole.items()})
    assert all((t == 0).all() for t in load_file(file).values())
    for start, stop in ((5, 7), (0, 2), (2, 5), (5, 5)):
        for name in ("W", "b"):
            rows.write_rows(file, name, whole[name][start:stop], start)
    rows.write_rows(file, "t", whole["t"])
    found = load_file(file)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], t) for name, t in whole.items())
