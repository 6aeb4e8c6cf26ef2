"""The trainers: TRL's, with this project's loss, order of examples, evaluation, checkpoints and signals.

`Scored` is what every trainer here shares; it stands before one of TRL's among a class's bases.
`ScoredTrainer` learns from examples. An example is a prompt and its completion as token ids:
{"input_ids": [...], "labels": [...]}, the labels IGNORED over the prompt.
"""

import contextlib
import math
import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy
from trl import SFTConfig, SFTTrainer

from checkpoints import checkpoint_at, drop_checkpoints, write_manifest
from common import (
    Decoding,
    UserError,
    first_line,
    follow_umask,
    gathered,
    heed_stops,
    is_main,
    log,
    processes,
    stop,
    thinking_is_open,
    wait_for_all,
)
from data import Question
from generation import Request, generate
from model import positions
from reading import score_final

warnings.filterwarnings("ignore", ".*gradient_checkpointing.*")  # TRL 1.16 and peft still use the old name
warnings.filterwarnings(
    "ignore", "Could not find a config file"
)  # peft, beside a GGUF file; no vocabulary changes here

EVAL_MAX_NEW_TOKENS = 512  # the longest reference completion of GSM8K's train split has 456 tokens
AT_ONCE = {"cuda": 8}  # sequences that go through the model together, by kind of device
AT_ONCE_ELSEWHERE = 3
IGNORED = -100  # the label of a token that is not trained, as torch's cross_entropy has it


def length(example: dict) -> int:
    return len(example["input_ids"])


def longest_completion(examples: list[dict]) -> int:
    """The most new tokens that an evaluation allows."""
    return max(EVAL_MAX_NEW_TOKENS, *(sum(label != IGNORED for label in example["labels"]) for example in examples))


def epoch_order(examples: int, batch_size: int, seed: int, epoch: int) -> list[int]:
    """The examples of an epoch in order, shuffled.

    A function of its arguments alone, so that a resumed run and any number of processes see the same
    batches. The examples that do not fill a last batch are left out; each epoch leaves out others.
    """
    return random.Random(f"{seed} {epoch}").sample(range(examples), examples - examples % batch_size)


