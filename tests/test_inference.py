"""inference.py answers in every mode, writes what other tools read, and goes on where it stopped."""

import datetime
import json
import re
import shutil

import pytest
from conftest import ROOT

import benchmark
import common
import generation
import inference
import model as model_module
import runs
from model import find_model, load_model

MODEL, PROBLEMS = str(ROOT / "demo/model"), str(ROOT / "demo/problems")
KEYS = [
    "id", "question", "model_output", "ground_truth_answer", "mode", "sample", "thinking_open",
    "finish_reason", "prompt_tokens", "output_tokens",
]  # fmt: skip


def run(output, *flags, model=MODEL, dataset=PROBLEMS):
    return inference.main(["--model-id", model, "--dataset", dataset, "--output", str(output), *map(str, flags)])


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("mode", common.MODES)
def test_every_mode_answers_the_demo_and_scores(mode, tmp_path, capsys):
    output = tmp_path / f"{mode}.jsonl"
    assert run(output, "--mode", mode, "--limit", 20, "--save-txt", "--max-new-tokens", 300) == 0
    printed = capsys.readouterr()
    assert re.search(r"20 answers in .* s .* hit the token limit", printed.out)
    assert "dtype fp32: the default on cpu" in printed.out and "batch size 20:" in printed.out
    lines = rows(output)
    problems = rows(ROOT / "demo/problems/test.jsonl")
    assert [row["id"] for row in lines] == list(range(20))
    assert all(list(row) == KEYS for row in lines)
    assert [row["ground_truth_answer"] for row in lines] == [item["answer"] for item in problems[:20]]
    assert all(row["thinking_open"] == (mode == "chatml_think_prefill") for row in lines)
    assert all("<|im_end|>" not in row["model_output"] for row in lines)
    assert sum("</think>" in row["model_output"] for row in lines) == (20 if mode in inference.THINKING_MODES else 0)
    assert lines[3]["question"] in output.with_suffix(".txt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{mode}.{end}" for end in ("jsonl", "run.json", "txt")]
    benchmark.main(["--json", str(output)])
    assert json.loads(capsys.readouterr().out)[0]["n"] == 20


def test_the_run_record_says_what_decided_the_output(tmp_path):
    run(tmp_path / "a.jsonl", "--mode", "thinking", "--limit", 2, "--max-new-tokens", 20)
    record = common.read_json(tmp_path / "a.run.json")
    decides, segment = record["decides"], record["segments"][0]
    assert decides["mode"] == "thinking" and decides["prompt"].endswith("<|im_start|>assistant\n")
    assert [decides[name] for name in ("do_sample", "temperature", "top_p", "top_k")] == [True, 0.6, 0.95, 20]
    assert decides["sha256 of model.safetensors"] == common.hash_file(ROOT / "demo/model/model.safetensors")
    assert decides["thinking_switch"] is True and decides["dtype"] == "fp32"
    assert segment["answers"] == 2 and segment["seconds"] > 0 and segment["versions"]["torch"]
    assert any(line.startswith("batch size 2: one for each request") for line in segment["choices"])


@pytest.mark.parametrize("flags", [("--mode", "cot"), ("--mode", "thinking", "--num-samples", 3)])
def test_a_run_in_pieces_ends_as_a_run_in_one(flags, tmp_path, monkeypatch, capsys):
    flags = (*flags, "--max-new-tokens", 120)
    run(tmp_path / "whole.jsonl", *flags, "--limit", 12)
    pieces = tmp_path / "pieces.jsonl"
    run(pieces, *flags, "--limit", 5, "--batch-size", 3)  # --limit may grow
    append, written = runs.RunOutput.append, []

    def stop_early(self, row):
        append(self, row)
        written.append(row)
        if len(written) == 4:
            with open(self.part_path, "ab") as part:
                part.write(b'{"id": 11, "sam')  # as a process dies in the middle of a line
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.RunOutput, "append", stop_early)
    with pytest.raises(SystemExit, match="130"):
        run(pieces, *flags, "--limit", 12)
    assert "the same command goes on from there" in capsys.readouterr().out
    monkeypatch.setattr(runs.RunOutput, "append", append)
    run(pieces, *flags, "--limit", 12)
    assert "dropped a torn last line" in capsys.readouterr().out
    assert pieces.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    segments = common.read_json(tmp_path / "pieces.run.json")["segments"]
    assert len(segments) == 3 and sum(s["answers"] for s in segments) == len(rows(pieces))


