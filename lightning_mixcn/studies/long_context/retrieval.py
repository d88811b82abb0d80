"""Retrieval: does a model find one sentence again in a long text, wherever it is?

Passkey retrieval (Mohtashami and Jaggi 2023, https://arxiv.org/abs/2305.16300) hides a number, needle in a haystack a
fact. The answer's tokens are given to the model, and it must have held each of them for the most likely one: that is so
exactly where greedy decoding writes the answer, and takes one prefill.

Legend: N tokens of a row, T tasks, L lengths, D depths.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_mixcn.errors import UserError
from lightning_mixcn.model.reference import evaluating
from lightning_mixcn.studies.processes import over_ranks
from lightning_mixcn.text import TextTokenizer

from .rows import (
    as_far_as_memory_goes,
    score_rows,
)


@dataclass(frozen=True)
class RetrievalTask:
    """A statement to find again in a long text.

    Args:
        filler: Sentences around it, which say nothing of it.
        statement: Sentence that is hidden, with ``{topic}`` and ``{answer}``.
        question: Sentence that comes last, with ``{topic}``; the answer continues it.
        answer: Continuation of the question, with ``{answer}``.
        facts: Answers by topic; empty for random numbers of five digits.
    """

    filler: tuple[str, ...]
    statement: str
    question: str
    answer: str
    facts: Mapping[str, str]

    def draw(self, random: Random) -> tuple[str, str, str]:
        """Draw a fact; gives statement, question and answer."""
        if self.facts:
            topic, answer = random.choice(sorted(self.facts.items()))
        else:
            topic, answer = "", str(random.randrange(10_000, 100_000))
        texts = (self.statement, self.question, self.answer)
        statement, question, ending = (text.format(topic=topic, answer=answer) for text in texts)
        return statement, question, ending


_FILLER_ZH = (
    "早晨的风从窗外吹进来,桌上的纸轻轻动了一下。",
    "院子里有一棵老树,夏天的时候树荫很大。",
    "火车慢慢驶出车站,站台上的人越来越小。",
    "他把书放回架子上,又泡了一壶茶。",
    "山路转过一个弯,前面就是一座石桥。",
    "雨停了以后,街上的灯一盏一盏亮起来。",
    "孩子们在操场上跑来跑去,笑声传得很远。",
    "渔船靠岸的时候,天边已经有些发白。",
    "厨房里飘出饭菜的香味,猫在门口等着。",
    "图书馆下午很安静,只听见翻书的声音。",
    "冬天的湖面结了一层薄冰,没有人敢走上去。",
    "邻居送来一篮橘子,说是自己家里种的。",
)
_FILLER_EN = (
    "The bakery on the corner opens before the first tram comes down the hill. ",
    "A grey cat sleeps on the warm stones behind the mill. ",
    "Rain had washed the dust from the leaves, and the road smelled of pine. ",
    "She folded the map twice and put it back into her coat. ",
    "The clock in the hall was always a few minutes late. ",
    "Two boats drifted past the island without a sound. ",
    "In the evening the children carried lanterns through the orchard. ",
    "He painted the fence white in spring and mended it in autumn. ",
    "The old bridge had three arches, and swallows lived under each of them. ",
    "Nobody remembered who had planted the row of poplars. ",
    "A kettle began to sing somewhere in the house. ",
    "The letter was short, and the ink had faded to brown. ",
)

RETRIEVAL_TASKS: Mapping[str, RetrievalTask] = {
    "passkey_zh": RetrievalTask(
        _FILLER_ZH,
        "请记住下面的密码:密码是{answer}。再说一遍,{answer}就是密码。",
        "问:上文中的密码是多少?答:密码是",
        "{answer}",
        {},
    ),
    "passkey_en": RetrievalTask(
        _FILLER_EN,
        "Keep this pass key in mind: the pass key is {answer}. Once more, {answer} is the pass key. ",
        "Question: what is the pass key in the text above? Answer: the pass key is",
        " {answer}",
        {},
    ),
    "needle_zh": RetrievalTask(
        _FILLER_ZH,
        "老人在{topic}最爱做的事是{answer}。",
        "问:根据上文,老人在{topic}最爱做的事是什么?答:老人在{topic}最爱做的事是",
        "{answer}",
        {
            "苏州": "坐在桥头听雨",
            "大理": "骑车去看白塔",
            "青岛": "清早去海边拾贝壳",
            "成都": "在竹林里下棋",
            "哈尔滨": "夜里看冰灯",
        },
    ),
    "needle_en": RetrievalTask(
        _FILLER_EN,
        "The gardener's favourite thing to do in {topic} is {answer}. ",
        "Question: what does the gardener like best in {topic}? "
        "Answer: the gardener's favourite thing to do in {topic} is",
        " {answer}",
        {
            "Lisbon": "riding the yellow tram up to the castle",
            "Bergen": "watching the ferries from the fish market",
            "Kyoto": "counting carp in the temple pond",
            "Quebec": "skating along the frozen river at night",
            "Nairobi": "buying maps in the station arcade",
        },
    ),
}


class Prompt(NamedTuple):
    """A text with something to find, and the answer.

    Args:
        ids: int64 ``[N]``: BOS, if the tokenizer puts it before a text, filler with the statement in it, question,
            answer.
        answer_tokens: Number of tokens at the end that are the answer.
    """

    ids: Tensor
    answer_tokens: int


class RetrievalResult(NamedTuple):
    """What `evaluate_retrieval` gives, the same on every rank.

    Args:
        accuracy: Accuracy of each task float64 ``[D, L]``, the share of prompts answered right.
        lengths: The L lengths.
        out_of_memory: Lengths that did not fit.
    """

    accuracy: dict[str, Tensor]
    lengths: list[int]
    out_of_memory: list[int]


def evaluate_retrieval(
    model: nn.Module,
    tokenizer: TextTokenizer,
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    prompts: int,
    chunk: int,
    seed: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
) -> RetrievalResult:
    """Ask for every length and depth; all ranks call it and share the prompts.

    Args:
        model: A model of `load_moe` or the PeftModel around it.
        tokenizer: The model's.
        tasks: Names in `RETRIEVAL_TASKS`.
        lengths: Tokens of the prompts at most, ascending; they miss them by less than a sentence.
        depths: Places of the statement, from 0, after BOS, to 1, before the question.
        prompts: Number of prompts of each task, length and depth.
        chunk: Tokens of a forward pass.
        seed: Seed of the facts and the filler's order. Torch's random numbers are not touched.
        rank: This rank.
        num_ranks: Number of ranks.

    Raises:
        ValueError: a length leaves no room for statement and question.
    """
    check_room(tokenizer, tasks, lengths[0], prompts, seed)  # on every rank, or one would fail and the others wait

    def attempt(left: Sequence[int]) -> Tensor:
        places = list(product(range(len(left)), range(len(tasks)), range(len(depths)), range(prompts)))
        # The longest first, so that each rank has its share of them.
        mine = sorted(places, key=lambda place: -place[0])[rank::num_ranks]
        asked = [
            make_prompt(tasks[task], tokenizer, left[length], depths[depth], seed=seed + number)
            for length, task, depth, number in mine
        ]
        right = torch.zeros(len(tasks), len(depths), len(left), dtype=torch.int64)
        scored = score_rows(model, [prompt.ids for prompt in asked], chunk)
        for (length, task, depth, _), prompt, scores in zip(mine, asked, scored, strict=True):
            right[task, depth, length] += bool(scores.is_argmax[-prompt.answer_tokens :].all())
        return over_ranks(right.to(next(model.parameters()).device)).cpu()

    with evaluating(model):
        right, skipped = as_far_as_memory_goes(lengths, attempt)
    fitting = [length for length in lengths if length not in skipped]
    accuracy = {} if right is None else {task: right[index].double() / prompts for index, task in enumerate(tasks)}
    return RetrievalResult(accuracy, fitting, skipped)


def check_room(tokenizer: TextTokenizer, tasks: Sequence[str], length: int, prompts: int, seed: int) -> None:
    """Make the shortest prompts. Raises: ValueError, as `make_prompt`."""
    for name, number in product(tasks, range(prompts)):
        make_prompt(name, tokenizer, length, 0.0, seed=seed + number)


def make_prompt(name: str, tokenizer: TextTokenizer, length: int, depth: float, *, seed: int) -> Prompt:
    """Make one prompt.

    Args:
        name: Task, in `RETRIEVAL_TASKS`.
        tokenizer: The model's.
        length: Tokens at most.
        depth: Place of the statement, 0 to 1.
        seed: Seed of fact and filler; the same seed has the same fact at every length and depth.

    Raises:
        ValueError: ``length`` leaves no room for statement and question.
    """
    task, random = RETRIEVAL_TASKS[name], Random(f"{name} {seed}")
    statement, question, answer = task.draw(random)
    # Encoded with its question, since the tokens of an answer alone can be others.
    statement_ids, question_ids, asked_ids = tokenizer.encode_batch([statement, question, question + answer])
    known = next(
        (place for place, pair in enumerate(zip(question_ids, asked_ids, strict=False)) if pair[0] != pair[1]),
        len(question_ids),
    )
    room = length - len(tokenizer.begin_ids) - len(statement_ids) - len(asked_ids)
    if room < 0:
        raise UserError(
            f"A retrieval prompt of {length} tokens has no room for {name!r}. Give at least {length - room}"
        )
    before, after = _filler(task, tokenizer, room, depth, random)
    ids = [*tokenizer.begin_ids, *before, *statement_ids, *after, *asked_ids]
    return Prompt(torch.tensor(ids), len(asked_ids) - known)


def _filler(
    task: RetrievalTask, tokenizer: TextTokenizer, room: int, depth: float, random: Random
) -> tuple[list[int], list[int]]:
    """Take whole sentences of at most ``room`` tokens in all, divided at ``depth``."""
    encoded = tokenizer.encode_batch(task.filler)
    sentences: list[list[int]] = []
    order: list[list[int]] = []
    while True:
        order = order or random.sample(encoded, len(encoded))
        if len(order[-1]) > room:
            break
        sentences.append(order.pop())
        room -= len(sentences[-1])
    place = round(depth * len(sentences))
    return list(chain(*sentences[:place])), list(chain(*sentences[place:]))
