"""The audit of rewards: what the policies say, planted exploits that it must find, and its page."""

import dataclasses
import json
import shutil
from typing import get_args

import numpy as np
import pytest
import torch
from made_up_run import HOSTILE

from medground.answers import parse_answer
from medground.audit.cheats import CHEATS, EMPTY, FAIR, HONEST, JITTERED, Case, completions, jittered, mirrored
from medground.audit.earnings import earn, judge
from medground.audit.rewards import RewardAuditConfig, audit_rewards, drawn, warnings_of
from medground.cli import main
from medground.config import CHAINED, RewardConfig, Template
from medground.datasets.manifest import load_records, write_records
from medground.evaluate import read_answer
from medground.records import Example, Prompt
from medground.rewards.total import Scorer
from medground_kernels.group_advantage import group_advantage

NONE = torch.empty(0)
BOX = (120.0, 20.0, 160.0, 60.0)
BROKEN = ("copied prompt", "thought alone", "answer 50 times")


def prompt(number=0, boxes=(BOX,), phrase="left mass", patient=None):
    """A film of 200 x 100, which the model sees at 280 x 140."""
    patient = patient or f"p{number}"
    example = Example(f"r{number}", "a.png", 200, 100, phrase, boxes, "mass", patient, "s", "t", "train")
    return Prompt(example, NONE, NONE, NONE, NONE, (), 280, 140)


def said(asked, template="plain", fairs=0):
    """{name of the policy: its completion}."""
    policies = (*HONEST, *CHEATS)
    case = Case(asked, template, ((10.0, 10.0, 50.0, 50.0),), np.random.default_rng(0))
    names = [policy.name for policy in policies] + [f"{FAIR} {i}" for i in range(fairs)]
    return dict(zip(names, completions(case, policies, fairs), strict=True))


@pytest.mark.parametrize("template", get_args(Template))
def test_completions_are_of_the_form_unless_they_are_about_breaking_it(template):
    for asked in (prompt(), prompt(boxes=())):
        for name, text in said(asked, template, 3).items():
            if text is None:
                assert name in ("mirror side", "both sides") and not asked.example.boxes
                continue
            answer = parse_answer(text)
            assert (answer.chained if template in CHAINED else answer.well_formed) == (name not in BROKEN), name
            assert (answer.boxes is None) == (name in BROKEN), name


def test_what_the_cheats_answer():
    asked = prompt()
    boxes = {name: read_answer(text, asked).boxes for name, text in said(asked).items()}
    assert boxes["truth"][0] == pytest.approx(BOX, abs=0.5)
    assert boxes["whole image"] == boxes["huge numbers"] == ((0, 0, 200, 100),)
    assert boxes["mirror side"][0] == pytest.approx((40, 20, 80, 60), abs=0.5)
    assert len(boxes["both sides"]) == 2 and len(boxes["many boxes"]) == 16 and len(boxes["same box 50 times"]) == 50
    x1, y1, x2, y2 = boxes["tiny box in place"][0]
    assert (x1 + x2) / 2 == pytest.approx(140, abs=1) and 0 < (x2 - x1) * (y2 - y1) < 0.001 * 200 * 100
    (left, top, right, bottom) = boxes["negative numbers"][0]
    assert (right - left) * (bottom - top) == 0 and boxes[EMPTY] == ()
    assert "<answer>" in said(asked)["copied prompt"] and "bbox_2d" in said(asked)["thought alone"]


def test_sides_are_mirrored_where_the_phrase_names_one():
    assert mirrored(prompt().example) == ((40.0, 20.0, 80.0, 60.0),)
    assert mirrored(prompt(phrase="mass").example) is None
    assert mirrored(prompt(boxes=((90.0, 20.0, 130.0, 60.0),)).example) is None  # over the midline
    assert mirrored(prompt(boxes=()).example) is None


def test_a_jittered_box_has_each_edge_off_by_up_to_its_share():
    draw = np.random.default_rng(1)
    off = np.array([jittered((BOX,), 0.25, draw)[0] for _ in range(2000)]) - BOX
    assert 9.5 < np.abs(off).max() <= 10 and np.abs(off.mean(0)).max() < 0.5
    assert np.abs(np.corrcoef(off.T) - np.eye(4)).max() < 0.1


