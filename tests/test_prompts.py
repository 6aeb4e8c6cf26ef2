"""What each mode's prompt is, on the demo's tokenizer and on the real one."""

import copy
import datetime

import pytest
import transformers
from conftest import ROOT

import common
from common import MODES, build_messages, build_prompt, chatml_think_prefill
from data import load_questions

EMPTY_THINK = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def demo_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(ROOT / "demo/model")


@pytest.fixture(scope="module")
def real_tokenizer(shared):
    return transformers.AutoTokenizer.from_pretrained(shared / "qwen3_tokenizer")


def test_prompts_without_thinking_end_with_the_empty_think_block(demo_tokenizer):
    for mode in ("zero_shot", "cot", "few_shot"):
        assert build_prompt(mode, "1 + 1?", demo_tokenizer, [("2 + 2?", "4\n#### 4")]).endswith(EMPTY_THINK)


def test_thinking_leaves_the_thought_to_the_model_and_the_prefill_opens_it(demo_tokenizer):
    thinking = build_prompt("thinking", "1 + 1?", demo_tokenizer)
    assert thinking.endswith("<|im_start|>assistant\n") and not common.thinking_is_open(thinking)
    prefill = build_prompt("chatml_think_prefill", "1 + 1?", demo_tokenizer)
    assert prefill == thinking + "<think>\n" == chatml_think_prefill("1 + 1?")
    assert common.thinking_is_open(prefill)


def test_worked_examples_stand_in_one_prompt_or_as_turns_without_annotations():
    examples = [("How many?", "2*3=<<2*3=6>>6\n#### 6"), ("And now?", "#### 7")]
    prompt = build_messages("few_shot", "Last?", examples)
    assert [message["role"] for message in prompt] == ["system", "user"]
    assert prompt[1]["content"] == (
        "Question: How many?\nAnswer: 2*3=6\n#### 6\n\nQuestion: And now?\nAnswer: #### 7\n\nQuestion: Last?\nAnswer:"
    )
    turns = build_messages("few_shot", "Last?", examples, "turns")
    assert [message["role"] for message in turns] == ["system"] + ["user", "assistant"] * 2 + ["user"]
    assert turns[2]["content"] == "2*3=6\n#### 6" and turns[-1]["content"] == "Last?"


def test_a_system_prompt_replaces_the_instruction_and_an_empty_one_leaves_it_out():
    assert build_messages("cot", "Q", system_prompt="Be brief.")[0]["content"] == "Be brief."
    assert [message["role"] for message in build_messages("cot", "Q", system_prompt="")] == ["user"]
    assert chatml_think_prefill("Q", "").startswith("<|im_start|>user\n")


def test_a_template_without_a_thinking_switch_works_and_is_noticed(demo_tokenizer):
    plain = transformers.AutoTokenizer.from_pretrained(ROOT / "demo/model")
    plain.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    assert not common.has_thinking_switch(plain) and common.has_thinking_switch(demo_tokenizer)
    assert build_prompt("cot", "1 + 1?", plain).endswith("[user] 1 + 1?\n[assistant] ")


def test_a_missing_or_refusing_chat_template_is_named():
    bare = transformers.AutoTokenizer.from_pretrained(ROOT / "demo/model")
    bare.chat_template = None
    with pytest.raises(common.UserError, match="no chat template.*--few-shot-style completion"):
        build_prompt("cot", "Q", bare)
    assert build_prompt("chatml_think_prefill", "Q", bare)
    bare.chat_template = "{{ raise_exception('No roles at all') }}"
    with pytest.raises(common.UserError, match="chat template failed: No roles at all"):
        build_prompt("cot", "Q", bare)


SYSTEM_TURNS = {
    "dropped": "{% for m in messages if m.role != 'system' %}[{{ m.role }}] {{ m.content }}\n{% endfor %}",
    "refused": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}"
    ),
}


@pytest.mark.parametrize("template", SYSTEM_TURNS.values(), ids=SYSTEM_TURNS)
def test_without_a_system_turn_the_instruction_stands_before_the_question(template, demo_tokenizer):
    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.chat_template = template
    assert not common.has_system_turn(tokenizer) and common.has_system_turn(demo_tokenizer)
    assert build_prompt("cot", "1 + 1?", tokenizer) == f"[user] {MODES['cot'].instruction}\n\n1 + 1?\n"
    assert build_prompt("cot", "1 + 1?", tokenizer, system_prompt="") == "[user] 1 + 1?\n"
    turns = build_prompt("few_shot", "1 + 1?", tokenizer, [("2 + 2?", "#### 4")], "turns", "Think.")
    assert turns == "[user] Think.\n\n2 + 2?\n[assistant] #### 4\n[user] 1 + 1?\n"


def test_a_template_that_loses_what_is_asked_is_refused(demo_tokenizer):
    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content[:20] }}{% endfor %}"
    with pytest.raises(common.UserError, match="leaves out or changes the text of the user message"):
        build_prompt("cot", "How many eggs are there in all?", tokenizer, system_prompt="")


