"""train_grpo.py: rewards, rollouts, the order of questions, and what it leaves behind."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from trl import GRPOTrainer

import rollouts
import train_grpo
from common import Decoding, build_prompt, read_json
from data import load_questions
from model import find_model, load_model, load_tokenizer
from reading import score_final
from trainer import HeldOut

MODEL = str(ROOT / "demo/model")
PROMPTS, COMPLETIONS = 2, 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Train questions alone: the test split is never read."""
    folder = tmp_path_factory.mktemp("problems")
    lines = (ROOT / "demo/problems/train.jsonl").read_text().splitlines()[:20]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


SIZES = "--max-steps 6 --eval-steps 2 --eval-size 4 --eval-questions 2 --max-completion-length 160 --device cpu"
STEP = f"--prompts-per-step {PROMPTS} --num-generations {COMPLETIONS} --learning-rate 1e-3 --temperature 1.5"


def flags(dataset, folder, *more):
    places = ["--model-id", MODEL, "--dataset", str(dataset), "--output-dir", str(folder)]
    return [*places, *SIZES.split(), *STEP.split(), *map(str, more)]


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo") / "whole"
    assert train_grpo.main(flags(dataset, folder)) == 0
    return folder


def history(folder, name):
    log = read_json(folder / "trainer_state.json")["log_history"]
    return [(entry["step"], entry[name]) for entry in log if name in entry]


def trainer_of(dataset, tmp_path, **more):
    """A GroupTrainer over the demo's model that has not begun."""
    tokenizer = load_tokenizer(find_model(MODEL))
    model = load_model(find_model(MODEL), "fp32", torch.device("cpu")).requires_grad_()

    def ask(question):
        return build_prompt("thinking", question, tokenizer)

    args = train_grpo.parse_args(flags(dataset, tmp_path / "unused"))
    args.dtype = "fp32"
    sampled = rollouts.Rollouts(PROMPTS, COMPLETIONS, 160, Decoding(True, 1.5), **more)
    questions = load_questions(str(dataset), "train")
    held_out = HeldOut([{"input_ids": [1, 2], "labels": [-100, 2]}], questions[:1], ask, 8)
    config = rollouts.build_config(args, sampled, len(questions), 4, True, False)
    return rollouts.GroupTrainer(
        model=model, args=config, processing_class=tokenizer, questions=questions, ask=ask, rollouts=sampled,
        held_out=held_out, at_once=4,
    )  # fmt: skip


def test_the_reward_is_what_benchmark_counts_as_right(dataset, tmp_path):
    trainer = trainer_of(dataset, tmp_path)
    texts = ["<think>\n</think>\n\n#### 18", "<think>\nso 18\n#### 18", "18", "\\boxed{18}", "#### 19"]
    golds, asked = ["#### 18"] * len(texts), ["an open <think>\n", "?", "?", "?", "?"]
    notes = {}
    rewards = trainer.right(asked, texts, golds, ["stop"] * len(texts), notes.__setitem__)
    assert rewards == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert rewards == [
        score_final(text, "#### 18", "<think>" in prompt) == "right" for prompt, text in zip(asked, texts)
    ]
    assert notes["right"] == 40 and notes["asked_format"] == 60 and notes["unfinished"] == 20
    assert trainer.reward_weights.tolist() == [1.0]


def test_a_reward_for_the_format_alone_is_given_only_when_it_is_asked_for(dataset, tmp_path):
    trainer = trainer_of(dataset, tmp_path, format_reward=0.25)
    assert trainer.reward_weights.tolist() == [1.0, 0.25]
    assert trainer.asked_format(["so\n#### 3", "#### 3 apples", "3"]) == [1.0, 0.0, 0.0]


def test_shares_of_a_step_count_groups_that_teach_nothing():
    right, wrong = (True, True, False), (False, False, True)
    notes = [right, right, wrong, wrong, right, wrong]
    assert rollouts.step_shares(notes, 2) == pytest.approx([50, 50, 50, 100 / 3, 100 / 3])


def test_a_rollout_depends_on_question_sample_and_step_alone(dataset, tmp_path):
    trainer = trainer_of(dataset, tmp_path)
    first, second = list(trainer.ids)[:2]
    together = trainer.roll_out([first] * 3 + [second] * 2)["completion_ids"]
    assert trainer.roll_out([second, first, first])["completion_ids"] == [together[3], *together[:2]]
    assert len({tuple(ids) for ids in together[:3]}) > 1
    trainer.state.global_step = 1
    assert trainer.roll_out([first] * 3)["completion_ids"] != together[:3]


