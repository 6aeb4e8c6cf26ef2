"""Measure train_grpo.py: its rollouts against transformers' generate, and what shuffled rewards teach.

    python bench/grpo.py speed               # the same steps with both ways of sampling, by turns
    python bench/grpo.py shuffled            # rewards dealt out at random within a step: nothing can be learned from them

The demo's model is trained on its problems with the flags of reproduce.py's group `grpo`, `shuffled` for 40 steps. Flags
behind the name go to train_grpo.py as well, and win: `--seed 1 --output-dir outputs/shuffled-seed1`. `shuffled` writes the
trained model to --output-dir, to be tested with inference.py as any other.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import reproduce
import train_grpo
from common import UserError, command_line

DEMO = ["--model-id", "demo/model", "--dataset", "demo/problems", *reproduce.arguments(reproduce.GRPO)]
SHUFFLED = ["--max-steps", "40", "--eval-steps", "10", "--output-dir", "outputs/shuffled"]
SHORT = ["--max-steps", "6", "--eval-steps", "6", "--eval-questions", "1", "--eval-size", "16"]


@command_line
def main(argv=None):
    action, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if action == "speed":
        return compare_speed([*DEMO, *SHORT, *flags])
    if action == "shuffled":
        return train_grpo.learn(train_grpo.parse_args([*DEMO, *SHUFFLED, *flags]), shuffled())
    raise UserError(f"{action!r}: pass speed or shuffled")


def compare_speed(flags):
    """Seconds of rollouts and of whole steps, for both ways; the first step, which warms up, is left out."""
    from rollouts import GroupTrainer

    times = {}
    for name, roll_out in (("ours", GroupTrainer.roll_out), ("transformers", with_transformers), ("ours again", None)):
        with tempfile.TemporaryDirectory() as folder:
            seconds = times[name] = {"rollouts": [], "steps": [], "tokens": 0}
            args = train_grpo.parse_args([*flags, "--output-dir", str(Path(folder) / "run")])
            train_grpo.learn(args, timed(roll_out or GroupTrainer.roll_out, seconds))
    print("| rollouts by | seconds of rollouts a step | seconds a step | sampled tokens a second |")
    print("| --- | ---: | ---: | ---: |")
    for name, seconds in times.items():
        rollouts = seconds["rollouts"][1:]
        whole = sum(seconds["steps"][1:]) / len(rollouts)
        rate = seconds["tokens"] / sum(rollouts)
        print(f"| {name} | {sum(rollouts) / len(rollouts):.2f} | {whole:.2f} | {rate:.0f} |")


def timed(roll_out, seconds: dict):
    """A GroupTrainer that rolls out in the given way and notes how long rollouts and steps take."""
    from rollouts import GroupTrainer

    class Timed(GroupTrainer):
        def roll_out(self, prompts, _trainer=None):
            begun = time.perf_counter()
            output = roll_out(self, prompts)
            seconds["rollouts"].append(time.perf_counter() - begun)
            if len(seconds["rollouts"]) > 1:
                seconds["tokens"] += sum(map(len, output["completion_ids"]))
            return output

        def training_step(self, *args, **kwargs):
            begun = time.perf_counter()
            loss = super().training_step(*args, **kwargs)
            if self._step % self.args.steps_per_generation == 1 or self.args.steps_per_generation == 1:
                seconds["steps"].append(0.0)
            seconds["steps"][-1] += time.perf_counter() - begun
            return loss

    return Timed


def with_transformers(trainer, prompts: list[str]) -> dict:
    """The rollouts of a step by transformers' generate, as TRL does them: one left-padded batch."""
    import torch

    tokenizer, rollouts, model = trainer.processing_class, trainer.rollouts, trainer.answering_model()
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        output = model.generate(
            **batch,
            max_new_tokens=rollouts.max_new_tokens,
            do_sample=True,
            temperature=rollouts.decoding.temperature,
            top_k=rollouts.decoding.top_k,
            top_p=rollouts.decoding.top_p,
            pad_token_id=tokenizer.pad_token_id,
        )
    ends = set(trainer.eos_token_ids)
    completions = [cut(ids, ends) for ids in output[:, batch["input_ids"].shape[1] :].tolist()]
    return {
        "prompt_ids": tokenizer(prompts, add_special_tokens=False)["input_ids"],
        "completion_ids": completions,
        "logprobs": None,
        "text": tokenizer.batch_decode(completions, skip_special_tokens=True),
        "finish_reason": ["stop" if ids[-1] in ends else "length" for ids in completions],
    }


def cut(ids: list[int], ends: set[int]) -> list[int]:
    """The tokens up to the first end token, which is kept."""
    end = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: end + 1]


def shuffled():
    """A GroupTrainer whose rewards are dealt out at random among the completions of a step."""
    from rollouts import GroupTrainer

    class Shuffled(GroupTrainer):
        def right(self, *args, **kwargs):
            rewards = super().right(*args, **kwargs)
            random.Random(f"{self.args.seed} {self.state.global_step}").shuffle(rewards)
            return rewards

    return Shuffled


if __name__ == "__main__":
    sys.exit(main())