def test_a_finished_run_is_not_run_again(tmp_path, capsys):
    for _ in range(2):
        assert run(tmp_path / "a.jsonl", "--limit", 2) == 0
    assert "finished already, 2 answers" in capsys.readouterr().out
    assert len(common.read_json(tmp_path / "a.run.json")["segments"]) == 1


def test_runs_that_decide_differently_do_not_mix(tmp_path, capsys):
    run(tmp_path / "a.jsonl", "--limit", 2)
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "a.jsonl", "--limit", 2, "--max-new-tokens", 99)
    assert re.search(
        r"max_new_tokens = 512, this run has 99; pass the same flags, or --overwrite", capsys.readouterr().err
    )
    assert run(tmp_path / "a.jsonl", "--limit", 2, "--max-new-tokens", 99, "--overwrite") == 0
    for limit, told in ((99, "finished already"), (50, "made again: ")):
        run(tmp_path / "a.jsonl", "--limit", 2, "--max-new-tokens", limit, "--overwrite", "changed")
        assert told in capsys.readouterr().out
    assert common.read_json(tmp_path / "a.run.json")["decides"]["max_new_tokens"] == 50
    (tmp_path / "a.run.json").unlink()
    run(tmp_path / "a.jsonl", "--limit", 2, "--overwrite", "changed")
    assert "exists without its run record" in capsys.readouterr().out


def test_overwrite_keeps_the_answers_where_the_new_run_cannot_begin(tmp_path, capsys):
    model = shutil.copytree(MODEL, tmp_path / "model")
    flags = "--mode", "thinking", "--limit", 1, "--max-new-tokens", 20
    run(tmp_path / "a.jsonl", *flags, model=str(model))
    before = (tmp_path / "a.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "a.jsonl", *flags, "--overwrite", "--think-budget", 10, model=str(model))
    assert "no room to answer" in capsys.readouterr().err
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for overwrite in (["--overwrite"], ["--overwrite", "changed"]):
        with pytest.raises(SystemExit, match="2"):
            run(tmp_path / "a.jsonl", *flags, *overwrite, model=str(model))
        assert "model.safetensors" in capsys.readouterr().err
        assert (tmp_path / "a.jsonl").read_bytes() == before


def test_a_lora_adapter_answers_as_its_merged_model(tmp_path):
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.5)
    model.peft_config["default"].base_model_name_or_path = MODEL
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "merged")
    for name in ("adapter", "merged"):
        run(tmp_path / f"{name}.jsonl", "--limit", 8, "--max-new-tokens", 60, model=str(tmp_path / name))
    run(tmp_path / "base.jsonl", "--limit", 8, "--max-new-tokens", 60)
    outputs = {name: (tmp_path / f"{name}.jsonl").read_text() for name in ("adapter", "merged", "base")}
    assert outputs["adapter"] == outputs["merged"] != outputs["base"]
    for name in ("adapter", "merged"):
        loaded = load_model(find_model(str(tmp_path / name)), "bf16", torch.device("cpu"))
        assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
        assert {buffer.dtype for buffer in loaded.buffers()} == {torch.float32}  # the frequencies of rope


@pytest.mark.parametrize("mode", common.MODES)
def test_real_questions_break_nothing(mode, shared, tmp_path):
    output = tmp_path / "real.jsonl"
    assert run(output, "--mode", mode, "--limit", 64, "--max-new-tokens", 48, dataset=str(shared / "gsm8k")) == 0
    assert len(rows(output)) == 64


def test_a_question_of_the_train_split_is_never_its_own_example(tmp_path, capsys):
    run(tmp_path / "a.jsonl", "--mode", "few_shot", "--split", "train", "--few-shot-k", 2, "--print-prompts", 3)
    prompts = re.findall(r"--- prompt \d.*?--- token ids", capsys.readouterr().out, re.DOTALL)
    questions = [item["question"] for item in rows(ROOT / "demo/problems/train.jsonl")[:3]]
    assert [[text.count(question) for question in questions] for text in prompts] == [[1, 1, 1]] * 3


def test_a_model_larger_than_memory_is_refused_before_it_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model_module, "free_memory", lambda device: 2**21)
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "a.jsonl", "--limit", 1)
    assert "its 670,080 weights take 0.0025 GiB, and 0.00195 are free" in capsys.readouterr().err


