"""What is hidden in long contexts, and the text around it; all sentences were written for this project."""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class RetrievalTask:
    """A statement to find again in a long text.

    Args:
        filler: Sentences around it, which say nothing of it.
        statement: What is hidden, with ``{topic}`` and ``{answer}``.
        question: What comes last, with ``{topic}``; the answer continues it.
        answer: How the answer continues the question, with ``{answer}``.
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
