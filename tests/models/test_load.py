"""load(): folders, options, and one clear line for everything that can be wrong."""

import json
import shutil

import pytest
import torch

from fasttc.models import load


@pytest.fixture
def saved(tiny_model, tiny_tokenizer, tmp_path):
    """`saved(family)`: the folder of a tiny model with its tokenizer."""

    def save(family="llama", *, tokenizer=True, **config):
        folder = tmp_path / family
        model = tiny_model(family, **config)
        model.save_pretrained(folder)
        if tokenizer:
            tiny_tokenizer.save_pretrained(folder)
        return folder, model

    return save


def test_round_trip(saved, family, ids, capsys):
    folder, original = saved(family)
    model, tokenizer = load(folder)
    assert torch.equal(model(ids).logits, original(ids).logits)
    assert tokenizer("t4 t9")["input_ids"] == [2, 4, 9]
    assert model.config._attn_implementation == "eager"
    assert not model.training
    assert "Loading weights" not in capsys.readouterr().err


def test_options(saved, ids):
    folder, _ = saved("gpt2", tokenizer=False)
    model, tokenizer = load(str(folder), dtype="float64", device="cpu")
    assert tokenizer is None
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert next(load(folder, dtype=torch.bfloat16)[0].parameters()).dtype == torch.bfloat16
    load(folder, dtype=torch.bfloat16)[0].save_pretrained(folder)
    assert next(load(folder)[0].parameters()).dtype == torch.bfloat16  # as saved


def test_stories(shared_data):
    model, tokenizer = load(shared_data / "models" / "stories260K")
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    text = tokenizer.decode(
        model.generate(ids, max_new_tokens=20, do_sample=False)[0], skip_special_tokens=True
    )
    assert text.startswith("Once upon a time, there was")


def test_no_such_place(tmp_path):
    for ref in (tmp_path / "absent", str(tmp_path / "absent"), "./absent", "a/b/c", "~/absent-model"):
        with pytest.raises(
            ValueError, match="expected a model folder or a hub id, got a path that does not exist"
        ):
            load(ref)
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(ValueError, match="expected a model folder or a hub id, got a file"):
        load(tmp_path / "file.txt")
    with pytest.raises(ValueError, match=r"expected a model folder with a config\.json, got one without"):
        load(tmp_path)
    with pytest.raises(
        ValueError, match="absent/model: cannot load the model: no such folder here, and the hub"
    ):
        load("absent/model")


def one_line(folder, match, **options):
    with pytest.raises(ValueError, match=match) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_can_be_wrong_with_a_folder(saved):
    folder, _ = saved("llama")
    one_line(folder, "dtype: expected float32, float64, bfloat16 or float16, got 'int8'", dtype="int8")
    one_line(folder, "device: expected one of this machine, got 'abacus'", device="abacus")
    if not torch.cuda.is_available():
        one_line(folder, "device: expected one of this machine, got 'cuda'", device="cuda")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:200])
    one_line(folder, "cannot load the model")
    weights.unlink()
    one_line(folder, "cannot load the model")
    weights.write_bytes(whole)
    edit(folder, num_hidden_layers=4)
    one_line(folder, r"expected all weights of the model, got none for \d+: model.layers.3")
    edit(folder, num_hidden_layers=3, vocab_size=62)
    one_line(folder, "cannot load the model")
    (folder / "config.json").write_text("{ not json")
    one_line(folder, "cannot load the model")


def test_other_families(saved):
    folder, _ = saved("llama")
    edit(folder, model_type="gpt_bigcode", architectures=["GPTBigCodeForCausalLM"])
    one_line(folder, "expected one of llama, qwen2, .*, gpt_neox, got model type 'gpt_bigcode'")
    edit(folder, model_type="nobody-knows")
    one_line(folder, "cannot load the model")


def test_remote_code_is_never_run(saved, tmp_path):
    folder, _ = saved("llama")
    marker = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').write('ran')\nclass Own: pass\n")
    edit(folder, model_type="own-type", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    one_line(folder, "it needs code from the repository, which is never run")
    assert not marker.exists()


def test_a_broken_tokenizer_is_not_hidden(saved):
    folder, _ = saved("llama")
    (folder / "tokenizer.json").write_text("{ not json")
    one_line(folder, "cannot load the tokenizer")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert load(folder)[1] is None
    shutil.rmtree(folder)
