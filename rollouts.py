"""Groups of completions to learn from: sampled by this project's own generation, rewarded where they are right.

`GroupTrainer` is TRL's GRPOTrainer (Shao et al., "DeepSeekMath", 2024, section 4) with the order of questions, the
completions and the rewards of this project. What it shares with training on examples stands in trainer.py.
"""

import contextlib
import copy
import hashlib
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from common import Decoding, UserError, gathered, processes, thinking_is_open
from data import Question
from generation import Request, generate
from reading import score_final
from scores import ASKED_FORMAT
from trainer import Scored, common_settings, epoch_order, evaluations

warnings.filterwarnings("ignore", ".*rollout_func.*")  # TRL calls it experimental; the pinned version has it

MICRO_BATCH = 16  # most completions that go through the model together

# What the log says of every step, in percent: the share of completions, or of groups, of which it is true.
SHARES = ("right", "asked_format", "unfinished", "groups_all_right", "groups_all_wrong")


@dataclass(frozen=True)
class Rollouts:
    """What is sampled in a step: `prompts` questions, `completions` of each."""

    prompts: int
    completions: int
    max_new_tokens: int
    decoding: Decoding
    format_reward: float = 0.0  # added for the asked format, right or wrong


def build_config(args, rollouts: Rollouts, questions: int, at_once: int, on_cpu: bool, resumed: bool) -> GRPOConfig:
    """GRPOConfig of a training on so many questions. at_once: completions that fit through the model together."""
    share = rollouts.prompts * rollouts.completions // processes()
    size = max(count for count in range(1, min(at_once, share) + 1) if share % count == 0)
    steps = args.max_steps or args.epochs * (questions // rollouts.prompts)
    settings = common_settings(args, steps, on_cpu, resumed)
    return GRPOConfig(
        **settings | {"metric_for_best_model": "eval_score", "greater_is_better": True},
        max_steps=steps,
        per_device_train_batch_size=size,
        per_device_eval_batch_size=rollouts.completions,
        gradient_accumulation_steps=share // size,
        num_generations=rollouts.completions,
        max_completion_length=rollouts.max_new_tokens,
        temperature=rollouts.decoding.temperature,
        top_p=rollouts.decoding.top_p,
        top_k=rollouts.decoding.top_k,
        loss_type=args.loss_type,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=min(args.eval_steps, steps),
        save_steps=min(args.eval_steps, steps),
    )


@dataclass
class GroupOrder:
    """A sampler: each question of a step as often as it has completions, and that once for every part of the step.

    The order is a function of seed and epoch, as `epoch_order` says, so that a resumed run sees the same questions.
    """

    trainer: object
    questions: int
    rollouts: Rollouts
    parts: int  # how often the trainer asks for the same step
    seed: int

    def __len__(self):
        return self.questions // self.rollouts.prompts * self.rollouts.prompts * self.rollouts.completions * self.parts

    def __iter__(self):
        size = self.rollouts.prompts
        epoch = self.trainer.state.global_step // (self.questions // size)
        order = epoch_order(self.questions, size, self.seed, epoch)
        for start in range(0, len(order), size):
            for _ in range(self.parts):
                for question in order[start : start + size]:
                    yield from [question] * self.rollouts.completions


class GroupTrainer(Scored, GRPOTrainer):
    """Learns to prefer the right completions of a question to its wrong ones."""

    start_is_candidate = True
    curves = (
        ("right, % of completions", ("right",)),
        ("tokens a completion", ("completions/mean_length",)),
    )

    def __init__(
        self,
        *,
        args: GRPOConfig,
        questions: list[Question],
        ask: Callable[[str], str],
        rollouts: Rollouts,
        beta: float = 0.0,
        **settings,
    ):
        """beta: weight of the KL divergence from the model that the training began with.
        settings: model, processing_class and those of `Scored`.
        """
        from datasets import Dataset

        self.rollouts = rollouts
        self.ids = {ask(item.question): item.id for item in questions}
        self.order = GroupOrder(self, len(questions), rollouts, args.gradient_accumulation_steps, args.seed)
        weights = {self.right: 1.0} | ({self.asked_format: rollouts.format_reward} if rollouts.format_reward else {})
        args.reward_weights = list(weights.values())
        super().__init__(
            args=args,
            reward_funcs=list(weights),
            train_dataset=Dataset.from_list(
                [{"prompt": ask(item.question), "answer": item.answer} for item in questions]
            ),
            rollout_func=self.roll_out,
            **settings,
        )
        if beta:
            self.set_reference(beta)

    def set_reference(self, beta: float):
        """Keep the untrained model in memory: TRL would load it again from a path, which a merged model has none of."""
        self.beta = beta
        if not hasattr(self.model, "disable_adapter"):  # an adapter's reference is its base
            reference = copy.deepcopy(self.model)
            vars(reference).pop("forward", None)  # TRL's, which goes on calling the trained model
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
            add_fused_lm_head(self.ref_model, temperature=self.temperature)

    def _get_train_sampler(self, dataset=None):
        return self.order

    def _prepare_inputs(self, generation_batch):
        """The next part of the step's completions, which are sampled once a step.

        Parts hold completions of similar length, each cut to its own longest: TRL's are as wide as the
        longest of the step. Where few completions teach, some parts are empty. The gradient of the whole step
        is the same.
        """
        parts = self.args.steps_per_generation
        if self._step % parts == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            count = len(batch["advantages"])
            if not self.beta:
                batch["advantages"] = advantages_of_first(batch)
                # What teaches nothing is left out. TRL gathers statistics of what is kept, so all processes keep as many.
                count = max(1, *gathered(int((batch["advantages"] != 0).sum())))
            found = split_by_length(batch, self.args.per_device_train_batch_size, count)
            if self.loss_type != "dapo":  # TRL averages over the completions of a part, then over the parts
                for part in found:
                    part["advantages"] = part["advantages"] * (len(part["advantages"]) * parts / len(generation_batch))
            # Empty parts come first: processes exchange gradients in the last one, so it must not be empty.
            self._buffered_inputs = [{}] * (parts - len(found)) + found
        return self._buffered_inputs[self._step % parts]

    def _compute_loss(self, model, inputs):
        """The loss of a part. One without completions has none, and does not go through the model."""
        if not inputs:
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **more
    ):
        """Log-probabilities and entropies of the completions' tokens, (completions, logits_to_keep), zero behind an end.

        TRL's fused head saves memory on a GPU. On a CPU it computes the logits of the prompts too, and all of
        them twice; its mask keeps attention from leaving out half of the scores.
        """
        if input_ids.is_cuda or more.get("compute_aux_loss"):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **more
            )
        with self.accelerator.autocast():
            logits, labels = completion_logits(model, input_ids, attention_mask, logits_to_keep)
        mask = attention_mask[:, -logits_to_keep:].bool()
        log_probs = (logits.float() / self.temperature).log_softmax(dim=-1)
        chosen = log_probs.gather(-1, labels[..., None])[..., 0].masked_fill(~mask, 0)
        if not compute_entropy:
            return chosen, None, None
        with torch.no_grad():
            entropies = -(log_probs.exp() * log_probs).sum(dim=-1).masked_fill(~mask, 0)
        return chosen, entropies, None

    def roll_out(self, prompts: list[str], _trainer=None) -> dict:
        """One completion for each prompt, as TRL's rollout_func returns them, with their texts.

        The completion of a question depends on the weights and on (seed, question, sample, step), not on
        what else is sampled with it, nor on the number of processes.
        """
        everyone = gathered(prompts)  # a group may be spread over processes, and its samples are numbered through
        before = everyone[: self.accelerator.process_index]
        samples, numbers = Counter(itertools.chain.from_iterable(before)), []
        for prompt in prompts:
            numbers.append(samples[prompt])
            samples[prompt] += 1
        tokenizer = self.processing_class
        prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        requests = [
            Request(self.ids[prompt], number, ids, self.rollouts.max_new_tokens)
            for prompt, number, ids in zip(prompts, numbers, prompt_ids, strict=True)
        ]
        decoding = step_decoding(self.rollouts.decoding, self.args.seed, self.state.global_step)
        with self.accelerator.autocast(), named_divergence(self.state.global_step):
            done = {
                (item.id, item.sample): item
                for item in generate(
                    self.answering_model(),
                    tokenizer,
                    requests,
                    decoding,
                    note=lambda line: None,
                    stop_texts=self.held_out.stop_texts,
                )
            }
        completions = [done[request.id, request.sample] for request in requests]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [item.token_ids or [tokenizer.pad_token_id] for item in completions],  # TRL wants a token
            "logprobs": None,
            "text": [item.text for item in completions],
            "finish_reason": [item.finish_reason for item in completions],
        }

    def right(self, prompts, text, answer, finish_reason, log_metric, **_) -> list[float]:
        """The reward: 1 for an answer that `benchmark.py` counts as right, else 0. Notes what the log says of the step."""
        statuses = [
            score_final(*pair, thinking_is_open(prompt)) for *pair, prompt in zip(text, answer, prompts, strict=True)
        ]
        notes = list(
            zip(
                (status == "right" for status in statuses),
                map(is_in_asked_format, text),
                (s == "unfinished" or reason == "length" for s, reason in zip(statuses, finish_reason, strict=True)),
                strict=True,
            )
        )
        for name, share in zip(
            SHARES, step_shares(itertools.chain.from_iterable(gathered(notes)), self.rollouts.completions), strict=True
        ):
            log_metric(name, share)
        return [float(status == "right") for status in statuses]

    def asked_format(self, text, **_) -> list[float]:
        """1 for a text that ends in `#### N`, right or wrong."""
        return [float(is_in_asked_format(one)) for one in text]

    def summary(self) -> list[str]:
        """What became of the completions over the training, in ten parts of its steps."""
        entries = [entry for entry in self.state.log_history if SHARES[0] in entry]
        header = ["steps", *(name.replace("_", " ") + ", %" for name in SHARES), "tokens a completion"]
        lines = [" | ".join(["", *header, ""]).strip(), "| --- |" + " ---: |" * (len(header) - 1)]
        size = max(1, math.ceil(len(entries) / 10))
        before = 0
        for start in range(0, len(entries), size):
            part = entries[start : start + size]
            means = [sum(entry[name] for entry in part) / len(part) for name in (*SHARES, "completions/mean_length")]
            cells = [f"{before + 1}-{part[-1]['step']}", *(f"{mean:.1f}" for mean in means)]
            lines.append("| " + " | ".join(cells) + " |")
            before = part[-1]["step"]
        return [*lines, "", "Groups whose answers are all right or all wrong teach nothing.", ""]

    def _evaluate(self, trial, *args, **kwargs):
        """The evaluation at the start makes the untrained model the best so far, and saves it.

        A step of reinforcement learning can do harm, and the run must not hand back less than it was given.
        """
        metrics = super()._evaluate(trial, *args, **kwargs)
        if self.start_is_candidate and self.state.global_step == 0:
            if not math.isfinite(metrics["eval_loss"]):
                raise UserError("eval_loss of the untrained model is not a number: its weights are damaged or overflow")
            self._determine_best_metric(metrics, trial)
            self._save_checkpoint(self.model, trial)
        return metrics

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """The last step is evaluated too, and may be the one that is kept."""
        if self.state.global_step == self.state.max_steps and self.state.global_step not in evaluations(self):
            self.control.should_evaluate = True
        super()._maybe_log_save_evaluate(*args, **kwargs)