def test_a_limit_is_cut_to_what_the_positions_leave(tmp_path, capsys):
    run(tmp_path / "a.jsonl", "--mode", "chatml_think_prefill", "--limit", 2)
    assert "max_new_tokens cut for 2 of 2 answers: the model has 2048 positions" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--mode", "chatml_think_prefill"), ("--mode", "thinking", "--num-samples", 2)])
def test_a_command_of_several_budgets_writes_what_one_command_a_budget_writes(flags, tmp_path):
    budgets = 90, 60, 30
    run(tmp_path / "all.jsonl", *flags, "--limit", 16, "--think-budget", *budgets)
    for budget in budgets:
        alone = tmp_path / f"alone-{budget}.jsonl"
        run(alone, *flags, "--limit", 16, "--think-budget", budget)
        assert alone.read_bytes() == (tmp_path / f"all-budget-{budget}.jsonl").read_bytes()
        for row in rows(alone):
            thought = row["model_output"].split("</think>")[0]
            assert row["forced"] == thought.endswith("based on the thinking directly now.\n")
    forced = [sum(row["forced"] for row in rows(tmp_path / f"alone-{budget}.jsonl")) for budget in budgets]
    assert 0 < forced[0] < forced[1] < forced[2]


def test_a_smaller_budget_generates_only_what_the_larger_one_does_not_settle(tmp_path, monkeypatch):
    asked, generate = [], generation.generate

    def counting(model, tokenizer, requests, *args, **kwargs):
        asked.append([len(request.begun) for request in requests])
        return generate(model, tokenizer, requests, *args, **kwargs)

    monkeypatch.setattr(generation, "generate", counting)
    run(tmp_path / "all.jsonl", "--mode", "thinking", "--limit", 16, "--think-budget", 70, 120)
    largest, smaller = asked
    forced = [row for row in rows(tmp_path / "all-budget-70.jsonl") if row["forced"]]
    assert largest == [0] * 16 and 0 < len(smaller) == len(forced) < 16 and min(smaller) > 70


def test_with_a_budget_the_demo_leaves_no_answer_unfinished(tmp_path, capsys):
    output = tmp_path / "a.jsonl"
    run(output, "--mode", "thinking", "--limit", 100, "--think-budget", 25)
    capsys.readouterr()
    benchmark.main(["--json", str(output)])
    scored = json.loads(capsys.readouterr().out)[0]
    assert (scored["unfinished"], scored["truncated"]) == (0, 0) and scored["forced"] > 90


def test_where_positions_are_few_the_thought_gives_way_to_the_answer(tmp_path):
    run(tmp_path / "a.jsonl", "--mode", "thinking", "--limit", 1, "--think-budget", 1900)
    row = rows(tmp_path / "a.jsonl")[0]
    assert row["finish_reason"] == "stop" and row["forced"] is False


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--mode", "cot", "--think-budget", 5), "--think-budget: needs --mode thinking or chatml_think_prefill"),
        (("--mode", "thinking", "--think-budget", 100, "--max-new-tokens", 110), "no room to answer"),
        (("--mode", "thinking", "--think-budget", 0), "must be 1 or more"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(flags, told, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "a.jsonl", "--limit", 1, *flags)
    assert told in capsys.readouterr().err


def test_a_stop_text_ends_the_answer_before_it_whatever_the_batch(tmp_path):
    for size in (1, 8):
        run(tmp_path / f"{size}.jsonl", "--limit", 8, "--stop", "####", " in all", "--batch-size", size)
    run(tmp_path / "whole.jsonl", "--limit", 8)
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "8.jsonl").read_bytes()
    for cut, whole in zip(rows(tmp_path / "1.jsonl"), rows(tmp_path / "whole.jsonl"), strict=True):
        ends = [whole["model_output"].find(text) for text in ("####", " in all")]
        assert cut["model_output"] == whole["model_output"][: min(end for end in ends if end >= 0)]
        assert cut["finish_reason"] == "stop" and cut["output_tokens"] < whole["output_tokens"]
    assert common.read_json(tmp_path / "1.run.json")["decides"]["stop"] == ["####", " in all"]
    assert "stop" not in common.read_json(tmp_path / "whole.run.json")["decides"]