def test_a_step_gets_its_questions_once_for_each_part_and_epochs_differ():
    class State:
        global_step = 0

    class Trainer:
        state = State()

    order = rollouts.GroupOrder(Trainer(), 5, rollouts.Rollouts(2, 3, 8, Decoding(True)), parts=2, seed=1)
    first = list(order)
    assert len(first) == len(order) == 2 * 2 * 2 * 3
    steps = [first[:12], first[12:]]
    assert all(step[:6] == step[6:] for step in steps)
    assert all(len(set(step)) == 2 and step[:3] == [step[0]] * 3 for step in steps)
    State.global_step = 1  # a resumed run is in the same epoch, and the trainer skips what it has seen
    assert list(order) == first
    State.global_step = 2
    assert list(order) != first


def test_parts_hold_every_token_once_and_lengths_are_alike():
    lengths, prompts = torch.tensor([3, 9, 5, 1]), torch.tensor([2, 4, 4, 3])
    batch = {
        "prompt_ids": torch.arange(20).view(4, 5),
        "prompt_mask": (torch.arange(5) >= 5 - prompts[:, None]).int(),
        "completion_ids": torch.arange(40).view(4, 10),
        "completion_mask": (torch.arange(10) < lengths[:, None]).int(),
        "advantages": torch.tensor([0.0, 1.0, 2.0, 3.0]),
        "num_items_in_batch": torch.tensor(18),
    }
    assert [part["advantages"].tolist() for part in rollouts.split_by_length(batch, 2, 3)] == [[1.0, 2.0], [3.0]]
    parts = rollouts.split_by_length(batch, 2, 4)
    assert [part["completion_ids"].shape[1] for part in parts] == [9, 3]
    assert [part["prompt_ids"].shape[1] for part in parts] == [4, 3]
    assert [part["advantages"].tolist() for part in parts] == [[1.0, 2.0], [0.0, 3.0]]
    for name in ("prompt", "completion"):
        kept = [part[f"{name}_ids"][part[f"{name}_mask"].bool()] for part in parts]
        whole = batch[f"{name}_ids"][batch[f"{name}_mask"].bool()]
        assert sorted(torch.cat(kept).tolist()) == sorted(whole.tolist())


@pytest.fixture
def sampled(dataset, tmp_path):
    """A trainer and a step that it could have sampled: two questions, four answers each; the first four teach nothing."""
    trainer = trainer_of(dataset, tmp_path)
    prompts = [prompt for prompt in list(trainer.ids)[:PROMPTS] for _ in range(COMPLETIONS)]
    rolled, pad = trainer.roll_out(prompts), trainer.processing_class.pad_token_id
    batch = {}
    for name in ("prompt", "completion"):
        side = "left" if name == "prompt" else "right"
        tensors = [torch.tensor(ids) for ids in rolled[f"{name}_ids"]]
        for key, filler, rows in (("ids", pad, tensors), ("mask", 0, [torch.ones_like(ids) for ids in tensors])):
            batch[f"{name}_{key}"] = torch.nn.utils.rnn.pad_sequence(rows, True, filler, side)
    batch["advantages"] = torch.tensor([0.0] * 4 + [1.0, -1.0, 0.5, -0.5])
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    return trainer, batch


def test_the_way_of_a_cpu_gives_the_log_probabilities_and_entropies_of_trl(sampled):
    trainer, batch = sampled
    ids, mask = (torch.cat([batch[f"prompt_{key}"], batch[f"completion_{key}"]], dim=1) for key in ("ids", "mask"))
    assert len(set(batch["prompt_mask"].sum(dim=1).tolist())) > 1
    for columns in (slice(None), slice(2, 5)):
        given = (trainer.model, ids[columns], mask[columns], batch["completion_ids"].shape[1])
        ours = trainer._get_per_token_logps_and_entropies(*given, compute_entropy=True)
        theirs = GRPOTrainer._get_per_token_logps_and_entropies(trainer, *given, compute_entropy=True)
        for mine, other in zip(ours[:2], theirs[:2], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "grpo"])
