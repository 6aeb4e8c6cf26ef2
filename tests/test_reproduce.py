"""`reproduce.py` runs the experiments of its table, goes on where it was stopped, and reports those that are there.

Commands of the other scripts are run in this process, for importing torch anew takes seconds.
"""

import gzip
import json
import re
import shutil
import signal
import subprocess
import threading
from dataclasses import replace

import pytest
from conftest import ROOT

import benchmark
import common
import costs
import inference
import reproduce
import train
import train_grpo
import train_lora
from reproduce import Sizes, Step

MAINS = {"inference.py": inference.main, "train.py": train.main, "train_lora.py": train_lora.main,
         "benchmark.py": benchmark.main}  # fmt: skip
SMALL = Sizes(
    seeds=(1,), training={"max_steps": 2, "eval_size": 16, "eval_questions": 4}, own_training={}, budgets=(16, 32)
)
QUESTIONS = {"train": 48, "test": 5}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with few of the demo's problems, for outputs and results."""
    place = tmp_path_factory.mktemp("reproduce")
    for split, count in QUESTIONS.items():
        lines = (ROOT / f"demo/problems/{split}.jsonl").read_text().splitlines(keepends=True)[:count]
        (place / f"{split}.jsonl").write_text("".join(lines))
    return place


def setup_in(place, **changes):
    values = {"model": str(ROOT / "demo/model"), "dataset": str(place), "name": "small",
              "answers": place / "outputs", "trained": place / "outputs/train", "sizes": SMALL}  # fmt: skip
    return reproduce.Setup(**values | changes)


def run_here(names, setup):
    table = reproduce.experiments(setup.sizes)
    steps = reproduce.plan(reproduce.choose(table, names), table, setup)
    for step in steps:
        assert MAINS[step.command[0]](list(step.command[1:])) in (0, None), step.command
    return steps


