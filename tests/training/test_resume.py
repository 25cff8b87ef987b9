"""Stop a training anywhere, in any way: what is resumed ends with the bits of what was never stopped."""

import json
import os
import signal
import threading

import pytest
import torch
from safetensors.torch import save_file

from fasttc.training import Diverged, Interrupted, adapt, finetune, train
from fasttc.training.checkpoint import StoredTensors, load_checkpoint, model_fingerprint, save_checkpoint
from fasttc.training.distributed import Processes

OPTIONS = {"batch_size": 4, "tokens": 64 * 12, "progress": False, "validation_tokens": 200, "lr": 3e-3}
WIDTH = {"n_features": 48, "k": 6}

FINETUNING = {
    "finetune": {},
    "finetune-lora": {"parameters": "lora"},
    "finetune-8bit": {"optimiser": "adamw8bit"},
    "finetune-parts": {"micro_batch": 1, "checkpointing": True, "parameters": "all"},
}


class Runner:
    """One kind of training on the same model and data, with its result as tensors."""

    def __init__(self, kind, model, data, make_model):
        self.kind, self.model, self.data = kind, model, data
        if kind.startswith("adapt"):
            activation = kind.removeprefix("adapt-")
            self.base = train(model, data, **(OPTIONS | WIDTH | {"activation": activation}))[0]
            self.tuned = make_model("llama", seed=0)
            with torch.no_grad():
                for layer in self.tuned.model.layers:
                    layer.mlp.down_proj.weight *= 1.2

    def __call__(self, out=None, **options):
        options = OPTIONS | {"out": out} | options
        if self.kind.startswith("finetune"):
            tuned = finetune(self.model, self.data, **FINETUNING[self.kind], **options)[0]
            return dict(tuned.named_parameters())
        if self.kind.startswith("adapt"):
            tcs = adapt(self.tuned, self.base, self.data, train_threshold="jump" in self.kind, **options)[0]
        else:
            tcs = train(self.model, self.data, activation=self.kind, **WIDTH, **options)[0]
        return {f"{i}.{name}": t for i, tc in enumerate(tcs) for name, t in tc.state_dict().items()}


KINDS = [
    *FINETUNING,
    "topk",
    "batchtopk",
    "jumprelu",
    "relu",
    "adapt-topk",
    "adapt-jumprelu",
    "adapt-relu",
]


@pytest.fixture
def runner(model, data, tiny_model):
    return lambda kind: Runner(kind, model, data, tiny_model)


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed_ends_with_the_same_bits(runner, kind, tmp_path, interrupt, same_tensors):
    pytest.importorskip({"finetune-lora": "peft", "finetune-8bit": "bitsandbytes"}.get(kind, "torch"))
    run = runner(kind)
    whole = run()
    for step in (1, 7):
        with pytest.raises(Interrupted, match=f"interrupted after step {step}; .*checkpoint resumes there"):
            run(tmp_path / "out", callbacks=[interrupt(step)], resume="auto")
    assert not (tmp_path / "out").exists()
    same_tensors(run(tmp_path / "out", resume=True), whole)
    assert (tmp_path / "out").is_dir()
    assert not (tmp_path / "out.run" / "checkpoint").exists()


@pytest.mark.parametrize("kind", ["topk", "finetune"])
def test_a_kill_between_checkpoints_goes_back_to_the_last(runner, kind, tmp_path, same_tensors):
    run = runner(kind)
    whole = run()

    def crash(progress):
        if progress.step == 9:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "out", callbacks=[crash], checkpoint_every=4, log_every=1)
    checkpoint = tmp_path / "out.run" / "checkpoint"
    assert json.loads((checkpoint / "state.json").read_text())["step"] == 8
    same_tensors(run(tmp_path / "out", resume=True, log_every=1), whole)
    log = (tmp_path / "out.run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, 13))


def test_ctrl_c_never_cuts_a_step_in_two(runner, tmp_path, same_tensors, monkeypatch):
    """A real signal, in the middle of a step: the step is finished, then the checkpoint is written."""
    from fasttc.training.transcoding import TranscoderTask

    run = runner("topk")
    whole = run()
    original, calls = TranscoderTask.backward, []

    def backward(self, batch):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch)

    monkeypatch.setattr(TranscoderTask, "backward", backward)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(tmp_path / "out")
    assert caught.value.step == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    same_tensors(run(tmp_path / "out", resume=True), whole)


def test_interrupt_inside_a_step_keeps_the_last_checkpoint(runner, tmp_path, same_tensors, monkeypatch):
    """Off the main thread no signal can be held back: there the half-done step is thrown away."""
    from fasttc.training.optimiser import Optimiser

    run = runner("topk")
    whole = run()
    original, calls = Optimiser.step, []

    def step(self, lr):
        original(self, lr)
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt

    def work():
        try:
            run(tmp_path / "out", checkpoint_every=3)
        except Interrupted as error:
            caught.append(error)

    caught = []
    with monkeypatch.context() as patch:
        patch.setattr(Optimiser, "step", step)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert caught[0].step == 6
    same_tensors(run(tmp_path / "out", resume=True), whole)


