"""The command: what it prints, as words and as JSON, its exit status, and mistakes by name."""

import json
from itertools import pairwise

import pytest
from plan_cases import GROUP, IMAGE, TEXT, made_config

from bench.random_model import SIZES, make_processor, save_processor
from medground.cli import main
from medground.config import save_config
from medground.costs import peak_rate
from medground.datasets.manifest import load_records
from medground.plan.efficiency import PHASES
from medground.plan.gpus import GPUS
from medground.plan.text import PARTS, render
from medground.plan.workload import TEXT_TOKENS, longest_prompt


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file with a configuration whose model folder has no weights."""
    folder = tmp_path_factory.mktemp("plan")
    config = made_config(folder, model_precision="auto")
    save_config(config, folder / "run.json")
    return folder / "run.json"


def plan(saved, *words: str) -> list[str]:
    return ["plan", "--config", str(saved), "--text-tokens", str(TEXT), *words]


@pytest.fixture(scope="module")
def printed(saved):
    """A plan for two GPUs, as JSON."""
    with pytest.MonkeyPatch.context() as patched:
        out: list[str] = []
        patched.setattr("builtins.print", lambda *words, **_: out.append(" ".join(map(str, words))))
        status = main(plan(saved, "--gpus", "2", "--json", "--answer-tokens", "5"))
    return status, json.loads(out[0])


def test_json_has_everything(printed):
    status, found = printed
    assert status == 0
    assert list(found) == [
        "gpu", "gpus", "model", "workload", "memory", "micro_batch", "levers", "time", "efficiencies", "scaling"
    ]  # fmt: skip
    assert (found["gpus"], found["gpu"]["kind"], found["gpu"]["product_rate"]) == (2, "h100-80gb", 989e12)
    memory, work = found["memory"], found["workload"]
    assert list(memory["phases"]) == ["load", "evaluation", "rollout", "score", "update", "optimizer"]
    for row in memory["phases"].values():
        assert sum(row["parts"].values()) == row["live_bytes"]
        assert row["needed_bytes"] == pytest.approx(1.04 * row["live_bytes"] + 1.5e9)
    assert memory["live_bytes"] == memory["phases"][memory["highest"]]["live_bytes"]
    assert memory["fits"] and memory["free_bytes"] == memory["room_bytes"] - memory["needed_bytes"] > 0
    assert (work["prompt_tokens"], work["image_tokens"], work["text_tokens"]) == (TEXT + IMAGE, IMAGE, TEXT)
    assert work["micro_batch_tokens"] == 2 * GROUP and work["mean_answer_tokens"] == 5
    assert found["micro_batch"]["largest"] == found["micro_batch"]["all_groups"] == 4 * GROUP
    assert found["levers"] == [] and found["model"]["precision"] == "bfloat16"
    time = found["time"]
    assert list(time["phases"]) == list(PHASES)
    assert time["step_seconds"] == pytest.approx(sum(row["seconds"] for row in time["phases"].values()))
    assert time["gpu_hours"] == pytest.approx(2 * 10 * time["step_seconds"] / 3600)
    assert 0 < time["mfu"] < 1
    assert set(found["efficiencies"]) == {*PHASES, "link", "network"}
    assert all(row["source"] in ("measured", "assumed") and row["why"] for row in found["efficiencies"].values())
    weak, strong = found["scaling"]["weak"], found["scaling"]["strong"]
    assert [row["gpus"] for row in weak] == [2**i for i in range(11)]
    assert [row["gpus"] for row in strong] == [1, 2, 4, 8], "as many as divide the prompts"
    assert [row["prompts"] for row in weak[:3]] == [4, 8, 16] and {row["prompts"] for row in strong} == {8}
    assert weak[0]["efficiency"] == strong[0]["efficiency"] == 1
    assert weak[1]["step_seconds"] == time["step_seconds"] == strong[1]["step_seconds"]
    assert weak[1]["needed_bytes"] == pytest.approx(memory["needed_bytes"], rel=0.01)
    assert all(a["needed_bytes"] >= b["needed_bytes"] for a, b in pairwise(weak))


def test_words_say_the_same(printed):
    _, found = printed
    text = render(found)
    assert max(map(len, text.splitlines())) < 260
    assert "FITS: 1.5 of 84.9 GB, 83.4 GB to spare" in text
    assert f"largest loss.micro_batch_tokens that fits: {4 * GROUP}, all of a GPU's groups" in text
    assert "reckoned, not measured" in text and "40% assumed" in text and "WHAT IS ASSUMED" in text
    assert "\n1024     4096  " in text and "MORE GPUS, 4 prompts a GPU" in text
    # every part of memory has its row
    rows = {line.split("  ")[0] for line in text.splitlines()}
    large = {**found, "memory": {**found["memory"], "phases": {"update": {"parts": dict.fromkeys(PARTS, 10**9)}}}}
    large["memory"]["phases"]["update"] |= {"live_bytes": 11e9, "needed_bytes": 12e9}
    rows = {line.split("  ")[0] for line in render(large).splitlines()}
    assert set(PARTS.values()) <= rows


def test_what_does_not_fit_says_by_how_much_and_what_would_help(saved, capsys, monkeypatch):
    small = GPUS["rtx-4090-24gb"]._replace(memory=1.503e9)
    monkeypatch.setitem(GPUS, "rtx-4090-24gb", small)
    assert main(plan(saved, "--gpus", "2", "--gpu", "rtx-4090-24gb")) == 1
    out = capsys.readouterr()
    assert "DOES NOT FIT: " in out.out and "what to change" in out.out and "reckoned" in out.out
    assert "--loss.micro-batch-tokens" in out.out and "--model.activation-checkpointing full" in out.out
    assert "update" in out.err, "progress"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--gpu", "abacus"], "--gpu: want one of h100-80gb"),
        (["--gpus", "0"], "--gpus: want 1 or more; got 0"),
        (["--gpus", "3"], "rollout.prompts_per_step: want a multiple of the 3 GPUs; got 8"),
        (
            ["--loss.micro-batch-tokens", "50"],
            f"loss.micro_batch_tokens: want at least {GROUP}, a prompt of {TEXT + IMAGE}",
        ),
        (["--rollout.cache-gb", "1e-6"], "rollout.cache_gb: want at least"),
        (["--answer-tokens", "99"], "--answer-tokens: want 1 to rollout.max_new_tokens, 12; got 99"),
        (
            ["--model.path", "nowhere"],
            "model.path: want a folder with config.json (weights are not needed) or one of Qwen/",
        ),
        (["--rollout.max-new-tokens", "130000"], "model's context of 128000 tokens; got a prompt of 36"),
        (["--data.max-pixels", "700"], "data.max_pixels: want 784 or more"),
    ],
)
def test_mistakes_are_named(saved, capsys, words, named):
    assert main(plan(saved, *words)) == 2
    assert named in capsys.readouterr().err


def test_unusual_words(capsys):
    assert main(["plan"]) == 2 and main(["plan", "--gpus", "2"]) == 2
    assert main(["plan", "--help"]) == 0
    assert "usage: medground plan PRESET" in capsys.readouterr().out
    assert main(["plan", "fly"]) == 2
    assert "unknown preset 'fly'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "demo", "--gpus", "many"])
    assert all(kind in __import__("medground.cli").cli._PLAN_HELP for kind in GPUS)


def test_prompts_are_measured_where_data_and_model_are(phantoms, tmp_path):
    config = made_config(tmp_path, data_path=(str(phantoms),), prompt_template="brief")
    assert longest_prompt(config).told == "image of data.max_pixels, text assumed"
    save_processor(make_processor(1000, SIZES["tiny"]), tmp_path)
    measured = longest_prompt(config)
    assert measured.told == f"longest text and largest image of {phantoms}"
    # films of 56 pixels; a token is a letter
    longest = max(len(example.phrase) for example in load_records(phantoms))
    assert measured.grid == (4, 4) and measured.text == longest + len("Find: ") + 4
    assert longest_prompt(config, 7).text == 7
    elsewhere = made_config(tmp_path, data_max_pixels=784 * 30)
    assert (
        longest_prompt(elsewhere)[:2] == (TEXT_TOKENS, (10, 12))
        and longest_prompt(elsewhere).tokens == TEXT_TOKENS + 30
    )


def test_gpus_have_rates_and_sensible_memory():
    for name, gpu in GPUS.items():
        if gpu.name:
            size = float(name.split("-")[-1].removesuffix("gb"))
            assert peak_rate(gpu.name) and 0.9 * size < gpu.memory / 2**30 < size * 1.01
            assert gpu.network * 8 <= 9 * gpu.link