@pytest.fixture(scope="module")
def reproduced(place):
    """One experiment of each kind: prompted, with budgets, fine-tuned, and trained on own right answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        setup = setup_in(place)
        run_here(["cot_model_outputs", "Qwen3-GSM8k-LoRA-r4-FP32-eval-score", "thinking", "own-answers"], setup)
        reproduce.write_report(reproduce.experiments(SMALL), setup)
    return place


def test_every_command_of_the_table_is_one_that_its_script_takes(place):
    parsers = {
        "inference.py": inference.parse_args,
        "train.py": lambda words: train.build_parser("train.py", "", 1e-5, "").parse_args(words),
        "train_lora.py": train_lora.parse_args,
        "train_grpo.py": train_grpo.parse_args,
        "benchmark.py": benchmark.parse,
    }
    (place / "outputs").mkdir(exist_ok=True)
    table = reproduce.experiments(reproduce.DEMO_SIZES)
    steps = reproduce.plan(table, table, setup_in(place, sizes=reproduce.DEMO_SIZES))
    scripts = {step.command[0] for step in steps}
    assert scripts == {*parsers, "demo/sweep.py"} and len(steps) > 80
    for script, *words in (step.command for step in steps):
        if script in parsers:
            parsers[script](words)
            flags = [word for word in words if word.startswith("--")]
            assert len(flags) == len(set(flags)), words  # an override replaces


def test_published_experiments_are_made_by_the_published_protocol(place):
    table = reproduce.experiments(Sizes())
    rows = common.read_json(ROOT / "results/published.json")["rows"]
    for row in reproduce.choose(table, ["published"]):
        protocol = rows[row.name]["protocol"]
        *before, step = reproduce.plan([row], table, setup_in(place, sizes=Sizes()))
        args = inference.parse_args(list(step.command[1:]))
        made = vars(args) | {name: getattr(args.decoding, name) for name in ("temperature", "top_p", "top_k")}
        for name, value in protocol.items():
            if name != "model":
                assert made[name] == value, (row.name, name)
        script = {"SFT": ["train.py"], "LoRA": ["train_lora.py"]}.get("".join(re.findall("SFT|LoRA", row.name)), [])
        assert [other.command[0] for other in before] == script, row.name


def test_a_training_that_several_experiments_need_is_run_once_and_first(place):
    table = reproduce.experiments(Sizes())
    names = ["Qwen3-GSM8k-SFT-FP32-temp06", "SFT-FP32-cot", "Qwen3-GSM8k-SFT-FP32-temp0"]
    steps = reproduce.plan(reproduce.choose(table, names), table, setup_in(place, sizes=Sizes()))
    assert [step.name for step in steps] == [
        "train/Qwen3-GSM8k-SFT-FP32", "Qwen3-GSM8k-SFT-FP32-temp0", "Qwen3-GSM8k-SFT-FP32-temp06", "SFT-FP32-cot",
    ]  # fmt: skip


def test_limits_steps_and_seeds_of_the_command_line_replace_those_of_the_table(capsys):
    flags = ["--limit", "7", "--max-steps", "9", "--seeds", "3", "5", "--dry-run"]
    reproduce.main(["run", "lora-r4", "own-answers", "cot", *flags])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "train" in line.split()[1]]) == 4
    for line in lines:
        script, answers_train = line.split()[1], "--split train" in line
        if script.startswith("train"):
            assert line.count("--max-steps 9") == 1 and ("--seed 3" in line or "--seed 5" in line)
        elif script == "inference.py":
            assert ("--limit 7" in line) != answers_train and line.count("--limit") <= 1


def test_published_checkpoints_stand_in_for_own_training(capsys):
    reproduce.main(["run", "published", "--checkpoints", "published", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and all(line.split()[1] == "inference.py" for line in lines)
    assert sum("--model-id AnirudhCheruvu/Qwen3-GSM8k-" in line for line in lines) == 6
    assert all("--output outputs/Qwen/Qwen3-0.6B-published/" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "cott"], "cott: no such experiment or group"),
        (["run", "cot", "--name", "../elsewhere"], "--name ../elsewhere"),
        (["report", "--name", "never-run"], "nothing to report yet"),
        (["run", "rates"], "rates: no such experiment"),
    ],
)
def test_a_wrong_word_is_named_and_nothing_is_written(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        reproduce.main(words)
    assert ended.value.code == 2 and told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_list_tells_tokens_and_time_of_every_experiment_before_it_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reproduce.main(["list"])
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if line.startswith("cot_model_outputs"))
    assert row == ["cot_model_outputs", "published", "-", "1,319", f"{1319 * 176:,}", "0", "27", "min"]
    assert "27 experiments, 11 trainings" in lines[-2] and not list(tmp_path.iterdir())


def test_the_list_takes_rates_and_lengths_from_the_records_that_are_there(reproduced, monkeypatch):
    monkeypatch.chdir(reproduced)
    setup = setup_in(reproduced)
    record = common.read_json(reproduced / "outputs/cot_model_outputs.run.json")["segments"][0]
    (row,) = reproduce.choose(reproduce.experiments(SMALL), ["cot_model_outputs"])
    assert costs.answer_tokens(row, setup) == (5, record["output_tokens"])
    records = [common.read_json(path) for path in (reproduced / "outputs/train").glob("*/train.run.json")]
    seconds = sum(record["segments"][0]["seconds"] for record in records)
    tokens = sum(record["decides"]["batch_size"] * 2 for record in records) * costs.EXAMPLE_TOKENS
    rates = costs.measured_rates(setup)
    assert rates["trained"] == pytest.approx(tokens / seconds) and rates["generated"] > 0


def test_the_list_counts_what_reinforcement_learning_samples(place):
    setup = setup_in(place, sizes=replace(SMALL, demo=True))
    (row,) = reproduce.choose(reproduce.experiments(setup.sizes), ["grpo-seed1"])
    steps, evaluations, questions = 700, 8, 300  # of reproduce.GRPO, the evaluation before the first step among them
    completions = steps * 32 * 8
    assert costs.training_tokens(row.training, setup) == completions * costs.EXAMPLE_TOKENS
    answers = completions + evaluations * questions
    assert costs.evaluation_tokens(row.training, setup) == answers * costs.ANSWER_TOKENS["thinking"]


# ---- Running


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Steps whose scripts note in a file when they begin and end."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "note.py"
    script.write_text(
        "import signal, sys, time\n"
        "def note(text): print(text, file=open('notes.txt', 'a'), flush=True)\n"
        "name, seconds, code = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])\n"
        "signal.signal(signal.SIGTERM, lambda *_: (note('ended ' + name), sys.exit(143)))\n"
        "note('begin ' + name); time.sleep(seconds); note('end ' + name); print('last words'); sys.exit(code)\n"
    )

    def step(name, needs=(), seconds=0, code=0):
        return Step(name, (str(script), name, str(seconds), str(code)), needs)

    return step


def notes():
    with open("notes.txt") as file:
        return file.read().splitlines()


def test_steps_run_side_by_side_and_none_before_what_it_needs(scripts, tmp_path):
    steps = [scripts("a", seconds=0.3), scripts("b", ("a",)), scripts("c", seconds=0.1)]
    reproduce.run_all(steps, 2, setup_in(tmp_path))
    told = notes()
    assert told.index("begin c") < told.index("end a") < told.index("begin b") and len(told) == 6


def test_a_step_that_fails_is_named_and_what_needs_it_is_not_run(scripts, tmp_path):
    steps = [scripts("a", code=3), scripts("b", ("a",)), scripts("c", ("a",))]
    with pytest.raises(common.UserError, match="a: failed with exit code 3.*last words"):
        reproduce.run_all(steps, 2, setup_in(tmp_path))
    assert notes() == ["begin a", "end a"]


def test_ctrl_c_ends_the_running_steps_and_waits_for_them(scripts, tmp_path):
    steps = [scripts("a", seconds=60), scripts("b", seconds=60), scripts("c")]
    begun = threading.Event()

    def interrupt():
        while not (tmp_path / "notes.txt").exists() or len(notes()) < 2:
            begun.wait(0.05)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        reproduce.run_all(steps, 2, setup_in(tmp_path))
    assert sorted(notes()) == ["begin a", "begin b", "ended a", "ended b"]


def test_a_finished_experiment_is_left_alone_and_one_of_another_recipe_is_made_again(reproduced, capsys, monkeypatch):
    monkeypatch.chdir(reproduced)
    output = reproduced / "outputs/cot_model_outputs.jsonl"
    before = output.stat().st_mtime_ns
    run_here(["cot_model_outputs"], setup_in(reproduced))
    assert "finished already" in capsys.readouterr().out and output.stat().st_mtime_ns == before
    record = output.with_suffix(".run.json")
    record.write_text(record.read_text().replace('"max_new_tokens": 512', '"max_new_tokens": 100'))
    run_here(["cot_model_outputs"], setup_in(reproduced))
    assert "max_new_tokens" in capsys.readouterr().out
    assert output.stat().st_mtime_ns > before and common.read_json(record)["decides"]["max_new_tokens"] == 512


# ---- The report


def test_the_report_holds_every_experiment_that_is_there_with_answers_and_pictures(reproduced):
    results = reproduced / "results/small"
    page = (results / "README.md").read_text()
    names = {path.name.removesuffix(".jsonl.gz") for path in results.glob("*.jsonl.gz")}
    assert names == {"cot_model_outputs", "Qwen3-GSM8k-LoRA-r4-FP32-eval-score", "thinking-budget-16",
                     "thinking-budget-32", "own-answers-seed1"}  # fmt: skip
    for name in names:
        assert f"| {name.removesuffix('-seed1')} |" in page
        lines = [json.loads(line) for line in gzip.decompress((results / f"{name}.jsonl.gz").read_bytes()).splitlines()]
        assert {line["id"] for line in lines} == set(range(QUESTIONS["test"]))
        assert (results / f"{name}.run.json").exists()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert pictures == ["published.png", "past.png"]
    assert all((results / picture).stat().st_size > 10_000 for picture in pictures)
    assert {path.name.removesuffix(".run.json") for path in (results / "train").iterdir()} == {
        "Qwen3-GSM8k-LoRA-r4-FP32-eval-score", "own-answers-seed1",
    }  # fmt: skip


def test_a_report_tells_no_folder_of_the_machine(reproduced):
    """Neither of the model nor of the data: a file's name and hash say what it is."""
    results = reproduced / "results/small"
    texts = [(results / "README.md").read_text()] + [path.read_text() for path in results.rglob("*.run.json")]
    setup = setup_in(reproduced)
    for text in texts:
        assert f"--model-id {setup.model}" not in text and f"--dataset {setup.dataset} " not in text
        assert f'"model": "{setup.model}"' not in text and f'"dataset": "{setup.dataset}"' not in text