def test_of_several_templates_the_default_is_taken_and_without_one_all_are_named(demo_tokenizer):
    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.chat_template = {"rag": "no", "default": "{{ messages[-1].content }}"}
    assert build_prompt("cot", "1 + 1?", tokenizer, system_prompt="") == "1 + 1?"
    tokenizer.chat_template = {"rag": "no", "tool_use": "no"}
    with pytest.raises(common.UserError, match=r"2 chat templates \(rag, tool_use\).*chat_template.jinja"):
        build_prompt("cot", "1 + 1?", tokenizer)


def test_a_template_prints_the_date_that_it_is_given(demo_tokenizer):
    tokenizer = copy.deepcopy(demo_tokenizer)
    dated = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%H:%M\") }} {% endif %}"
    tokenizer.chat_template = dated + "{{ messages[-1].content }}"
    now = datetime.datetime(2025, 2, 3, 23, 59)
    assert build_prompt("cot", "Q", tokenizer, system_prompt="", now=now) == "03 Feb 2025 23:59 Q"
    today = datetime.date.today().strftime("%d %b %Y")
    assert build_prompt("cot", "Q", tokenizer, system_prompt="").startswith(today)
    assert common.has_date(tokenizer) and not common.has_date(demo_tokenizer)


def test_completion_style_is_plain_text_that_begins_with_the_tokenizers_first_token(demo_tokenizer):
    examples = [("How many?", "2*3=<<2*3=6>>6\n#### 6"), ("And now?", "7")]
    plain = (
        "Question: How many?\nAnswer: 2*3=6\n#### 6\n\nQuestion: And now?\nAnswer: #### 7\n\nQuestion: Last?\nAnswer:"
    )
    assert build_prompt("few_shot", "Last?", demo_tokenizer, examples, "completion") == plain
    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.bos_token = "<|endoftext|>"
    assert build_prompt("few_shot", "Last?", tokenizer, examples, "completion") == "<|endoftext|>" + plain
    tokenizer.bos_token = "<|im_start|>"  # as SmolLM2-Instruct has it, where it opens a turn
    assert build_prompt("few_shot", "Last?", tokenizer, examples, "completion") == plain
    asked = build_prompt("cot", "Last?", demo_tokenizer, few_shot_style="completion")
    assert asked == f"{MODES['cot'].instruction}\n\nQuestion: Last?\nAnswer:"


def test_the_think_prefill_needs_chatml_and_may_do_without_the_think_token(demo_tokenizer):
    without = tokenizer_without("<|im_start|>")
    with pytest.raises(common.UserError, match=r"no <\|im_start\|>.*--few-shot-style completion"):
        build_prompt("chatml_think_prefill", "Q", without)
    assert common.has_token(demo_tokenizer, "<think>") and not common.has_token(without, "<think>")
    assert build_prompt("chatml_think_prefill", "Q", tokenizer_without("<think>")).endswith("<think>\n")


def tokenizer_without(token):
    """A tokenizer of single characters that knows ChatML's tokens, less one and <think>."""
    import tokenizers

    chatml = [text for text in ("<|im_start|>", "<|im_end|>") if text != token]
    vocabulary = {text: i for i, text in enumerate(["<unk>", *chatml, *map(chr, range(32, 127)), "\n"])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), unk_token="<unk>")


def test_each_mode_states_all_its_facts_in_the_one_table():
    assert {name for name, mode in MODES.items() if mode.thinks} == {"thinking", "chatml_think_prefill"}
    assert [name for name, mode in MODES.items() if mode.sampled] == ["thinking"]
    assert {mode.max_new_tokens for mode in MODES.values() if mode.thinks} == {4096}
    assert all("#### <answer>" in mode.instruction for mode in MODES.values())


@pytest.mark.parametrize("style", ["prompt", "turns"])
def test_all_real_questions_in_every_mode_with_the_real_tokenizer(style, shared, real_tokenizer):
    questions = load_questions(str(shared / "gsm8k"), "test")
    train = load_questions(str(shared / "gsm8k"), "train")
    examples = [(item.question, item.answer) for item in train[:3]]
    assert (len(questions), len(train)) == (1319, 7473)
    im_start, im_end, think, think_end = 151644, 151645, 151667, 151668
    for mode in MODES if style == "prompt" else ["few_shot"]:  # the style matters to no other
        prompts = [build_prompt(mode, item.question, real_tokenizer, examples, style) for item in questions]
        ids = real_tokenizer(prompts, add_special_tokens=False)["input_ids"]
        lengths = sorted(map(len, ids))
        print(f"{mode} {style}: {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}")
        for prompt, tokens in zip(prompts, ids, strict=True):
            turns = 2 + (6 if mode == "few_shot" and style == "turns" else 0)
            assert tokens.count(im_start) == turns + 1 and tokens.count(im_end) == turns
            assert real_tokenizer.decode(tokens) == prompt
            tail = tokens[len(tokens) - tokens[::-1].index(im_start) :]
            if mode == "thinking":
                assert think not in tail and think_end not in tail
            elif mode == "chatml_think_prefill":
                assert tail.count(think) == 1 and think_end not in tail
            else:
                assert tail.count(think) == tail.count(think_end) == 1
        assert lengths[-1] < 1200
