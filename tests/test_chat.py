import pytest

from lrs_utils import LayerScaling, score, tasks
from lrs_utils.tasks import in_chat


@pytest.mark.parametrize("made", [tasks.kv_retrieval, tasks.mdqa, tasks.lines_retrieval])
def test_a_question_becomes_the_user_s_message(smollm2, made):
    suite = made(4, 1)
    chat = in_chat(suite, smollm2.tokenizer)
    assert chat.recipe == {**suite.recipe, "prompt_style": "chat"}
    assert chat.depths.tolist() == suite.depths.tolist()
    for raw, asked in zip(suite.probes[0].questions, chat.probes[0].questions, strict=True):
        message = {"role": "user", "content": suite.probes[0].context + raw.prompt}
        rendered = smollm2.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        assert chat.probes[0].context + asked.prompt == rendered
        assert asked.answer_prefix + asked.answer == (raw.answer_prefix + raw.answer).lstrip()
        assert asked.accepted == raw.accepted
    assert score(smollm2, chat, [LayerScaling.identity(30)]).exact.shape == (1, 1, len(suite.depths))


def test_a_begin_of_text_that_the_tokenizer_adds_comes_once(smollm2, monkeypatch):
    suite = tasks.kv_retrieval(2, 1, keys="short")
    tokenizer = smollm2.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", "{{ bos_token }}U:{{ messages[0]['content'] }}\nA:")
    assert in_chat(suite, tokenizer).probes[0].context.startswith("<|im_start|>U:Extract")

    class Adding:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, text):
            return {"input_ids": [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]}

    assert in_chat(suite, Adding()).probes[0].context.startswith("U:Extract")


def test_a_template_that_tells_the_date_makes_the_same_suite_tomorrow(smollm2, monkeypatch):
    dated = "{{ strftime_now('%d %B %Y') }} {{ messages[0]['content'] }}"
    monkeypatch.setattr(smollm2.tokenizer, "chat_template", dated)
    chat = in_chat(tasks.kv_retrieval(2, 1, keys="short"), smollm2.tokenizer)
    assert chat.probes[0].context.startswith("01 Jan 2025 Extract")


def test_a_model_without_a_template_is_refused(tiny):
    with pytest.raises(ValueError, match="has no chat template; ask the suite as it is"):
        in_chat(tasks.kv_retrieval(2, 1, keys="short"), tiny.tokenizer)