def step_decoding(decoding: Decoding, seed: int, step: int) -> Decoding:
    """The decoding of one step: its draws differ from those of every other step."""
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    settings = vars(decoding) | {"seed": int.from_bytes(digest[:4]) >> 1}
    return Decoding(**settings)


@contextlib.contextmanager
def named_divergence(step: int):
    """NaN logits in the middle of a training are its own doing: say so."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"--learning-rate: the training has diverged after step {step} ({error}); pass a smaller one"
        ) from error


def is_in_asked_format(text: str) -> bool:
    return ASKED_FORMAT.search(text, max(0, len(text) - 80)) is not None


def step_shares(notes: Iterable[tuple[bool, bool, bool]], size: int) -> list[float]:
    """SHARES in percent, of (right, in the asked format, unfinished) of each completion, group after group of `size`."""
    notes = list(notes)
    groups = [[right for right, *_ in notes[start : start + size]] for start in range(0, len(notes), size)]
    shares = [sum(column) / len(notes) for column in zip(*notes, strict=True)]
    shares += [sum(map(all, groups)) / len(groups), sum(not any(group) for group in groups) / len(groups)]
    return [100 * share for share in shares]


def completion_logits(model, ids: torch.Tensor, mask: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, token ids) of the last `kept` columns, which hold the completions.

    ids and mask: (completions, columns), prompts padded on the left and completions on the right. Every
    sequence is moved to the left, so that padding stands right of it, where causal attention never looks.
    """
    prompts = mask[:, :-kept].sum(dim=1)
    columns = torch.arange(ids.shape[1], device=ids.device) + (ids.shape[1] - kept - prompts)[:, None]
    moved = ids.gather(1, columns.clamp(max=ids.shape[1] - 1))[:, : int(mask.sum(dim=1).max())]
    first = int(prompts.min()) - 1  # the position that predicts the first token of any completion
    logits = model(input_ids=moved, use_cache=False, logits_to_keep=moved.shape[1] - first).logits
    places = (prompts[:, None] - 1 - first + torch.arange(kept, device=ids.device)).clamp(max=logits.shape[1] - 1)
    return logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1])), ids[:, -kept:]