def test_interrupt_without_a_place_says_so(runner, interrupt):
    with pytest.raises(Interrupted, match=r"after step 2; nothing was saved \(no out= was given\)"):
        runner("topk")(callbacks=[interrupt(2)])


def test_another_configuration_is_refused_by_name(runner, model, data, tmp_path, interrupt, tiny_model):
    run = runner("topk")
    with pytest.raises(Interrupted):
        run(tmp_path / "out", callbacks=[interrupt(3)])
    with pytest.raises(
        ValueError, match=r"another configuration: batch_size \(checkpoint 4, now 2\); lr .*0\.001"
    ):
        run(tmp_path / "out", resume=True, batch_size=2, lr=1e-3)
    run.model = tiny_model("llama", seed=1)
    with pytest.raises(ValueError, match="another configuration: model "):
        run(tmp_path / "out", resume="auto")
    run.model, run.data = model, type(data)(data.documents[:50], context=16, bos_id=2)
    with pytest.raises(ValueError, match="another configuration: data "):
        run(tmp_path / "out", resume="auto")
    with pytest.raises(ValueError, match=r"expected a checkpoint at .*, found none"):
        run(tmp_path / "other", resume=True)


def forbid(model):
    """The model may not run any more."""

    def run(*_):
        raise AssertionError("the model ran")

    model.model.register_forward_pre_hook(run)


@pytest.mark.parametrize("kind", ["topk", "adapt-topk", "finetune"])
def test_a_missing_checkpoint_is_said_before_any_work(runner, kind, tmp_path):
    run = runner(kind)
    forbid(getattr(run, "tuned", run.model))
    with pytest.raises(ValueError, match=r"expected a checkpoint at .*, found none"):
        run(tmp_path / "out", resume=True)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_configuration_is_refused_before_the_first_closed_form(
    runner, tmp_path, interrupt
):
    run = runner("adapt-topk")
    options = {"out": tmp_path / "out", "refit": "first"}
    with pytest.raises(Interrupted):
        run(callbacks=[interrupt(2)], **options)
    forbid(run.tuned)
    with pytest.raises(ValueError, match="another configuration: seed "):
        run(resume=True, seed=3, **options)


def test_another_split_of_the_same_documents_is_another_configuration(model, data, tmp_path, interrupt):
    """Also where the data comes opened, and options say nothing about its split."""
    one, two = (type(data)(data.documents, context=16, bos_id=2, split_seed=s, text="{t}") for s in (1, 2))
    options = OPTIONS | WIDTH | {"tokens": 256, "layers": (0,), "out": tmp_path / "out"}
    with pytest.raises(Interrupted):
        train(model, one, callbacks=[interrupt(2)], **options)
    with pytest.raises(ValueError, match=r"split_seed \(checkpoint 1, now 2\); splits "):
        train(model, two, resume=True, **options)
    config = train(model, one, resume=True, **options)[1].config
    found = [config[name] for name in ("text", "context", "split_seed", "fractions")]
    assert found == ["{t}", 16, 1, [0.9, 0.05, 0.05]]


def test_without_resume_a_run_starts_anew(runner, tmp_path, interrupt, same_tensors):
    run = runner("topk")
    with pytest.raises(Interrupted):
        run(tmp_path / "out", callbacks=[interrupt(3)])
    same_tensors(run(tmp_path / "out", seed=5), run(seed=5))


def poisoned(step, *, seen=None, keep=None):
    """Callback that makes a weight NaN after a step, and keeps what the weights are after another."""

    def callback(progress):
        weights = progress.task.optimiser._groups[0].parameters
        if progress.step == keep:
            seen.update({name: p.detach().clone() for name, p in weights.items()})
        if progress.step == step:
            with torch.no_grad():
                next(iter(weights.values())).fill_(float("nan"))

    return callback


@pytest.mark.parametrize("kind", ["topk", "finetune"])
def test_a_loss_that_is_not_a_number_ends_with_the_last_checkpoint(runner, kind, tmp_path, same_tensors):
    run, seen = runner(kind), {}
    options = {"checkpoint_every": 3} | ({"whiten": False} if kind == "topk" else {})
    found = run(tmp_path / "out", callbacks=[poisoned(7, seen=seen, keep=6)], **options)
    same_tensors({name: found[name].detach() for name in seen}, seen)
    report = json.loads((tmp_path / "out.run" / "report.json").read_text())
    assert "diverged at step 8: loss nan" in report["stopped"]
    assert report["stopped"].endswith("try a lower learning rate; kept the weights of step 6")
    assert not (tmp_path / "out.run" / "checkpoint").exists()


