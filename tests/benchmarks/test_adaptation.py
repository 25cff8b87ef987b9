"""The ledger's arithmetic on made-up runs: what is reached, ratios and their bounds, the search, the tables."""

import json

import pytest

from fasttc.benchmarks.adaptation import ledger as adaptation
from fasttc.benchmarks.adaptation import prediction, throughput
from fasttc.benchmarks.adaptation import report as adaptation_report
from fasttc.benchmarks.adaptation import runs as adaptation_runs
from fasttc.benchmarks.adaptation.costs import Shape, forward_flops, step_flops, training_flops
from fasttc.benchmarks.adaptation.report import Bound, comparisons, ratio, reach


def run(mode, tokens, fvu, seed=0, coverage="covered", **more):
    where = {"distance": "mild", "coverage": coverage, "quality": "long"}
    if mode == "scratch":
        where |= {"coverage": "", "quality": ""}
    figures = dict.fromkeys(("kl", "top1_error", "ce_replaced", "cpu_seconds", "flops", "peak_bytes"), 1.0)
    return {"mode": mode, "tokens": tokens, "budget": tokens, "fvu": fvu, "seed": seed, "l0": 16.0,
            "config": {}, **where, **figures, **more}  # fmt: skip


def test_what_a_curve_reaches_and_does_not():
    curve = [run("scratch", 1000, 0.4), run("scratch", 4000, 0.1)]
    assert reach(0.2, curve) == pytest.approx(("=", 2000))
    assert reach(0.5, curve) == ("<", 1000)
    assert reach(0.05, curve) == (">", 4000)


@pytest.mark.parametrize(
    ("scratch", "adapted", "expected"),
    [
        (("=", 100.0), ("=", 10.0), ("=", 10)),
        ((">", 100.0), ("=", 10.0), (">", 10)),
        (("=", 100.0), ("<", 10.0), (">", 10)),
        (("=", 100.0), (">", 10.0), ("<", 10)),
        ((">", 100.0), (">", 10.0), ("?", 10)),
    ],
)
def test_ratios_keep_their_bounds(scratch, adapted, expected):
    assert ratio(Bound(*scratch), Bound(*adapted)) == expected


@pytest.fixture
def rows():
    found = []
    for seed, worse in ((0, 1.0), (1, 1.1)):
        for tokens, fvu in ((20_000, 0.2), (163_840, 0.11), (1_310_720, 0.08)):
            found.append(run("scratch", tokens, worse * fvu, seed))
        for coverage, factor in (("covered", 1.0), ("uncovered", 1.6)):
            found.append(run("unadapted", 0, 0.3 * factor, seed, coverage))
            for tokens, fvu in ((2560, 0.13), (20_480, 0.10), (163_840, 0.07)):
                found.append(run("closed form + PAT", tokens, factor * fvu, seed, coverage))
    return found


def test_every_cell_level_and_seed_is_compared_and_the_worst_stands_first(rows):
    found = comparisons(rows)
    names = {(r["coverage"], r["level"], r["measure"], r["seed"]) for r in found}
    levels = {"FVU 0.12", "FVU 0.13", "scratch at 163,840", "scratch at 1,310,720"}
    assert {level for _, level, measure, _ in names if measure == "fvu"} == levels
    assert {level for _, level, measure, _ in names if measure == "kl"} == {"scratch at 163,840"}
    assert len(found) == len(names) == 2 * 2 * (3 + 3)
    table = adaptation_report.ratio_table(found).splitlines()[2:]
    assert len(table) == 6
    assert table[0].startswith("| no |")
    assert "<" in table[0].split("|")[-2], "what was not reached stands first"
    assert "(" in table[-1].split("|")[-3], "least and greatest of the seeds"


def test_held_out_tokens_are_counted_on_both_sides(rows):
    one = next(r for r in comparisons(rows) if r["level"] == "scratch at 163,840" and r["measure"] == "fvu")
    held_out = adaptation_report.HELD_OUT_TOKENS
    expected = (one["scratch"].value + held_out) / (one["adapted"].value + held_out)
    assert one["counted"] == ("=", pytest.approx(expected))