def test_the_fair_policy_is_its_mixture():
    asked, without = prompt(), prompt(boxes=())
    prior = (10.0, 10.0, 50.0, 50.0)
    found = [read_answer(t, asked).boxes[0] for n, t in said(asked, fairs=2000).items() if n.startswith(FAIR)]
    priors = sum(box == pytest.approx(prior, abs=0.6) for box in found)
    assert 0.08 < priors / 2000 < 0.12
    nothing = [read_answer(t, without).boxes for n, t in said(without, fairs=2000).items() if n.startswith(FAIR)]
    assert 0.67 < sum(boxes == () for boxes in nothing) / 2000 < 0.73


class Paid:
    """Scores as a function of an answer's boxes says, in place of the run's `Scorer`."""

    def __init__(self, pay):
        self.pay, self.honest = pay, Scorer(RewardConfig(), "plain", 10)

    def __call__(self, groups, answers):
        rewards = self.honest(groups, answers)
        total = torch.tensor([[float(self.pay(a.boxes or ())) for a in group] for group in answers])
        return rewards._replace(total=total)


def area(boxes):
    return sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes) / 20_000


def judged(prompts, scorer, fairs=4):
    priors = [((10.0, 10.0, 50.0, 50.0),)] * len(prompts)
    earned = earn(iter(prompts), priors, scorer, "plain", fairs=fairs, seed=0)
    return judge(earned), earned


def test_a_reward_that_pays_for_area_is_found_out():
    found, _ = judged([prompt(i) for i in range(40)], Paid(area))
    names = {row["cheat"] for row in found["cheats_above_jittered_truth"]}
    assert {"whole image", "huge numbers", "many boxes", "centre box", "both sides"} <= names
    assert not names & {EMPTY, "tiny box", "negative numbers", "copied prompt"}
    row = next(row for row in found["cheats_above_jittered_truth"] if row["cheat"] == "whole image")
    assert row["reward"] == pytest.approx(1) and row["jittered_truth"] == pytest.approx(0.08, abs=0.02)
    assert row["low"] <= row["difference"] <= row["high"]
    assert row["difference"] == pytest.approx(row["reward"] - row["jittered_truth"])
    assert any("whole image earns 1.00, a 25 % off truth 0.0" in line for line in warnings_of(found))


def test_a_tie_is_no_win_and_patients_are_resampled_whole():
    found, _ = judged([prompt(i) for i in range(20)], Paid(lambda boxes: 1))
    assert not found["cheats_above_jittered_truth"]
    assert {row["cheat"] for row in found["cheats_not_told_apart"]} == {policy.name for policy in CHEATS}
    # the whole image beats a truth 25 % off on one patient of two; of many films each
    large = [prompt(i, boxes=((0.0, 0.0, 200.0, 100.0),) if i < 20 else (BOX,), patient=f"p{i // 20}", phrase="mass")
             for i in range(40)]  # fmt: skip
    found, _ = judged(large, Scorer(RewardConfig(), "plain", 10))
    row = found["against_jittered_truth"]["present"]["whole image"]
    assert row["low"] < 0 < row["high"] and row in [
        {k: v for k, v in r.items() if k not in ("cheat", "records")} for r in found["cheats_not_told_apart"]
    ]


def test_records_without_a_finding_stand_by_themselves():
    prompts = [prompt(i, boxes=() if i < 10 else (BOX,)) for i in range(30)]
    found, _ = judged(prompts, Scorer(RewardConfig(), "plain", 10))
    assert found["records"] == {"present": 20, "absent": 10} and not found["cheats_above_jittered_truth"]
    empty = found["policies"][EMPTY]
    assert empty["absent"]["reward"] == 2 and empty["present"]["reward"] == 1
    assert EMPTY not in found["against_jittered_truth"]["absent"] and found["policies"]["mirror side"]["absent"] is None
    assert found["policies"]["25 % off"]["absent"]["reward"] == 2
    # boxes pay where there is nothing: a cheat on those records alone
    found, _ = judged(prompts, Paid(lambda boxes: len(boxes) < 16))
    assert not found["cheats_above_jittered_truth"]
    found, _ = judged(prompts, Paid(lambda boxes: len(boxes) > 0))
    assert {row["records"] for row in found["cheats_above_jittered_truth"]} == {"absent"}