def base_model(folder, **changes):
    """The demo's model without a chat template, as base models are; `changes` go into its tokenizer's config."""
    shutil.copytree(MODEL, folder)
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    return str(folder)


def test_a_base_model_is_asked_in_plain_text_with_examples_of_ones_own(tmp_path, capsys):
    model = base_model(tmp_path / "base", bos_token="<|endoftext|>")
    worked = [{"question": "1 + 1?", "answer": "<<1+1=2>>2\n#### 2"}, {"question": "2 + 2?", "answer": "4"}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in worked))
    few_shot = "--mode", "few_shot", "--few-shot-file", tmp_path / "mine.jsonl", "--limit", 3
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "a.jsonl", *few_shot, model=model)
    assert "no chat template" in (told := capsys.readouterr().err) and "--few-shot-style completion" in told
    run(tmp_path / "a.jsonl", *few_shot, "--few-shot-style", "completion", "--max-new-tokens", 60, model=model)
    decides = common.read_json(tmp_path / "a.run.json")["decides"]
    assert re.fullmatch(
        r"<\|endoftext\|>Question: 1 \+ 1\?\nAnswer: 2\n#### 2\n\nQuestion: 2 \+ 2\?\nAnswer: #### 4\n\nQuestion: .*\nAnswer:",
        decides["prompt"],
    )
    assert (decides["few_shot_k"], decides["few_shot_style"], decides["stop"]) == (2, "completion", ["Question:"])
    assert not any("Question:" in row["model_output"] for row in rows(tmp_path / "a.jsonl"))


def test_a_data_set_without_a_train_split_takes_examples_from_a_file(tmp_path, capsys):
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"question": "3 + 3?", "answer": 6}) + "\n")
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "a.jsonl", "--mode", "few_shot", dataset=str(one))
    assert "--few-shot-file" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["cot", "chatml_think_prefill"])
def test_a_prompt_too_long_gets_an_empty_answer_and_the_rest_goes_on(mode, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    texts = ["1 + 1?", "eggs " * 5000, "2 + 2?"]
    data.write_text("".join(json.dumps({"question": text, "answer": 2}) + "\n" for text in texts))
    run(tmp_path / "a.jsonl", "--mode", mode, "--max-new-tokens", 30, dataset=str(data))
    assert "note: 1 prompts leave no room to answer in the model's 2048 positions" in capsys.readouterr().out
    first, long, last = rows(tmp_path / "a.jsonl")
    assert (long["model_output"], long["finish_reason"], long["output_tokens"]) == ("", "prompt_too_long", 0)
    assert long["prompt_tokens"] > 2048 and first["model_output"] and last["model_output"]
    run(tmp_path / "a.jsonl", "--mode", mode, "--max-new-tokens", 30, dataset=str(data))
    assert "finished already, 3 answers" in capsys.readouterr().out


def test_references_that_cannot_be_scored_are_refused_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "?", "answer": 1}\n{"question": "?", "answer": "eighteen"}\n')
    monkeypatch.setattr(model_module, "load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "a.jsonl", dataset=str(data))
    err = capsys.readouterr().err
    assert "test question 1" in err and "eighteen" in err and "--answer-column" in err


def test_columns_of_the_data_set_are_copied_into_the_answers(tmp_path, capsys):
    run(tmp_path / "a.jsonl", "--limit", 3, "--max-new-tokens", 5, "--keep-columns", "template", "numbers")
    problems = rows(ROOT / "demo/problems/test.jsonl")[:3]
    assert [(row["template"], row["numbers"]) for row in rows(tmp_path / "a.jsonl")] == [
        (item["template"], item["numbers"]) for item in problems
    ]
    assert list(rows(tmp_path / "a.jsonl")[0]) == [*KEYS, "template", "numbers"]
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "b.jsonl", "--keep-columns", "question")
    assert "--keep-columns question" in capsys.readouterr().err