def test_other_measures_have_a_table(rows):
    for row in rows:
        row["kl"] = 2 * row["fvu"]
    table = adaptation_report.measure_table(comparisons(rows), (163_840,)).splitlines()
    assert [name.strip() for name in table[0].split("|")[5:-1]] == list(adaptation_report.QUALITY.values())
    by_fvu, by_kl = (cell.strip() for cell in table[2].split("|")[5:7])
    assert by_fvu == by_kl
    assert len(table) == 2 + 2


def test_files_are_written_from_units(rows, tmp_path, capsys):
    units = tmp_path / "units"
    units.mkdir()
    for i, row in enumerate(rows):
        (units / f"{i}.json").write_text(json.dumps(row))
    (units / "search_x.json").write_text(json.dumps({"mode": "scratch", "tried": [], "config": {}}))
    assert adaptation_report.write(units, tmp_path / "results") == 0
    data = adaptation_report.record.read(tmp_path / "results/ledger.json")
    assert len(data["rows"]) == len(rows)
    assert len(data["searches"]) == 1
    text = (tmp_path / "results/ledger.md").read_text()
    assert "## covered, mild, base long" in text
    assert adaptation_report.readme(data) in text + capsys.readouterr().out
    assert adaptation_report.write(tmp_path / "none", tmp_path / "results") == 1


def test_the_search_climbs_while_it_helps():
    class Fake:
        def fit(self, mode, tokens, seed, config, base):
            seen.append(config)
            fvu = abs(config["lr"] - 4) + abs(config["update_tokens"] - 64) / 64 + (config["refit"] != "last")
            return None, type("Report", (), {"fvu": fvu})

    seen: list = []
    found = adaptation_runs.Bench.search(
        Fake(), "scratch", 1, None, {**adaptation_runs.START, "refit": None}, ("last",)
    )
    assert found["config"] == {"lr": 4.0, "update_tokens": 64, "refit": "last"}
    assert found["fvu_validation"] == 0
    assert len(found["tried"]) == len(seen) == len({json.dumps(c) for c in seen})


def test_flops_by_hand():
    shape = Shape(layers=2, d_in=3, n_features=10, k=2, matrices=100, context=4, width=3)
    assert forward_flops(shape) == 2 * 100 + 2 * 2 * 4 * 3
    assert step_flops(shape) == 2 * (2 * 3 * 10 + 8 * 2 * 3)
    one, two = (training_flops(shape, 100, 50, refit) for refit in (None, "last"))
    assert two > one
    assert training_flops(shape, 200, 50, None) == 2 * one


def test_a_plan_names_every_unit_once(tmp_path):
    ledger = adaptation.Ledger(adaptation.FULL, None, tmp_path, lambda name: True)
    names = [n for d in ("mild", "severe") for s in (0, 1, 2) for *_, n in ledger._units(d, s)]
    assert len(names) == len(set(names))
    per_cell = sum(len(adaptation.FULL.budgets[mode]) for mode in ("unadapted", *adaptation_runs.ADAPTING))
    assert len(names) == 3 * (8 * per_cell + 2 * len(adaptation.FULL.budgets["scratch"]))


def test_the_prediction_is_labelled(capsys):
    assert prediction.main([]) == 0
    assert "Every figure is a PREDICTION" in capsys.readouterr().out


def test_throughput_runs_and_both_sides_begin_with_one_loss(tmp_path, monkeypatch):
    for name, size in {"LAYERS": 2, "D": 8, "N_FEATURES": 32, "K": 4, "TARGET": 0.0}.items():
        monkeypatch.setattr(throughput, name, size)
    out = tmp_path / "throughput.json"
    assert throughput.main(["--tokens", "16", "--rounds", "1", "--threads", "1", "--out", str(out)]) == 0
    assert [row["name"] for row in adaptation_report.record.read(out)["rows"]] == ["fasttc", "plain PyTorch"]