def test_completions_that_teach_nothing_or_repeat_another_are_left_out_and_the_gradient_is_that_of_all(
    sampled, loss_type
):
    trainer, batch = sampled
    trainer.loss_type = loss_type
    for name in ("completion_ids", "completion_mask"):
        batch[name][3] = batch[name][4]  # equal, but of two questions
        batch[name][6] = batch[name][4]  # equal completions of one
    batch["completion_ids"][7] = batch["completion_ids"][5]
    batch["completion_mask"][7] = batch["completion_mask"][5]
    batch["completion_mask"][7, 20:] = 0  # the beginning of another, padded with what that goes on with
    batch["advantages"] = torch.tensor([0.0] * 3 + [0.7, 1.0, -1.5, 1.0, -0.5])
    batch["num_items_in_batch"] = batch["completion_mask"].sum()

    def gradient(parts):
        trainer.model.zero_grad()
        for part in parts:
            trainer.args.steps_per_generation = trainer.current_gradient_accumulation_steps = len(parts)
            trainer._compute_loss(trainer.model, part).backward()
        return torch.cat([weight.grad.flatten() for weight in trainer.model.parameters()])

    trainer.model.train()
    whole = gradient([batch])
    trainer.args.steps_per_generation, trainer.args.per_device_train_batch_size = 4, 2
    trainer._generate_and_score_completions = lambda _: batch
    trainer._step, trainer._buffered_inputs = 0, None
    first = trainer._prepare_inputs([None] * len(batch["advantages"]))
    parts = trainer._buffered_inputs
    assert first is parts[0] and [len(part.get("advantages", ())) for part in parts] == [0, 0, 2, 2]
    assert (gradient(parts) - whole).norm() < 1e-4 * whole.norm()


def test_the_divergence_from_the_untrained_model_counts_every_completion(sampled):
    trainer, batch = sampled
    trainer.beta, trainer.args.steps_per_generation, trainer.args.per_device_train_batch_size = 0.1, 2, 4
    batch["completion_ids"][:], batch["completion_mask"][:] = batch["completion_ids"][0], batch["completion_mask"][0]
    trainer._generate_and_score_completions = lambda _: batch
    trainer._step, trainer._buffered_inputs = 0, None
    trainer._prepare_inputs([None] * 8)
    assert [len(part["advantages"]) for part in trainer._buffered_inputs] == [4, 4]


def test_a_part_without_completions_adds_nothing_and_does_not_go_through_the_model(sampled):
    trainer, _ = sampled
    trainer.model.train()
    trainer._step, trainer._buffered_inputs = 1, [None, {}]
    trainer.args.steps_per_generation = trainer.current_gradient_accumulation_steps = 2
    trainer.model.forward = None
    assert trainer.training_step(trainer.model, [], None) == 0
    assert all(weight.grad is None for weight in trainer.model.parameters())


def test_it_leaves_a_model_a_card_with_the_table_and_curves(trained):
    card = (trained / "README.md").read_text()
    assert "its own completions, rewarded where they are right" in card
    assert re.search(r"\| 1-1 \| \d+\.\d \|", card) and "groups all wrong, %" in card
    assert (trained / "training.png").stat().st_size > 10_000
    assert [step for step, _ in history(trained, "eval_score")] == [0, 2, 4, 6]
    assert len(history(trained, "right")) == 6
    record = read_json(trained / "train.run.json")
    assert record["decides"]["method"] == "grpo" and record["result"]["step"] in (0, 2, 4, 6)
    assert not list(trained.glob("checkpoint-*"))


def interrupt_third_step(monkeypatch, argv):
    """Train until Ctrl-C arrives in the third step, which is finished and saved."""
    step = rollouts.GroupTrainer.training_step

    def interrupted(trainer, *args, **kwargs):
        if trainer.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(rollouts.GroupTrainer, "training_step", interrupted)
        with pytest.raises(SystemExit, match="130"):
            train_grpo.main(argv)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_weights(trained, dataset, tmp_path, monkeypatch, capsys):
    interrupt_third_step(monkeypatch, flags(dataset, tmp_path / "run"))
    assert (tmp_path / "run/checkpoint-3").is_dir()
    assert train_grpo.main(flags(dataset, tmp_path / "run", "--resume")) == 0
    assert "going on after step 3" in capsys.readouterr().out
    for name in ("right", "completions/mean_length", "eval_score"):
        assert history(tmp_path / "run", name) == history(trained, name)
    ours, whole = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", trained))
    assert all(torch.equal(ours[key], whole[key]) for key in whole)