def test_right_answers_are_kept_of_a_single_file_and_of_other_columns(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        problems = rows(ROOT / f"demo/problems/{split}.jsonl")[:12]
        lines = [json.dumps({"Body": item["question"], "Answer": item["answer"]}) + "\n" for item in problems]
        (tmp_path / f"data/{split}.jsonl").write_text("".join(lines))
    for name, dataset in (("folder", tmp_path / "data"), ("file", tmp_path / "data/train.jsonl")):
        output = tmp_path / f"{name}.jsonl"
        columns = "--question-column", "Body", "--answer-column", "Answer"
        run(output, "--split", "train", *columns, dataset=str(dataset))
        benchmark.main([str(output), "--keep-correct", str(tmp_path / "right.jsonl")])
        assert 0 < len(rows(tmp_path / "right.jsonl")) <= 12
    capsys.readouterr()


DATED = "Today is {{ strftime_now('%d %b %Y') }}.\n{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


def test_a_run_with_a_dated_template_goes_on_on_another_day(tmp_path, capsys):
    model = base_model(tmp_path / "dated")
    (tmp_path / "dated/chat_template.jinja").write_text(DATED)
    run(tmp_path / "a.jsonl", "--limit", 2, "--max-new-tokens", 5, model=model)
    record = common.read_json(tmp_path / "a.run.json")
    assert datetime.date.today().strftime("Today is %d %b %Y.") in record["decides"]["prompt"]
    # As a run that began on another day left it, here and by a version that kept no such time.
    for kept in ({"template_time": "2025-02-03T23:59:59"}, {"started": "2025-02-03T12:00:00+00:00"}):
        old = json.loads(json.dumps(record))
        old["decides"]["prompt"] = re.sub("Today is [^.]*", "Today is 03 Feb 2025", old["decides"]["prompt"])
        del old["segments"][0]["template_time"]
        old["segments"][0] |= kept
        (tmp_path / "a.run.json").write_text(json.dumps(old))
        run(tmp_path / "a.jsonl", "--limit", 2, "--max-new-tokens", 5, model=model)
        assert "finished already, 2 answers" in capsys.readouterr().out
        run(tmp_path / "a.jsonl", "--limit", 2, "--max-new-tokens", 5, "--print-prompts", 1, model=model)
        assert "Today is 03 Feb 2025." in capsys.readouterr().out


def test_settings_of_a_generation_config_that_are_not_applied_are_noted_and_recorded(tmp_path, capsys):
    shutil.copytree(MODEL, tmp_path / "model")
    path = tmp_path / "model/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.1, "num_beams": 1}))
    run(tmp_path / "a.jsonl", "--limit", 1, "--max-new-tokens", 5, model=str(tmp_path / "model"))
    assert "asks for repetition_penalty 1.1, which is not applied" in capsys.readouterr().out
    segment = common.read_json(tmp_path / "a.run.json")["segments"][0]
    assert segment["generation_config_ignored"] == {"repetition_penalty": 1.1}


def test_a_template_without_a_system_turn_is_noted_and_recorded(tmp_path, capsys):
    model = base_model(tmp_path / "model")
    template = "{% for m in messages if m.role != 'system' %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    (tmp_path / "model/chat_template.jinja").write_text(template)
    run(tmp_path / "a.jsonl", "--limit", 1, "--max-new-tokens", 5, model=model)
    assert capsys.readouterr().out.count("no system turn; the instruction stands before the question") == 1
    decides = common.read_json(tmp_path / "a.run.json")["decides"]
    assert decides["instruction"] == "before the question"
    assert decides["prompt"].startswith(f"[user] {common.COT_INSTRUCTION}\n\n")


def test_the_records_of_the_demo_are_still_those_of_a_finished_run(tmp_path, capsys):
    for mode in common.MODES:
        for ending in ("jsonl", "run.json"):
            shutil.copy(ROOT / f"results/demo/{mode}.{ending}", tmp_path)
        flags = () if mode in ("zero_shot", "cot", "few_shot") else ("--max-new-tokens", 512)
        run(tmp_path / f"{mode}.jsonl", "--mode", mode, *flags, model="demo/model", dataset="demo/problems")
        assert "finished already, 800 answers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--few-shot-file", "x.jsonl"), "--few-shot-file: needs --mode few_shot"),
        (("--few-shot-style", "turns"), "--few-shot-style: needs --mode few_shot"),
        (("--few-shot-style", "completion", "--mode", "thinking"), "cannot be combined with --mode thinking"),
        (("--stop", ""), "--stop ''"),
        (("--mode", "few_shot", "--few-shot-file", "none.jsonl"), "none.jsonl: cannot be read"),
        (("--temperature", "0.5"), "decoding is greedy"),
    ],
)
def test_flags_that_do_nothing_or_contradict_are_refused(flags, told, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "a.jsonl", *flags)
    assert told in capsys.readouterr().err