def common_settings(args, steps: int, on_cpu: bool, resumed: bool) -> dict:
    """The arguments of transformers' TrainingArguments that every training here shares."""
    metric = "eval_score" if args.eval_questions else "eval_loss"
    return {
        "output_dir": str(args.output_dir),
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": args.lr_scheduler,
        "warmup_steps": args.warmup,
        "weight_decay": 0.0,  # Stanford Alpaca's
        "max_grad_norm": 1.0,  # transformers' default, here because the results depend on it
        "gradient_checkpointing": False,  # TRL turns it on: less memory, a third more time
        "bf16": args.dtype == "bf16",
        "use_cpu": on_cpu,
        "ddp_find_unused_parameters": False,  # all are used; looking for others costs time
        "dataloader_pin_memory": torch.cuda.is_available() and not on_cpu,
        "seed": args.seed,
        "eval_on_start": not resumed,
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "greater_is_better": metric == "eval_score",
        "logging_steps": min(10, max(1, steps // 100)),
        "disable_tqdm": not is_main(),
        "report_to": "tensorboard",
    }


def build_config(args, examples: int, end: str, on_cpu: bool = True, resumed: bool = False) -> SFTConfig:
    """SFTConfig of a training on so many examples. `end` is the token that ends a completion."""
    size = args.batch_size // processes() // args.gradient_accumulation
    steps = args.max_steps or args.epochs * (examples // args.batch_size)
    return SFTConfig(
        **common_settings(args, steps, on_cpu, resumed),
        num_train_epochs=args.epochs,
        max_steps=args.max_steps or -1,
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        gradient_accumulation_steps=args.gradient_accumulation,
        eval_strategy="epoch",
        save_strategy="epoch",
        eos_token=end,  # written into the tokenizer and the generation config: other programs stop there too
        max_length=None,  # TRL's 1,024 would cut the end of an example, which is the answer
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def choose_pad_token(model, tokenizer, end: str) -> None:
    """Pad with an id that the embedding has. Padding is neither seen nor trained, so any does."""
    pad = tokenizer.pad_token_id
    if pad is None or pad >= model.get_input_embeddings().num_embeddings:
        tokenizer.pad_token = end


SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def make_savable(generation_config) -> None:
    """Drop sampling values beside greedy decoding: transformers ignores them, and refuses to save them.

    Raises UserError where the config stays invalid.
    """
    if not generation_config.do_sample:
        for name in SAMPLING:
            setattr(generation_config, name, None)
    try:
        generation_config.validate(strict=True)
    except ValueError as error:
        told = " ".join(str(error).split())
        raise UserError(f"generation_config.json of the model: transformers would not save it: {told}") from error


@dataclass(frozen=True)
class HeldOut:
    """What an evaluation reads: examples for eval_loss, and questions to answer for eval_score."""

    examples: list[dict]
    questions: list[Question]
    ask: Callable[[str], str]  # the prompt of a question
    max_new_tokens: int
    stop_texts: tuple[str, ...] = ()  # an answer ends before the first of them


@dataclass
class EpochOrder:
    """A sampler that asks `epoch_order` for the epoch the trainer is in."""

    trainer: object
    examples: int
    batch_size: int
    seed: int

    def __len__(self):
        return self.examples - self.examples % self.batch_size

    def __iter__(self):
        epoch = self.trainer.state.global_step * self.batch_size // len(self)
        return iter(epoch_order(self.examples, self.batch_size, self.seed, epoch))


class Scored:
    """Evaluation by score, the choice of the best checkpoint, and signals, for a trainer of TRL's."""

    stop_signal = None
    start_is_candidate = False  # whether the model may be kept as it was before training
    curves: tuple = ()  # what training.png shows above eval_score: (label, names in the log) of each panel

    def __init__(self, *, held_out: HeldOut, at_once: int, patience: int | None = None, **settings):
        """at_once: how many sequences go through the model together. settings: those of TRL's trainer."""
        from datasets import Dataset

        self.held_out, self.at_once, self.patience = held_out, at_once, patience
        super().__init__(eval_dataset=Dataset.from_list(held_out.examples), **settings)

    def _send_telemetry(self):
        """TRL would report the run to its makers."""

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """eval_loss over the tokens of all held-out examples, eval_score over the questions, shared out by process.

        What this returns reaches the logs, the choice of the best checkpoint and patience alike.
        """
        from tqdm import tqdm
        from transformers.trainer_utils import EvalLoopOutput

        self.model.eval()
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        loss, tokens = sum_over_processes(self.sum_losses(rank, ranks))
        right, asked = 0, len(self.held_out.questions)
        if math.isfinite(loss):  # else the training has diverged, and there is nothing to ask
            right, asked = sum_over_processes(self.count_right(rank, ranks))
        metrics = {f"{metric_key_prefix}_loss": loss / tokens}
        line = f"step {self.state.global_step}: eval_loss {loss / tokens:.4f}"
        if asked:
            share = right / asked
            stderr = 100 * math.sqrt(share * (1 - share) / asked)
            metrics |= {f"{metric_key_prefix}_score": 100 * share, f"{metric_key_prefix}_score_stderr": stderr}
            line += f", eval_score {100 * share:.1f} % (standard error {stderr:.1f}, {right:.0f} of {asked:.0f})"
        if is_main():
            tqdm.write(line)
        examples = len(self.held_out.examples)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=examples)

    def sum_losses(self, rank: int, ranks: int) -> tuple[float, float]:
        """(summed loss, trained tokens) of this process's share of the held-out examples."""
        examples = sorted(self.held_out.examples, key=length)[rank::ranks]
        loss = tokens = 0.0
        with torch.no_grad(), self.accelerator.autocast():
            for start in range(0, len(examples), self.at_once):
                ids, labels = pad(examples[start : start + self.at_once], self.args.device)
                loss += summed_loss(self.model, ids, labels).item()
                tokens += (labels != IGNORED).sum().item()
        return loss, tokens

    def count_right(self, rank: int, ranks: int) -> tuple[int, int]:
        """(right answers, questions asked) of this process's share, greedy, asked and read as inference.py does."""
        from tqdm import tqdm

        questions = self.held_out.questions[rank::ranks]
        if not questions:
            return 0, 0
        tokenizer, model = self.processing_class, self.answering_model()
        texts = [self.held_out.ask(item.question) for item in questions]
        prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
        room = positions(model)
        requests = [
            Request(i, 0, prompt, min(self.held_out.max_new_tokens, room - len(prompt)))
            for i, prompt in enumerate(prompts)
            if len(prompt) < room
        ]
        # One autocast around all steps: it then casts every weight once, not once a token.
        with self.accelerator.autocast():
            stops = self.held_out.stop_texts
            done = generate(model, tokenizer, requests, Decoding(), note=lambda line: None, stop_texts=stops)
            bar = tqdm(done, "eval_score", len(requests), unit="question", leave=False, disable=not is_main())
            right = sum(
                score_final(item.text, questions[item.id].answer, thinking_is_open(texts[item.id])) == "right"
                for item in bar
            )
        return right, len(questions)

    def _determine_best_metric(self, metrics, trial):
        """Of equal scores the lower loss is the better checkpoint; patience asks for a better score."""
        if not math.isfinite(metrics["eval_loss"]):
            log("eval_loss is not a number: the training has diverged and stops")
            self.control.should_training_stop = True
            return False
        first = 0 if self.start_is_candidate else 1
        history = [entry for step, entry in evaluations(self).items() if step >= first]
        name = self.args.metric_for_best_model
        sign = 1 if self.args.greater_is_better else -1
        scores = [sign * entry[name] for entry in history]
        if self.patience and len(scores) - 1 - scores.index(max(scores)) >= self.patience:
            log(f"no better {name} in {self.patience} evaluations: stopping")
            self.control.should_training_stop = True
        best = [entry["eval_loss"] for entry in history if entry["step"] == self.state.best_global_step]
        equal = self.state.best_global_step and metrics[name] == self.state.best_metric
        if equal and metrics["eval_loss"] < best[0]:  # the untrained model makes way only for a better score
            self.state.best_metric = None  # makes way for its equal
        return super()._determine_best_metric(metrics, trial)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """After each step, and each epoch. A signal that arrived meanwhile saves and stops.

        The last step of an epoch is saved with the epoch, after its evaluation.
        """
        ends_epoch = self.state.epoch == int(self.state.epoch)
        if self.stop_asked() and not (ends_epoch or self.state.global_step == self.state.max_steps):
            self.control.should_save = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        """Save, list what was saved, and only then drop the checkpoints before: the newest and the best one stay."""
        folder, step = Path(self.args.output_dir), self.state.global_step
        checkpoint = checkpoint_at(folder, step)
        if is_main() and checkpoint.exists():  # a damaged one: none of its files may end up in the manifest
            shutil.rmtree(checkpoint)
        if self.state.best_global_step is not None:  # transformers forgets it at step 0
            self.state.best_model_checkpoint = str(checkpoint_at(folder, self.state.best_global_step))
        wait_for_all()
        try:
            with named_save_errors(checkpoint, (OSError, RuntimeError, SafetensorError)):
                super()._save_checkpoint(model, trial)
                wait_for_all()  # until each has written its state
                if is_main():
                    write_manifest(checkpoint)
        except UserError:
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise
        if is_main():
            drop_checkpoints(folder, keep=(step, self.state.best_global_step))
        if self.stop_asked():
            log(f"stopped after step {step} and saved; the same command with --resume goes on")
            stop(self.stop_signal)

    def stop_asked(self) -> bool:
        """Whether a signal reached any process: all must stop at the same step."""
        return any(gathered(self.stop_signal is not None))

    def _save(self, output_dir=None, state_dict=None):
        """Without training_args.bin: it is a pickle, and loading one can run code."""
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        (folder / "training_args.bin").unlink(missing_ok=True)
        for weights in folder.glob("*.safetensors"):
            follow_umask(weights)

    def answering_model(self):
        """The model without what wraps it for training; an adapter stays in place."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def summary(self) -> list[str]:
        """Lines of Markdown that the card and the end of the run show beside the evaluations."""
        return []

    def create_model_card(self, *args, **kwargs):
        """TRL's knows no scores: `finish` writes ours."""


class ScoredTrainer(Scored, SFTTrainer):
    """Learns the completions of examples."""

    curves = (("loss a token", ("loss", "eval_loss")),)

    def __init__(self, *, args: SFTConfig, examples: list[dict], **settings):
        """settings: model, processing_class and those of `Scored`."""
        from datasets import Dataset

        batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes()
        self.order = EpochOrder(self, len(examples), batch_size, args.seed)
        super().__init__(args=args, train_dataset=Dataset.from_list(examples), **settings)

    def _get_train_sampler(self, dataset=None):
        return self.order

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The gradient of the mean loss over all trained tokens of the batch, its parts and processes together.

        A few sequences of similar length go through the model at a time, and their backward pass
        follows at once: only their activations are held, and little is spent on padding. The batch
        stays as it was drawn: batches of similar lengths cost the demo a fifth more held-out loss.
        Processes average their gradients, so each counts its sum as often as there are processes.
        """
        model.train()
        groups = list(split_batch(self._prepare_inputs(inputs), self.at_once))
        total = torch.zeros((), device=self.args.device)
        for number, (ids, labels) in enumerate(groups, 1):
            # Processes exchange gradients once, in the last backward pass.
            with self.accelerator.no_sync(model) if number < len(groups) else contextlib.nullcontext():
                with self.compute_loss_context_manager():
                    loss = summed_loss(model, ids, labels) * (self.accelerator.num_processes / num_items_in_batch)
                self.accelerator.backward(loss)
            total += loss.detach()
        return total


def split_batch(inputs: dict, at_once: int):
    """Yield the (input ids, labels) of `at_once` sequences at a time, the longest first, without common padding.

    inputs: `input_ids` and `labels`, both (sequences, columns), padded on the right.
    """
    ids, labels = inputs["input_ids"], inputs["labels"]
    columns = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    ends = ((labels != IGNORED) * columns).amax(dim=1)
    for chosen in ends.argsort(descending=True).split(at_once):
        yield ids[chosen, : ends[chosen[0]]], labels[chosen, : ends[chosen[0]]]


def pad(examples: list[dict], device) -> tuple[torch.Tensor, torch.Tensor]:
    """(input ids, labels) of examples as tensors (examples, columns). No result depends on what pads: 0 always exists."""
    padded = []
    for key, filler in (("input_ids", 0), ("labels", IGNORED)):
        tensors = [torch.tensor(example[key]) for example in examples]
        padded.append(torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filler).to(device))
    return padded[0], padded[1]


def summed_loss(model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over the completions' tokens; ids and labels are (sequences, columns).

    No attention mask: padding stands right of every real token, where causal attention never
    looks, and without a mask half of the attention need not be computed. TRL's fused head saves
    memory on a GPU; on a CPU it computes all logits twice, prompts included, where those from the
    first completion on are enough.
    """
    if labels.is_cuda:
        return fused_loss(model, ids, labels)
    first = int((labels != IGNORED).any(dim=0).nonzero()[0])
    kept = labels.shape[1] - first + 1
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[:, :-1]
    logits, labels = logits.flatten(0, 1).float(), labels[:, first:].flatten()
    return cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def fused_loss(model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -model(input_ids=ids, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum()


def sum_over_processes(numbers: tuple) -> list:
    """The sums of each process's numbers, position by position."""
    return [sum(values) for values in zip(*gathered(numbers), strict=True)]


@contextlib.contextmanager
def named_save_errors(path: Path, errors=OSError):
    """What keeps a file from being written as a UserError. torch and safetensors have errors of their own for it."""
    try:
        yield
    except BrokenPipeError:  # nobody reads our output any more: no file's fault
        raise
    except errors as error:
        raise UserError(
            f"{path}: cannot be saved: {first_line(error)}; "
            "make room there, then the same command with --resume goes on from the last checkpoint"
        ) from error


def train(trainer, checkpoint):
    """Train to the end, or on from a checkpoint; afterwards the trainer holds the best model."""
    from transformers import TrainerState

    if checkpoint:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        control = state.stateful_callbacks["TrainerControl"]["args"]
        if state.global_step >= state.max_steps or control["should_training_stop"]:
            trainer.state = state  # killed after its last step; the folder may have another name since
            if state.best_global_step is not None:
                state.best_model_checkpoint = str(checkpoint.parent / f"checkpoint-{state.best_global_step}")
                trainer._load_best_model()
            return
    with stopping_on_signals(trainer):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


@contextlib.contextmanager
def stopping_on_signals(trainer):
    """SIGINT and SIGTERM are noted and heeded after the step; a second one acts at once."""

    def ask(number):
        if trainer.stop_signal is not None:
            stop(number)
        trainer.stop_signal = number
        with contextlib.suppress(RuntimeError):  # it arrived while something was being printed
            log("stopping after this step or evaluation; once more stops at once, back to the last checkpoint")

    restore = heed_stops(ask)
    try:
        yield
    finally:
        restore()


def evaluations(trainer):
    """The evaluations by step."""
    return {row["step"]: row for row in trainer.state.log_history if "eval_loss" in row}


def not_improved(trainer) -> list[str]:
    """A sentence where the checkpoint that is kept does not beat the model that the training began with, else none."""
    scored, name = evaluations(trainer), trainer.args.metric_for_best_model
    sign, kept = 1 if trainer.args.greater_is_better else -1, trainer.state.best_global_step
    if 0 not in scored or sign * scored[kept][name] > sign * scored[0][name]:
        return []
    untrained = "which is kept as it was" if kept == 0 else "which is no candidate"
    return [f"No evaluation was better than that of the untrained model, at step 0, {untrained}."]