@pytest.mark.parametrize("out", [None, "a"])
def test_a_divergence_before_the_first_checkpoint_is_an_error(runner, tmp_path, out):
    place = out and tmp_path / out
    with pytest.raises(Diverged, match=r"diverged at step 4: loss nan.* nothing was kept"):
        runner("topk")(place, callbacks=[poisoned(3)], checkpoint_every=8)
    assert place is None or not place.exists()


def test_a_checkpoint_of_bad_weights_is_not_gone_back_to(runner, tmp_path, monkeypatch):
    """The loss of a step is that of the weights before its update: a checkpoint may hold what nobody has seen yet."""
    from fasttc.training.transcoding import TranscoderTask

    original = TranscoderTask.after_update

    def after_update(task, metrics):
        original(task, metrics)
        if task._steps == 4:
            with torch.no_grad():
                task.transcoders[0].W_dec[0, 0] = float("inf")

    monkeypatch.setattr(TranscoderTask, "after_update", after_update)
    with pytest.raises(Diverged, match=r"diverged at step 5: .* nothing was kept"):
        runner("topk")(tmp_path / "out", checkpoint_every=4)
    assert load_checkpoint(tmp_path / "out.run" / "checkpoint")[1]["step"] == 4


def test_a_loss_that_explodes_stops(runner):
    with pytest.raises(Diverged, match=r"diverged at step .*try a lower learning rate"):
        runner("topk")(lr=1e3, log_every=1)


def test_a_kill_between_the_two_renames_loses_no_checkpoint(runner, tmp_path, interrupt, same_tensors):
    run = runner("topk")
    with pytest.raises(Interrupted):
        run(tmp_path / "out", callbacks=[interrupt(3)])
    checkpoint = tmp_path / "out.run" / "checkpoint"
    checkpoint.rename(checkpoint.with_name(".checkpoint.old-4242"))
    same_tensors(run(tmp_path / "out", resume=True), run())
    assert not list((tmp_path / "out.run").glob(".checkpoint*"))


def test_a_full_disk_leaves_the_last_checkpoint(runner, tmp_path, monkeypatch):
    run, real, calls = runner("topk"), save_checkpoint, []

    def save(path, tensors, values, processes):
        calls.append(1)
        if len(calls) > 1:
            monkeypatch.setattr("fasttc.training.checkpoint.save_file", full)
        real(path, tensors, values, processes)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fasttc.training.loop.save_checkpoint", save)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "out", checkpoint_every=4)
    assert sorted(p.name for p in (tmp_path / "out.run").iterdir()) == ["checkpoint", "metrics.jsonl"]
    assert load_checkpoint(tmp_path / "out.run" / "checkpoint")[1]["step"] == 4


def test_damaged_checkpoints(tmp_path):
    save_checkpoint(tmp_path / "c", {"a": torch.ones(2)}, {"config": {}})
    (tmp_path / "c" / "state.0.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="cannot read the checkpoint"):
        load_checkpoint(tmp_path / "c")
    save_checkpoint(tmp_path / "c", {}, {"config": {}})
    path = tmp_path / "c" / "state.json"
    path.write_text(path.read_text().replace('"schema_version": 3', '"schema_version": 99'))
    with pytest.raises(ValueError, match=r"expected a checkpoint of schema version 3, .* has 99"):
        load_checkpoint(tmp_path / "c")


def test_checkpoints_hold_the_random_state(tmp_path):
    torch.manual_seed(3)
    torch.rand(5)
    save_checkpoint(tmp_path / "c", {}, {})
    expected = torch.rand(4)
    torch.manual_seed(9)
    load_checkpoint(tmp_path / "c")
    assert torch.equal(torch.rand(4), expected)


def test_model_fingerprint_sees_a_changed_weight(tiny_model):
    model = tiny_model("llama")
    one = model_fingerprint(model)
    assert one == model_fingerprint(tiny_model("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 1.0001
    assert model_fingerprint(model) != one


def test_rows_of_all_files_are_shared_out_anew(tmp_path):
    """What three processes wrote, as one, two and five of them read it."""
    whole, counts = torch.arange(14.0).reshape(7, 2), [0, 3, 4]
    for rank, rows in enumerate(whole.split(counts)):
        named = {"a.0.share.W": rows, "a.0.share.step": torch.tensor(5.0)} | ({} if rank else {"a.b": whole})
        save_file(named, tmp_path / f"{rank}.safetensors")
    files = [tmp_path / f"{rank}.safetensors" for rank in range(3)]
    for size in (1, 2, 5):
        found = []
        for rank in range(size):
            group = Processes()
            group.rank, group.size = rank, size
            stored = StoredTensors(files, processes=group).under("a.")
            assert set(stored) == {"0.share.W", "0.share.step", "b"}
            assert stored["0.share.step"] == 5
            assert torch.equal(stored["b"], whole)
            assert len(stored["0.share.W"]) == len(range(7)[group.share(7)])
            found.append(stored["0.share.W"])
        assert torch.equal(torch.cat(found), whole)