def test_two_processes_learn_from_the_same_completions_as_one(trained, dataset, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0"]
    command += ["--num_processes", "2", "train_grpo.py", *flags(dataset, tmp_path / "two")]
    launched = subprocess.run(
        command, check=False, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert launched.returncode == 0, launched.stderr
    for name in ("right", "completions/mean_length", "groups_all_right", "grad_norm"):
        assert history(tmp_path / "two", name)[0] == pytest.approx(history(trained, name)[0], rel=1e-3)
    shares = [
        a + b for (_, a), (_, b) in zip(*(history(tmp_path / "two", f"groups_all_{n}") for n in ("right", "wrong")))
    ]
    assert 50 in shares  # a step in which the group of one process teaches and that of the other does not


@pytest.mark.parametrize("more", [(), ("--rank", "4", "--merge")])
def test_a_training_that_only_does_harm_leaves_the_model_as_it_was(more, dataset, tmp_path, monkeypatch, capsys):
    scores, losses = (
        {0: (7, 8), 2: (7, 8), 4: (6, 8), 6: (5, 8)},
        {0: 9.0, 2: 8.0, 4: 9.0, 6: 9.0},
    )  # step 2 is no better
    monkeypatch.setattr(rollouts.GroupTrainer, "count_right", lambda trainer, *_: scores[trainer.state.global_step])
    monkeypatch.setattr(
        rollouts.GroupTrainer, "sum_losses", lambda trainer, *_: (losses[trainer.state.global_step], 1.0)
    )
    folder = tmp_path / "run"
    interrupt_third_step(monkeypatch, flags(dataset, folder, *more))
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-0", "checkpoint-3"]
    moved = folder.rename(tmp_path / "moved")
    assert train_grpo.main(flags(dataset, moved, "--resume", *more)) == 0
    told = "No evaluation was better than that of the untrained model, at step 0, which is kept as it was."
    assert told in (moved / "README.md").read_text() and told in capsys.readouterr().out
    result = read_json(moved / "train.run.json")["result"]
    assert (result["step"], result["last_step"]) == (0, 6)
    ours, given = load_file(moved / "model.safetensors"), load_file(find_model(MODEL).folder / "model.safetensors")
    assert ours.keys() == given.keys() and all(torch.equal(ours[key], given[key].float()) for key in ours)


def test_adapters_are_trained_against_a_reference(dataset, tmp_path):
    assert train_grpo.main(flags(dataset, tmp_path / "lora", "--rank", 4, "--beta", 0.04, "--max-steps", 2)) == 0
    assert (tmp_path / "lora/adapter_model.safetensors").is_file()
    assert "LoRA of rank 4" in (tmp_path / "lora/README.md").read_text()
    assert all(divergence >= 0 for _, divergence in history(tmp_path / "lora", "kl"))
    assert train_grpo.main(flags(dataset, tmp_path / "full", "--beta", 0.04, "--max-steps", 2)) == 0
    assert history(tmp_path / "full", "kl")[1][1] > 0


def test_a_training_that_diverges_is_one_line(dataset, tmp_path, monkeypatch, capsys):
    step = rollouts.GroupTrainer.training_step

    def poisoned(trainer, *args, **kwargs):
        loss = step(trainer, *args, **kwargs)
        with torch.no_grad():
            trainer.model.get_input_embeddings().weight.fill_(torch.nan)
        return loss

    monkeypatch.setattr(rollouts.GroupTrainer, "training_step", poisoned)
    with pytest.raises(SystemExit, match="2"):
        train_grpo.main(flags(dataset, tmp_path / "run"))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "train_grpo.py: error: --learning-rate: the training has diverged after step 1 (" in last


def test_a_model_that_is_broken_from_the_start_is_one_line(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rollouts.GroupTrainer, "sum_losses", lambda *_: (float("nan"), 1.0))
    with pytest.raises(SystemExit, match="2"):
        train_grpo.main(flags(dataset, tmp_path / "run"))
    assert "error: eval_loss of the untrained model is not a number" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_processes_with_different_memory_take_a_step_in_as_many_parts(dataset, tmp_path, monkeypatch):
    records = []
    monkeypatch.setattr(train_grpo, "train_in_folder", lambda args, record, *_: records.append(record) or 0)
    monkeypatch.setattr(train_grpo, "gathered", lambda fitting: [fitting, 3])  # what another process has room for
    assert train_grpo.main(flags(dataset, tmp_path / "run")) == 0
    assert records[0]["segments"][0]["at_once"] == 3


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--mode", "few_shot"], "--mode"),
        (["--num-generations", "1"], "--num-generations: must be 2 or more"),
        (["--merge"], "--merge: there is no adapter to merge without --rank"),
        (["--eval-questions", "0"], "--eval-questions 0"),
        (["--prompts-per-step", "17"], "--prompts-per-step 17: more than the 16 questions to train on"),
        (["--top-p", "0"], "--top-p"),
        (["--loss-type", "ppo"], "--loss-type"),
    ],
)
def test_a_wrong_flag_is_one_line(more, told, dataset, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_grpo.main(flags(dataset, tmp_path / "run", *more))
    assert told in capsys.readouterr().err
