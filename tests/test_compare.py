"""Comparisons of made-up profiles: what is a change, what is noise, what is said of it and with which exit status."""

import json
import sys
from pathlib import Path

import pytest
from made_up_profile import HOT, PHASES, made_up_profile, on_a_gpu

from profiles import compare as command
from profiles.changes import Comparison, compare
from profiles.compare_text import render
from profiles.stored import load
from profiles.tables import phase_table


def changed(found: Comparison) -> dict[str, str]:
    return {change.name: change.verdict for change in found.times if change.verdict}


def test_noise_is_no_change_and_a_slower_phase_is_one():
    for noise in range(10):
        found = compare(made_up_profile(), made_up_profile(noise=noise))
        assert not found.is_change and "No change." in render(found)
    assert changed(compare(made_up_profile(), made_up_profile(1.4))) == {"update": "slower"}
    assert changed(compare(made_up_profile(1.4), made_up_profile())) == {"update": "faster"}
    assert changed(compare(made_up_profile(), made_up_profile(1.2))) == {}
    assert changed(compare(made_up_profile(), made_up_profile(1.2), threshold=0.1)) == {"update": "slower"}
    overlapping = made_up_profile(1.4)
    overlapping["phases"]["update"][0] = 1.0
    assert changed(compare(made_up_profile(), overlapping)) == {}


def test_a_step_is_compared_with_the_one_that_does_the_same_work():
    """Steps differ in their completions' lengths, so those of one record may overlap with any of the other."""
    before, after = made_up_profile(), made_up_profile()
    before["phases"]["decode"], after["phases"]["decode"] = [1.0, 2.0, 3.0], [1.4, 2.9, 4.1]
    assert changed(compare(before, after)) == {"decode": "slower"}
    after["phases"]["decode"] = [1.4, 2.9, 3.1]  # one of them hardly
    assert changed(compare(before, after)) == {}
    after["phases"]["decode"] = [1.4, 2.9, 4.1, 0.1]  # which the other record has no step for
    assert changed(compare(before, after)) == {"decode": "slower"}


def test_a_phase_that_hardly_counts_is_no_change():
    before, after = made_up_profile(), made_up_profile()
    before["phases"]["data"], after["phases"]["data"] = [0.001] * 5, [0.005] * 5
    assert changed(compare(before, after)) == {}
    after["phases"]["data"] = [0.02] * 5
    assert changed(compare(before, after)) == {"data": "slower"}


def test_a_phase_of_one_side_alone_is_no_slowdown():
    after = made_up_profile()
    after["phases"] |= {"optimizer": [0.2, 0.3, 0.2, 0.2, 0.2]}
    found = compare(made_up_profile(), after)
    assert changed(found) == {"optimizer": "new"} and found.slower(0.0) == [] and found.is_change
    assert "| optimizer |  | 200 |  | new |" in render(found)
    assert changed(compare(after, made_up_profile())) == {"optimizer": "gone"}


def test_other_work_is_a_change_however_small():
    after = made_up_profile()
    rows = after["traced"]["kernels"]
    rows[0] = rows[0] | {"calls": 11}
    rows[1] = rows[1] | {"name": "aten::bmm"}
    after["traced"]["counts"] = {"launches": 4, "synchronisations": 0}
    found = compare(made_up_profile(), after)
    assert [(w.phase, w.group, w.calls) for w in found.groups] == [("update", "GEMM", (10, 11))]
    assert {(w.phase, w.kernel, w.calls, w.mark) for w in found.kernels if w.differs} == {
        ("update", "aten::mm", (10, 11), ""), ("decode", "aten::mm", (10, 0), "gone"),
        ("decode", "aten::bmm", (0, 10), "new"),
    }  # fmt: skip
    assert found.counts == {"launches": (3, 4), "synchronisations": (0, 0)} and found.is_change
    text = render(found)
    assert "| update | GEMM | **all** | 10 -> 11 |" in text and "0 -> 10 (new)" in text and "10 -> 0 (gone)" in text
    assert "launches: 3 -> 4" in text and "synchronisations" not in text


def test_one_more_launch_is_a_change():
    after = made_up_profile()
    after["traced"]["counts"] |= {"launches": 4}
    found = compare(made_up_profile(), after)
    assert found.is_change and "No change." not in render(found)


def test_other_operations_of_as_many_calls_are_other_work():
    after = made_up_profile()
    after["traced"]["kernels"][0] = after["traced"]["kernels"][0] | {"flops": 3_000_000_000}
    found = compare(made_up_profile(), after)
    assert [(w.phase, w.kernel) for w in found.kernels if w.differs] == [("update", "aten::mm")]
    assert "| update | GEMM | **all** | 10 | 1e-7 -> 3 |" in render(found)


def test_kernels_come_by_the_change_of_their_time():
    after = made_up_profile()
    rows = after["traced"]["kernels"]
    rows[:] = [rows[0] | {"seconds": 0.6}, rows[1] | {"seconds": 0.1}, rows[2] | {"seconds": 0.45}]
    after["traced"]["step"] = 5.0
    found = compare(made_up_profile(), after)
    assert not found.is_change, "one traced step's times are no verdict"
    assert [(w.kernel, w.phase, round(w.change, 9)) for w in found.kernels] == [
        ("aten::mm", "decode", -0.4), ("aten::mm", "update", 0.1), ("aten::silu", "update", -0.05)
    ]  # fmt: skip
    text = render(found, kernels=2)
    assert "no verdict" in text and "1 more kernels changed by less." in text and "silu" not in text
    assert "| decode | `aten::mm` | 500 -> 100 | 10 | 50,000 -> 10,000 | 12.5% -> 2.0% | -400 |  |" in text
    assert "no verdict" not in render(found, kernels=0)