def test_advantages_are_those_of_a_cheat_among_fair_completions():
    found, earned = judged([prompt(i) for i in range(8)], Scorer(RewardConfig(), "plain", 10), fairs=5)
    k, first = earned.names.index("whole image"), len(earned.names)
    group = torch.cat([earned.rewards.total[:, [k]], earned.rewards.total[:, first + 1 :]], 1)
    assert group.shape == (8, 5)
    means = found["policies"]["whole image"]["present"]
    assert means["advantage"] == pytest.approx(group_advantage(group)[:, 0].mean().item(), abs=1e-6)
    assert means["advantage_mean_only"] == pytest.approx((group[:, 0] - group.mean(1)).mean().item(), abs=1e-6)
    assert means["advantage"] < 0 < found["policies"]["truth"]["present"]["advantage"]
    fair = found["policies"][FAIR]["present"]
    assert fair["reward"] == pytest.approx(earned.rewards.total[:, first:].mean().item(), abs=1e-6)
    assert found["spearman"]["honest"] == pytest.approx(1.0) and found["spearman"]["all"] > 0.9


def test_the_command_on_phantoms(phantoms, tmp_path, capsys):
    words = ["audit", "rewards", "--data", str(phantoms), "--records", "24", "--json", str(tmp_path / "a.json")]
    assert main([*words, "--template", "chain-of-box", "--reward.spatial", "stepped"]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["cheats_above_jittered_truth"] == [] and sum(found["records"].values()) == 24
    assert found["reward"]["spatial"] == "stepped" and found["policies"]["truth"]["present"]["reward"] == 2
    out = capsys.readouterr().out
    assert "no degenerate policy earns more" in out and "blind prior" in out
    again, _ = audit_rewards(
        RewardAuditConfig(
            data=(str(phantoms),), records=24, template="chain-of-box", reward=RewardConfig(spatial="stepped")
        )
    )
    assert json.loads(json.dumps(again)) == found


def test_the_page_is_whole_and_safe(phantoms, tmp_path):
    records = load_records(phantoms)
    shutil.copytree(phantoms, tmp_path / "d")
    changed = [dataclasses.replace(e, phrase=HOSTILE if e.boxes else e.phrase) for e in records]
    write_records(tmp_path / "d", changed)
    out = tmp_path / "page.html"
    assert main(["audit", "rewards", "--data", str(tmp_path / "d"), "--records", "8", "--html", str(out)]) == 0
    page = out.read_text()
    assert "<script" not in page and "<img src=http" not in page and 'onclick="alert' not in page
    assert "&lt;script&gt;" in page and page.count("data:image/png;base64") >= 6 and "http://" not in page.replace(
        "http://evil.test", ""
    )  # fmt: skip
    assert "whole image" in page and "no degenerate policy" in page


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--records", "1"], "records, group_size, seed: want >= 2"),
        (["--reward.length-weight", "1"], "model: want a model folder with reward.length_weight"),
        (["--reward.custom", "a:b"], "model: want a model folder with reward.custom"),
        (["--reward.semantic-weight", "1"], "reward.encoder: want an encoder"),
        (["--json", "no/such/a.json"], "json: want a file in a folder that exists"),
        (["--split", "fly"], "split"),
        (["--model", "no/such"], "no/such: want a model folder"),
    ],
)
def test_mistakes_are_named(words, named, phantoms, capsys):
    try:
        status = main(["audit", "rewards", "--data", str(phantoms), *words])
    except SystemExit as stop:  # tyro's, of a value that is impossible by itself
        status = stop.code
    assert status == 2
    assert named in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_records_are_drawn_by_the_seed_in_their_order():
    everything = [prompt(i).example for i in range(50)]
    assert drawn(everything, 9, 0) == drawn(everything, 9, 0) != drawn(everything, 9, 1)
    assert [e.id for e in drawn(everything, 99, 0)] == [e.id for e in everything]


def test_names_are_told_apart():
    assert JITTERED in {policy.name for policy in HONEST}
    assert len({policy.name for policy in (*HONEST, *CHEATS)}) == len(HONEST) + len(CHEATS)