def test_an_unfinished_experiment_is_marked_and_goes_on_in_a_fresh_clone(reproduced, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    setup = setup_in(reproduced, answers=tmp_path / "outputs", trained=tmp_path / "outputs/train")
    setup.answers.mkdir()
    answers = (reproduced / "outputs/cot_model_outputs.jsonl").read_text()
    record = (reproduced / "outputs/cot_model_outputs.run.json").read_text()
    torn = "".join(answers.splitlines(keepends=True)[:2]) + '{"id": 2, "quest'
    (setup.answers / "cot_model_outputs.jsonl.part").write_text(torn)
    (setup.answers / "cot_model_outputs.run.json").write_text(record)
    table = reproduce.experiments(SMALL)
    reproduce.write_report(table, setup)
    page = (setup.results / "README.md").read_text()
    assert "| cot_model_outputs.part | 2 |" in page and "cot_model_outputs.part: not finished" in page

    shutil.rmtree(setup.answers)
    chosen = reproduce.choose(table, ["cot_model_outputs"])
    reproduce.restore(chosen, setup)
    run_here(["cot_model_outputs"], setup)
    assert (setup.answers / "cot_model_outputs.jsonl").read_text() == answers
    assert "2 answers are there, 3 to go" in capsys.readouterr().out

    reproduce.write_report(table, setup)
    assert {path.name for path in setup.results.glob("cot*")} == {
        "cot_model_outputs.jsonl.gz",
        "cot_model_outputs.run.json",
    }
    assert ".part" not in (setup.results / "README.md").read_text()


def test_finished_answers_of_a_trained_model_are_kept_where_the_model_is_gone(reproduced, tmp_path, monkeypatch):
    monkeypatch.chdir(reproduced)
    setup = setup_in(reproduced)
    table = reproduce.experiments(SMALL)
    rows = reproduce.choose(table, ["Qwen3-GSM8k-LoRA-r4-FP32-eval-score", "cot_model_outputs"])
    assert not any(reproduce.is_kept(row, table, setup) for row in rows)  # the model is here: inference.py looks itself
    (reproduced / "outputs/train").rename(reproduced / "elsewhere")
    try:
        assert [row.name for row in rows if reproduce.is_kept(row, table, setup)] == [rows[1].name]
        other = replace(setup, limit=4)
        assert not any(reproduce.is_kept(row, table, other) for row in rows)
    finally:
        (reproduced / "elsewhere").rename(reproduced / "outputs/train")


def test_a_failing_report_leaves_the_page_as_it_was(reproduced, monkeypatch):
    monkeypatch.chdir(reproduced)
    page, bad = reproduced / "results/small/README.md", reproduced / "results/small/maj8.jsonl.gz"
    before = page.read_text()
    bad.write_bytes(b"no gzip")
    with pytest.raises(SystemExit):
        reproduce.main(
            ["report", "--model-id", str(ROOT / "demo/model"), "--dataset", str(reproduced), "--name", "small"]
        )
    bad.unlink()
    assert page.read_text() == before


def test_make_reproduce_runs_and_reports():
    command = ["make", "-n", "-o", ".venv/installed", "reproduce", "MODEL=demo/model", "DATASET=demo/problems"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    flags = "--model-id demo/model --dataset demo/problems"
    assert [" ".join(line.split()[1:]) for line in told.splitlines()] == [
        f"reproduce.py run {flags}", f"reproduce.py report {flags}"
    ]  # fmt: skip


# ---- Costs


def test_the_cost_of_a_run_is_what_its_record_tells(reproduced, capsys):
    answers, training = (
        reproduced / "outputs/cot_model_outputs.run.json",
        "results/small/train/own-answers-seed1.run.json",
    )
    costs.main([str(answers), str(reproduced / training)])
    *_, of_answers, of_training = capsys.readouterr().out.splitlines()
    segments = common.read_json(answers)["segments"]
    rate = sum(one["output_tokens"] for one in segments) / sum(one["seconds"] for one in segments)
    assert "| inference.py --mode cot | 5 |" in of_answers and f"| {rate:,.0f} |" in of_answers
    assert "| train.py --mode " in of_training and "| 2 steps of 16 |" in of_training
    record = common.read_json(reproduced / training)
    record["decides"]["method"] = "grpo"
    (reproduced / "grpo.run.json").write_text(json.dumps(record))
    costs.main([str(reproduced / "grpo.run.json")])
    assert "| train_grpo.py --mode " in capsys.readouterr().out.splitlines()[-1]
    for line in (of_answers, of_training):
        assert 0.1 < float(re.search(r"([0-9.]+) GiB cpu", line)[1]) < 50


def test_a_record_that_is_none_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "a.run.json").write_text("{}")
    with pytest.raises(SystemExit):
        costs.main([str(tmp_path / "a.run.json")])
    assert "a.run.json: is no run record" in capsys.readouterr().err


def test_the_committed_page_of_the_demo_is_what_its_committed_answers_give(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    shutil.copytree(ROOT / "results/demo/model", tmp_path / "results/demo/model")
    reproduce.main(["report", "--model-id", "demo/model", "--dataset", "demo/problems"])
    page = tmp_path / "results/demo/model/README.md"
    assert page.read_text() == (ROOT / "results/demo/model/README.md").read_text(), "python reproduce.py report"