def test_a_name_of_a_template_does_not_break_the_table():
    after = made_up_profile()
    after["traced"]["kernels"][0]["name"] = "void f<a|b>`" + "x" * 100
    (row,) = [line for line in render(compare(made_up_profile(), after)).splitlines() if "0 -> 10 |" in line]
    assert row.count("|") == 9 and "`void f<a/b>xxx" in row and "x...`" in row


def test_floors_idle_time_and_rates():
    before, after = on_a_gpu(made_up_profile()), on_a_gpu(made_up_profile(2.0))
    after["traced"]["idle"] = {"busy": 2.5, "synchronisation": 1.25, "host late": 1.0, "launch gap": 0.25}
    after["rates"] = {"tokens_per_second": 3.0, "tflops": 100.0}
    found = compare(before, after)
    shares = {change.name: change.of_floor for change in found.times}
    assert shares["data"] == shares["step"] == (None, None)
    assert shares["update"] == pytest.approx((0.25 / 1.02, 0.125 / 1.02), rel=0.03)
    assert found.idle["synchronisation"] == (0.25, 1.25)
    text = render(found)
    assert "| floor / time |" in text and "% -> 12% | slower |" in text
    assert "| synchronisation | 250 | 1,250 |" in text and "| tflops | – | 100 |" in text
    assert "floor" not in render(compare(made_up_profile(), made_up_profile()))
    assert compare(before, on_a_gpu(made_up_profile(1.1))).times[-1].real, "5 % counts on a GPU"


def test_other_workloads_and_devices_are_refused():
    after = made_up_profile()
    after["environment"] |= {"device": "another CPU", "date": "tomorrow", "packages": {"torch": "2.14.0"}}
    with pytest.raises(ValueError, match=r"two profiles of one device .*got a CPU and another CPU"):
        compare(made_up_profile(), after)
    found = compare(made_up_profile(), after, anyway=True)
    assert found.environment == {"device": ("a CPU", "another CPU"), "torch": ("2.13.0", "2.14.0")}
    assert "Environment: torch 2.13.0 -> 2.14.0" in render(found)
    with pytest.raises(ValueError, match="two profiles of one workload"):
        compare(made_up_profile(), made_up_profile() | {"workload": {"name": "made up", "P": 41}})


def test_a_disturbed_record_is_told():
    found = compare(made_up_profile(), made_up_profile() | {"others_cores": 1.5, "gpu": HOT})
    assert found.warnings == [
        "After: Other processes used 1.5 cores meanwhile: times are not to be trusted.",
        "After: The GPU was throttled: thermal slowdown in 25 % of samples: times are not to be trusted.",
    ]
    assert all(warning in render(found) for warning in found.warnings)
    assert "1.5 cores" in phase_table(made_up_profile() | {"others_cores": 1.5})
    assert "trusted" not in phase_table(made_up_profile()) + phase_table(made_up_profile() | {"others_cores": None})
    assert all(f"| {phase} |" in phase_table(made_up_profile()) for phase in PHASES)


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["profiles.compare", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    return int(stopped.value.code or 0)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of a profile, and the file of one whose update is slower."""
    for name, scale in (("a", 1.0), ("b", 1.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "profile.json").write_text(json.dumps(made_up_profile(scale)))
    return tmp_path / "a", tmp_path / "b" / "profile.json"


def test_the_command_fails_where_it_is_told_to(two, tmp_path, monkeypatch, capsys):
    a, b = two
    assert run(monkeypatch, a, b) == 0
    assert "| update |" in capsys.readouterr().out
    assert run(monkeypatch, a, b, "--fail-over", "5%") == 1
    assert run(monkeypatch, b, a, "--fail-over", "5%") == 0
    assert run(monkeypatch, a, b, "--fail-over", "0.6") == 0
    assert run(monkeypatch, a, b, "--fail-over", "much") == 2
    assert run(monkeypatch, a, tmp_path / "none") == 2
    assert "want a profile written by profiles.record" in capsys.readouterr().err


def test_the_command_writes_a_page(two, tmp_path, monkeypatch):
    assert run(monkeypatch, *two, "--html", tmp_path / "page.html") == 0
    assert "slower" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda p: p | {"format": 7}, "want a profile of format 1; got 7"),
        (lambda p: [p], "want a profile of format 1; got 'list'"),
        (lambda p: p | {"workload": "tiny"}, "want workload.name of type str; got None"),
        (lambda p: p | {"traced": {"step": 1.0}}, "want traced.kernels of type list; got None"),
        (lambda p: p | {"step": []}, r"want a list of seconds for step; got \[\]"),
        (lambda p: p | {"phases": {"decode": [1.0, "x"]}}, r"want a list of seconds for decode; got \[1.0, 'x'\]"),
        (
            lambda p: p | {"traced": p["traced"] | {"kernels": [{"name": "aten::mm"}]}},
            "want kernels with calls, flops, group, name, phase, seconds; got {'name'",
        ),
    ],
)
def test_a_damaged_profile_is_refused(tmp_path, damage, told):
    (tmp_path / "profile.json").write_text(json.dumps(damage(made_up_profile())))
    with pytest.raises(ValueError, match=rf"profile.json: {told}"):
        load(tmp_path)
