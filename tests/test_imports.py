"""Importing is free and silent, and the package works where Triton cannot be imported."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_import_loads_nothing_heavy_and_prints_nothing() -> None:
    done = run(
        "import sys, fasttc; dir(fasttc)\n"
        "heavy = {'triton', 'transformers', 'torch', 'interp_engine'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_using_transcoders_and_graphs_loads_neither_triton_nor_transformers() -> None:
    done = run(
        "import sys, torch, fasttc\n"
        "before = set(sys.modules)\n"
        "tc = fasttc.Transcoder(4, 8, k=2); tc(torch.randn(3, 4)).sum().backward()\n"
        "fasttc.Graph, fasttc.TranscoderSet, fasttc.Site, fasttc.replaced, fasttc.attribute, fasttc.evaluate\n"
        "fasttc.train, fasttc.adapt, fasttc.finetune_ffn\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'triton', 'transformers', 'interp_engine'}, new"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_works_with_triton_blocked() -> None:
    done = run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fasttc\n"
        "tc = fasttc.Transcoder(4, 8, k=2); x = torch.randn(3, 4)\n"
        "acts = fasttc.ops.encode(x, tc.W_enc, tc.b_enc, k=2, impl='auto')\n"
        "assert acts.values.shape == (3, 2)\n"
        "try: fasttc.ops.encode(x, tc.W_enc, tc.b_enc, k=2, impl='triton')\n"
        "except Exception as error: assert 'riton' in str(error), error\n"
        "else: raise SystemExit('impl=triton must refuse, never fall back')"
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_every_public_name_resolves() -> None:
    done = run("import fasttc\nfor name in fasttc.__all__: getattr(fasttc, name)")
    assert done.returncode == 0, done.stderr


def test_unknown_name_is_an_attribute_error() -> None:
    done = run(
        "import fasttc\ntry: fasttc.nonsense\nexcept AttributeError as error: assert 'nonsense' in str(error)"
    )
    assert done.returncode == 0, done.stderr