def advantages_of_first(batch: dict) -> torch.Tensor:
    """Advantages, (completions,), with which equal completions of a prompt need to go through the model only once.

    The first has the sum of theirs and the others 0. The gradient is the same: a step is learned from once, and then
    the loss is linear in the advantage. batch: see `split_by_length`.
    """
    columns = [batch[f"{part}_{kind}"] for part in ("prompt", "completion") for kind in ("ids", "mask")]
    _, number = torch.cat(columns, dim=1).unique(dim=0, return_inverse=True)
    sums = torch.zeros_like(batch["advantages"]).index_add_(0, number, batch["advantages"])
    earlier = (number[:, None] == number).tril(diagonal=-1).any(dim=1)
    return sums[number].masked_fill(earlier, 0)


def split_by_length(batch: dict, size: int, count: int) -> list[dict]:
    """A step's completions in parts of similar length, the longest first, without columns that only hold padding.

    batch: tensors of TRL's, (completions, columns), prompts padded on the left and completions on the right.
    size: most completions of a part. count: how many completions are kept. Those whose advantage is 0 are left out
    first, for their gradient is 0 too.
    """
    lengths = batch["completion_mask"].sum(dim=1)
    order = lengths.argsort(descending=True, stable=True)
    teaches = batch["advantages"][order] != 0
    kept = torch.cat([order[teaches], order[~teaches]])[:count]
    kept = kept[lengths[kept].argsort(descending=True, stable=True)]
    found = []
    for chosen in kept.tensor_split(math.ceil(len(kept) / size)):
        part = {
            name: value[chosen] if isinstance(value, torch.Tensor) and value.ndim else value
            for name, value in batch.items()
        }
        longest, prompt = int(lengths[chosen].max()), int(part["prompt_mask"].sum(dim=1).max())
        for name, value in part.items():
            if name in ("prompt_ids", "prompt_mask"):
                part[name] = value[:, value.shape[1] - prompt :]
            elif isinstance(value, torch.Tensor) and value.shape == batch["completion_mask"][chosen].shape:
                part[name] = value[:, :longest]
        found.append(part)
    return found
