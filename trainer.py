"""The trainer: TRL's SFTTrainer with this project's loss, order, evaluation and signals."""

import contextlib
import math
import random
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
from trl import SFTConfig, SFTTrainer

from common import Decoding, Terminated, is_main, log, processes, thinking_is_open
from generation import Request, generate
from model import positions
from reading import score_final

EVAL_MAX_NEW_TOKENS = (
    512  # the longest reference completion of GSM8K's train split has 456 tokens; more where rows are longer
)
PART_ROWS = {"cpu": 3, "cuda": 8}  # of a batch that go through the model at once
IGNORED = -100  # the label of a token that is not trained, as torch's cross_entropy has it


def len_ids(row):
    return len(row["input_ids"])


def epoch_order(examples, batch_size, seed, epoch):
    """The rows of an epoch in order, shuffled.

    A function of its arguments alone, so that a resumed run and any number of processes see the same
    batches. The rest that fills no batch, other rows in every epoch, is left out.
    """
    return random.Random(f"{seed} {epoch}").sample(range(examples), examples - examples % batch_size)


def build_config(args, parts, examples, checkpoint=None):
    cuda = torch.cuda.is_available()
    size = args.batch_size // processes() // parts
    steps = args.max_steps or args.epochs * (examples // args.batch_size)
    metric = "eval_score" if args.eval_questions else "eval_loss"
    return SFTConfig(
        output_dir=str(args.output_dir),
        num_train_epochs=args.epochs,
        max_steps=args.max_steps or -1,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.lr_scheduler,
        warmup_steps=args.warmup,
        weight_decay=0.0,  # Stanford Alpaca's
        max_grad_norm=1.0,  # transformers' default, here because the results depend on it
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        gradient_accumulation_steps=parts,
        gradient_checkpointing=False,  # TRL turns it on: less memory, a third more time
        bf16=args.dtype == "bf16",
        use_cpu=not cuda,
        ddp_find_unused_parameters=False,  # all are used; looking for others costs time
        dataloader_pin_memory=cuda,
        seed=args.seed,
        max_length=None,  # TRL's 1,024 would cut the end of a row, which is the answer
        dataset_kwargs={"skip_prepare_dataset": True},
        eval_strategy="epoch",
        eval_on_start=not checkpoint,
        save_strategy="epoch",
        save_total_limit=1,  # the best one stays beside the last
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=metric == "eval_score",
        logging_steps=min(10, max(1, steps // 100)),
        disable_tqdm=not is_main(),
        report_to="tensorboard",
    )


def build_trainer(args, config, model, tokenizer, rows, held_out_rows, held_out, ask):
    from datasets import Dataset

    tokenizer.pad_token = (
        tokenizer.pad_token or tokenizer.eos_token or "<|im_end|>"
    )  # of no effect: it is neither seen nor trained
    trainer = ScoredTrainer(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(sorted(held_out_rows, key=len_ids)),
    )
    trainer.order = EpochOrder(trainer, len(rows), args.batch_size, args.seed)
    trainer.patience = args.patience
    trainer.questions, trainer.ask = held_out[: args.eval_questions], ask
    trainer.most_new_tokens = max(
        EVAL_MAX_NEW_TOKENS, *(sum(label != IGNORED for label in row["labels"]) for row in rows)
    )
    return trainer


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


class ScoredTrainer(SFTTrainer):
    """What is ours in the trainer. Mixed into SFTTrainer where it is built, for its import takes seconds."""

    stop_signal = None
    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole batch

    def _send_telemetry(self):
        """TRL would report the run to its makers."""

    def _get_train_sampler(self, dataset=None):
        return self.order

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean over all trained tokens of the batch, its parts and processes together.

        Processes average their gradients, so each counts its sum as often as there are processes.
        """
        return self.summed_loss(model, inputs) * (self.accelerator.num_processes / num_items_in_batch)

    def summed_loss(self, model, inputs):
        """Cross-entropy summed over the completions' tokens, of a few rows of like length at a time.

        Each part is cut to its own longest row, so that little is spent on padding and the batch stays
        as it was drawn: batches of like lengths cost the demo a fifth more held-out loss.
        """
        ids, labels = inputs["input_ids"], inputs["labels"]
        columns = torch.arange(1, labels.shape[1] + 1, device=labels.device)
        ends = ((labels != IGNORED) * columns).amax(dim=1)
        parts = ends.argsort().split(PART_ROWS[labels.device.type])
        return sum(
            self.part_loss(model, ids[rows, : ends[rows].max()], labels[rows, : ends[rows].max()]) for rows in parts
        )

    def part_loss(self, model, ids, labels):
        """No attention mask: padding stands right of every real token, where causal attention never
        looks, and without a mask half of the attention need not be computed. TRL's fused head saves
        memory on a GPU; on a CPU it computes all logits twice, prompts included, where those from the
        first completion on are enough.
        """
        from torch.nn.functional import cross_entropy

        if labels.is_cuda:
            return self.fused_loss(model, ids, labels)
        first = int((labels != IGNORED).any(dim=0).nonzero()[0])
        kept = labels.shape[1] - first + 1
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[:, :-1]
        logits, labels = logits.flatten(0, 1).float(), labels[:, first:].flatten()
        return cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    def fused_loss(self, model, ids, labels):
        return -model(input_ids=ids, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum()

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """eval_loss over the tokens of all held-out rows, eval_score over the questions, shared out by process.

        What this returns reaches the logs, the choice of the best checkpoint and patience alike.
        """
        from transformers.trainer_utils import EvalLoopOutput

        self.model.eval()
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes

        def over_all(*sums):
            return self.accelerator.reduce(torch.tensor(sums, dtype=torch.float64).to(self.args.device)).tolist()

        loss, tokens = over_all(*self.sum_losses(rank, ranks))
        right, asked = 0, len(self.questions)
        if math.isfinite(loss):  # else the training has diverged, and there is nothing to ask
            right, asked = over_all(*self.count_right(rank, ranks))
        metrics = {f"{metric_key_prefix}_loss": loss / tokens}
        line = f"step {self.state.global_step}: eval_loss {loss / tokens:.4f}"
        if asked:
            share = right / asked
            stderr = 100 * math.sqrt(share * (1 - share) / asked)
            metrics |= {f"{metric_key_prefix}_score": 100 * share, f"{metric_key_prefix}_score_stderr": stderr}
            line += f", eval_score {100 * share:.1f} % (standard error {stderr:.1f}, {right:.0f} of {asked:.0f})"
        if is_main():
            from tqdm import tqdm

            tqdm.write(line)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(self.eval_dataset))

    def sum_losses(self, rank, ranks):
        """(summed loss, trained tokens) of this process's share of the held-out rows."""
        rows, size = self.eval_dataset[rank::ranks], self.args.per_device_eval_batch_size
        rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        loss = tokens = 0.0
        with torch.no_grad(), self.accelerator.autocast():
            for start in range(0, len(rows), size):
                inputs = self._prepare_inputs(self.data_collator(rows[start : start + size]))
                loss += self.summed_loss(self.model, inputs).item()
                tokens += (inputs["labels"] != IGNORED).sum().item()
        return loss, tokens

    def count_right(self, rank, ranks):
        """(right answers, questions asked) of this process's share, greedy, asked and read as inference.py does."""
        from tqdm import tqdm

        questions = self.questions[rank::ranks]
        if not questions:
            return 0, 0
        tokenizer, model = self.processing_class, self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        texts = [self.ask(item.question) for item in questions]
        prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
        room = positions(model)
        requests = [
            Request(i, 0, prompt, min(self.most_new_tokens, room - len(prompt)))
            for i, prompt in enumerate(prompts)
            if len(prompt) < room
        ]
        # One autocast around all steps: it then casts every weight once, not once a token.
        with self.accelerator.autocast():
            done = generate(model, tokenizer, requests, Decoding(), note=lambda line: None)
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
        history = [row for row in self.state.log_history if "eval_loss" in row and row["step"]]
        name = self.args.metric_for_best_model
        sign = 1 if self.args.greater_is_better else -1
        scores = [sign * row[name] for row in history]
        if self.patience and len(scores) - 1 - scores.index(max(scores)) >= self.patience:
            log(f"no better {name} in {self.patience} evaluations: stopping")
            self.control.should_training_stop = True
        best = [row["eval_loss"] for row in history if row["step"] == self.state.best_global_step]
        if metrics[name] == self.state.best_metric and metrics["eval_loss"] < best[0]:
            self.state.best_metric = None  # makes way for its equal
        return super()._determine_best_metric(metrics, trial)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """After each step, and each epoch. A signal that arrived meanwhile saves and stops.

        The last step of an epoch is saved with the epoch, after its evaluation.
        """
        ends_epoch = self.state.global_step * self.order.batch_size % len(self.order) == 0
        if self.stop_asked() and not (ends_epoch or self.state.global_step == self.state.max_steps):
            self.control.should_save = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.stop_asked():
            log(f"stopped after step {self.state.global_step} and saved; the same command with --resume goes on")
            raise Terminated if self.stop_signal == signal.SIGTERM else KeyboardInterrupt

    def stop_asked(self):
        """Whether a signal reached any process: all must stop at the same step."""
        if self.accelerator.num_processes == 1:
            return self.stop_signal is not None
        flag = torch.tensor(int(self.stop_signal is not None), device=self.args.device)
        return bool(self.accelerator.reduce(flag).item())

    def _save(self, output_dir=None, state_dict=None):
        """Without training_args.bin: it is a pickle, and loading one can run code."""
        super()._save(output_dir, state_dict)
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def create_model_card(self, *args, **kwargs):
        """TRL's knows no scores: `finish` writes ours."""


def train(trainer, checkpoint):
    """Train to the end, or on from a checkpoint; afterwards the trainer holds the best model."""
    from transformers import TrainerState

    if checkpoint:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        control = state.stateful_callbacks["TrainerControl"]["args"]
        if state.global_step >= state.max_steps or control["should_training_stop"]:
            trainer.state = state  # killed after its last step; the folder may have another name since
            if state.best_global_step:
                state.best_model_checkpoint = str(checkpoint.parent / f"checkpoint-{state.best_global_step}")
                trainer._load_best_model()
            return
    with stopping_on_signals(trainer):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


@contextlib.contextmanager
def stopping_on_signals(trainer):
    """SIGINT and SIGTERM are noted and heeded after the step; a second one acts at once."""

    def ask(number, _):
        trainer.stop_signal = number
        log("stopping after this step or evaluation; once more stops at once, back to the last checkpoint")
        restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        restore()


def evaluations(trainer):
    """The evaluations by step."""
    return {row["step"]: row for row in trainer.state.log_history if "eval_loss" in row}


NOT_IMPROVED = "No evaluation was better than that of the untrained model, at step 0, which is no candidate."


def improved(trainer):
    """Whether the checkpoint that is kept beats the model that the training began with."""
    scored, name = evaluations(trainer), trainer.args.metric_for_best_model
    sign = 1 if trainer.args.greater_is_better else -1
    return 0 not in scored or sign * scored[trainer.state.best_global_step][name] > sign * scored[0][name]
