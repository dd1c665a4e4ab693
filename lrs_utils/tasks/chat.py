"""Prompt style: a suite as it is, or as a user's message in the model's chat template."""

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from lrs_utils.tasks.suite import Probe, Suite

_MESSAGE = "<message>"
# Some templates give today's date; a suite must be the same tomorrow.
_SAME_DATE = "{%- macro strftime_now(form) -%}01 Jan 2025{%- endmacro -%}"


def in_chat(suite: Suite, tokenizer: PreTrainedTokenizerBase) -> Suite:
    """The same questions asked as a user; the answer, with its prefix, opens the model's turn.

    Raises
    ------
    ValueError
        The tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template; ask the suite as it is")
    rendered = str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": _MESSAGE}],
            chat_template=_SAME_DATE + tokenizer.get_chat_template(),
            tokenize=False,
            add_generation_prompt=True,
        )
    )
    head, _, tail = rendered.partition(_MESSAGE)
    if tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        head = head.removeprefix(tokenizer.bos_token)  # it is added again when text is tokenised
    probes = []
    for probe in suite.probes:
        questions = []
        for q in probe.questions:
            prefix, answer = q.answer_prefix.lstrip(), q.answer if q.answer_prefix.strip() else q.answer.lstrip()
            questions.append(replace(q, prompt=q.prompt + tail, answer_prefix=prefix, answer=answer))
        probes.append(Probe(head + probe.context, tuple(questions), probe.n_items))
    return Suite(f"{suite.name}-chat", tuple(probes), {**suite.recipe, "prompt_style": "chat"})
